"""Scores of parts of images, such as the hole of inpainting: PSNR and LPIPS-VGG, restricted to a region."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cddistill.evals import scores
from cddistill.perceptual import lpips


def evaluate(sets: Mapping[str, np.ndarray], targets, regions: Mapping[str, np.ndarray]) -> dict[str, scores.Scores]:
    """{set: {"LPIPS-VGG in the hole": (mean, standard error)}} for regions {"in the hole": weights [n, h, w] >= 0}.

    Images [n, h, w, 3] in [0, 1]. Networks see whole images; their distances are averaged over the region. Images
    without the region are left out of the mean.
    """
    found = {name: {} for name in sets}
    metrics = {"PSNR": psnr} | ({"LPIPS-VGG": lpips_vgg()} if min(targets.shape[1:3]) >= lpips.SMALLEST["vgg"] else {})
    for region, weights in regions.items():
        has = np.asarray(weights).reshape(len(weights), -1).sum(1) > 0
        for metric, of in metrics.items():
            for name, images in sets.items():
                each = values(of, images, targets, weights)[has]
                error = each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
                found[name][f"{metric} {region}"] = (each.mean(), error) if len(each) else None
    return found


def values(of, images, targets, weights) -> np.ndarray:
    """of(images, targets, weights) in batches, float64 [n]."""
    parts = [
        np.asarray(of(*(scores.padded(x, rows) for x in (images, targets, weights[..., None]))))
        for rows in scores.batches(targets)
    ]
    return np.concatenate(parts)[: len(targets)].astype(np.float64)


@scores.accurate
def psnr(a, b, weights):
    """Peak signal-to-noise ratio of the weighted pixels, dB; at most 100."""
    mse = (((a - b) ** 2).mean(-1, keepdims=True) * weights).sum((1, 2, 3)) / jnp.maximum(weights.sum((1, 2, 3)), 1e-9)
    return -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))


def lpips_vgg():
    """LPIPS with its distances weighted by the region, resized to each layer by averaging; layers where the region
    vanishes count 0."""
    features, params = scores.lpips_metric("vgg").features, lpips.load("vgg").params
    weighted = scores.accurate(distance)
    return lambda a, b, weights: weighted(params["heads"], features(a), features(b), weights)


def distance(heads, a, b, weights):
    """Weighted LPIPS [n] of normalised features by layer, weights [n, h, w, 1]."""
    total = 0.0
    for fa, fb, head in zip(a, b, heads, strict=True):
        at_layer = jax.image.resize(weights, (*fa.shape[:3], 1), "linear", antialias=True)
        mean = (((fa - fb) ** 2) * at_layer).sum((1, 2)) / jnp.maximum(at_layer.sum((1, 2)), 1e-9)
        total += mean @ head
    return total

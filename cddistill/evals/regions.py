"""Scores of parts of images, such as the hole of inpainting: PSNR and LPIPS-VGG, restricted to a region."""

from collections.abc import Mapping

import numpy as np

from cddistill.evals import scores
from cddistill.perceptual import lpips


def evaluate(sets: Mapping[str, np.ndarray], targets, regions: Mapping[str, np.ndarray]) -> dict[str, scores.Scores]:
    """{set: {"LPIPS-VGG in the hole": (mean, standard error)}} for regions {"in the hole": weights [n, h, w] >= 0}.

    Images [n, h, w, 3] in [0, 1]. Networks see whole images; their distances are averaged over the region. Images
    without the region are left out of the mean. A metric that cannot be computed, for small images or without its
    weights, is left out.
    """
    found = {name: {} for name in sets}
    has = {region: weights.reshape(len(weights), -1).sum(1) > 0 for region, weights in regions.items()}
    for metric in ("PSNR", "LPIPS-VGG") if regions else ():
        try:
            scores.require(metric, [targets])
            values = scores.pair_values(scores.PAIR_METRICS[metric](), sets, targets, regions)
        except (scores.NotComputed, lpips.WeightsMissing):
            continue
        for (name, region), each in values.items():
            inside = each[has[region]]
            found[name][f"{metric} {region}"] = scores.mean_and_error(inside) if len(inside) else None
    return found

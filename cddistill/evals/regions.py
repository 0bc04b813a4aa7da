"""Scores of parts of images, such as the hole of inpainting: PSNR and LPIPS-VGG, restricted to a region."""

from collections.abc import Mapping

import numpy as np

from cddistill.evals import scores
from cddistill.perceptual import lpips


def measure(sets: Mapping[str, np.ndarray], targets, regions: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """{set: {"LPIPS-VGG in the hole": a number for each image [n]}} for {"in the hole": weights [n, h, w] >= 0}.

    Images [n, h, w, 3] in [0, 1]. Networks see whole images; their distances are averaged over the region. Images
    without the region have NaN. A metric that cannot be computed, for small images or without its weights, is left
    out.
    """
    found = {name: {} for name in sets}
    has = {region: weights.reshape(len(weights), -1).sum(1) > 0 for region, weights in regions.items()}
    for metric in ("PSNR", "LPIPS-VGG") if regions else ():
        try:
            scores.require(metric, targets.shape[1:3])
            values = scores.pair_values(scores.PAIR_METRICS[metric](), sets, targets, regions)
        except (scores.NotComputed, lpips.WeightsMissing):
            continue
        for (name, region), each in values.items():
            found[name][f"{metric} {region}"] = np.where(has[region], each, np.nan)
    return found


def means(each: Mapping[str, np.ndarray]) -> scores.Scores:
    """Means over images and their standard errors, of {column: numbers [n]}; NaN is left out, None if all are."""
    there = {column: values[~np.isnan(values)] for column, values in each.items()}
    return {column: scores.mean_and_error(x) if len(x) else None for column, x in there.items()}

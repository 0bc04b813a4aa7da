"""Improved precision and recall (Kynkaanniemi et al. 2019): how many images are realistic, how much of the real is
covered. Features are float [n, d]."""

import numpy as np

NEIGHBOURS = 3  # as in the paper
BLOCK = 1024  # rows of a distance matrix held at a time


def precision(x, real, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of `x` [m, d] within the k-th neighbour's distance of some row of `real` [n, d], and its binomial error.

    Raises ValueError if a set has no more than k rows.
    """
    if min(len(x), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images in each set, not {len(x)} and {len(real)}")
    radius = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in distances(real, real)])  # 0 is the row itself
    inside = np.concatenate([(d <= radius).any(1) for d in distances(x, real)])
    share = inside.mean()
    return share, (share * (1.0 - share) / len(x)) ** 0.5


def recall(x, real, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of `real` within the k-th neighbour's distance of some row of `x`: precision with the roles swapped."""
    return precision(real, x, k)


def distances(x, y):
    """Squared Euclidean distances, some rows of x at a time: blocks [<= BLOCK, n]."""
    squares = (y**2).sum(1)
    for i in range(0, len(x), BLOCK):
        part = x[i : i + BLOCK]
        yield np.maximum((part**2).sum(1)[:, None] + squares - 2.0 * part @ y.T, 0.0)

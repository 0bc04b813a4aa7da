"""Improved precision and recall (Kynkaanniemi et al. 2019): the share of generated images that are realistic, and the
share of real images that are covered. Features are float [n, d]."""

import numpy as np

NEIGHBOURS = 3  # as in the paper
BLOCK = 1024  # rows of a distance matrix in memory at a time


def precision(x, real, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of `x` [m, d] within the k-th neighbour distance of a row of `real` [n, d], with binomial standard error.

    Raises ValueError if a set has no more than k rows.
    """
    if min(len(x), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images in each set, not {len(x)} and {len(real)}")
    radius = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in distances(real, real)])  # 0 is the row itself
    inside = np.concatenate([(d <= radius).any(1) for d in distances(x, real)])
    share = inside.mean()
    return share, (share * (1.0 - share) / len(x)) ** 0.5


def recall(x, real, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of `real` within the k-th neighbour distance of a row of `x`: precision with the sets swapped."""
    return precision(real, x, k)


def distances(x, y):
    """Squared Euclidean distances between rows of x and y, in blocks [<= BLOCK, n]."""
    squares = (y**2).sum(1)
    for i in range(0, len(x), BLOCK):
        part = x[i : i + BLOCK]
        yield np.maximum((part**2).sum(1)[:, None] + squares - 2.0 * part @ y.T, 0.0)

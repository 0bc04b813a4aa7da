"""Distances between two sets of images in feature space: KID (Binkowski et al. 2018) and a Frechet distance.

Features are float [n, d]. Neither is comparable with FID: network, scaling and projection differ.
"""

import numpy as np

PCA = 64  # dimensions of the Frechet distance; a full covariance from a few hundred images is mostly bias
BLOCK = 1024  # rows of a kernel matrix in memory at a time


def standardized(x, real):
    """x minus the mean of the real set, over its standard deviation, float64.

    Deviations below half of their median are raised to it. A feature that is rarely active on the real set would
    otherwise be divided by almost zero and dominate the cubic kernel. Where `varies` is False the result means nothing.
    """
    std = real.std(0, dtype=np.float64)
    return (x - real.mean(0, dtype=np.float64)) / np.maximum(std, max(0.5 * np.median(std), 1e-6))


def varies(real) -> bool:
    """Whether at least half of the features differ between the images of the real set: those of a few images of one
    colour do not, and a KID of 1e39 would be that of rounding."""
    return bool(np.median(real.std(0, dtype=np.float64)) > 1e-6)


def kid(x, real) -> tuple[float, float]:
    """1000 times the unbiased squared MMD under k(a, b) = (a.b / d + 1)^3, and its standard error.

    `x` [m, d] and `real` [n, d] are standardised features. If m = n, row i of both may be an output and its target. The
    terms k(x_i, real_i) are then omitted (Gretton et al. 2012, eq. 4): for such pairs they would pull the estimate far
    below zero. A perfect restoration gets exactly 0. The standard error is the delete-one jackknife, over pairs if
    m = n. It is deterministic, in closed form from row sums, valid for dependent pairs, and free of the k(a, a) terms
    that repeated rows add to a bootstrap. It is overestimated if the sets do not differ.
    Raises ValueError if a set has fewer than 3 images.
    """
    m, n = len(x), len(real)
    if min(m, n) < 3:
        raise ValueError(f"KID needs at least 3 images in each set, not {m} and {n}")
    xx, yy = _row_sums(x, x) - _kernel_diagonal(x, x), _row_sums(real, real) - _kernel_diagonal(real, real)
    xy, yx = _row_sums(x, real), _row_sums(real, x)
    if m == n:
        h = xx + yy - (xy + yx - 2.0 * _kernel_diagonal(x, real))
        value = h.sum() / (n * (n - 1))
        variance = _jackknife((h.sum() - 2.0 * h) / ((n - 1) * (n - 2)))
        return 1e3 * value, 1e3 * variance**0.5
    within = xx.sum() / (m * (m - 1)), yy.sum() / (n * (n - 1))
    value = sum(within) - 2.0 * xy.sum() / (m * n)
    without_x = (xx.sum() - 2.0 * xx) / ((m - 1) * (m - 2)) - 2.0 * (xy.sum() - xy) / ((m - 1) * n)
    without_y = (yy.sum() - 2.0 * yy) / ((n - 1) * (n - 2)) - 2.0 * (yx.sum() - yx) / ((n - 1) * m)
    return 1e3 * value, 1e3 * (_jackknife(without_x) + _jackknife(without_y)) ** 0.5


def frechet(x, real, groups: int = 20) -> tuple[float, float]:
    """Frechet distance of Gaussians on the real set's first 64 principal axes, and its standard error.

    `x` and `real` are standardised features. Biased upwards at any n (0 only for equal sets): compare at equal n only.
    The standard error is a jackknife over `groups` equal parts; if m = n, pairs are left out together.
    Raises ValueError if a set has fewer than 128 images, too few for the covariances.
    """
    if min(len(x), len(real)) < 2 * PCA:
        raise ValueError(f"this Frechet distance needs {2 * PCA} images in each set, not {len(x)} and {len(real)}")
    axes = _principal_axes(real - real.mean(0))
    a, b = _moments((x - real.mean(0)) @ axes, groups), _moments((real - real.mean(0)) @ axes, groups)
    if len(x) == len(real):
        values = _frechet(a, b)
        return values[-1], _jackknife(values[:-1]) ** 0.5
    without_a, without_b = _frechet(a, [m[-1:] for m in b]), _frechet([m[-1:] for m in a], b)
    return without_a[-1], (_jackknife(without_a[:-1]) + _jackknife(without_b[:-1])) ** 0.5


def _row_sums(x, y):
    """sum_j k(x_i, y_j) for every i."""
    blocks = range(0, len(x), BLOCK)
    return np.concatenate([((x[i : i + BLOCK] @ y.T / x.shape[1] + 1.0) ** 3).sum(1) for i in blocks])


def _kernel_diagonal(x, y):
    return ((x * y).sum(1) / x.shape[1] + 1.0) ** 3


def _jackknife(values):
    """Variance of a statistic from its leave-one-out values."""
    return (len(values) - 1) * values.var()


def _principal_axes(x):
    """The first principal axes [d, PCA] of centred rows, from the smaller of x x^T and x^T x."""
    if len(x) > x.shape[1]:
        return np.linalg.eigh(x.T @ x)[1][:, -PCA:]
    axes = x.T @ np.linalg.eigh(x @ x.T)[1][:, -PCA:]
    return axes / np.maximum(np.linalg.norm(axes, axis=0), 1e-12)


def _moments(x, groups):
    """Means [groups + 1, d] and covariances [groups + 1, d, d] with each group left out; the last ones of all rows."""
    parts = [x[g::groups] for g in range(groups)] + [x[:0]]
    n = len(x) - np.array([len(p) for p in parts], float).reshape(-1, 1)
    mean = (x.sum(0) - np.stack([p.sum(0) for p in parts])) / n
    square = (x.T @ x - np.stack([p.T @ p for p in parts])) / n[..., None]
    return mean, (square - mean[:, :, None] * mean[:, None, :]) * (n / (n - 1))[..., None]


def _frechet(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of batches of moments, broadcast."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    ridge = 1e-10 * np.trace(cov_b[-1]) / PCA * np.eye(PCA)  # for directions of no variance in few or simple images
    root_a, root_b = np.linalg.cholesky(cov_a + ridge), np.linalg.cholesky(cov_b + ridge)
    cross = np.linalg.svd(root_a.swapaxes(1, 2) @ root_b, compute_uv=False).sum(1)  # tr (C_a C_b)^(1/2)
    trace = np.trace(cov_a, axis1=1, axis2=2) + np.trace(cov_b, axis1=1, axis2=2)
    return ((mean_a - mean_b) ** 2).sum(1) + trace - 2.0 * cross

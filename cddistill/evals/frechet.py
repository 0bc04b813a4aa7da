"""FID (Heusel et al. 2017, arXiv:1706.08500): the Frechet distance of Gaussians with the moments of two feature sets.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))        eq. 6, in float64

Moments are accumulated part by part and merged over hosts, so no host holds all features.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float


class Moments(NamedTuple):
    """Sums over a set of features: its size, mean, and scatter sum (x - mean) (x - mean)^T, float64."""

    n: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]


class Gaussian(NamedTuple):
    """What FID knows of a set, float64."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Those of features [n, d]; n may be 0."""
    x = features.astype(np.float64)
    mean = x.mean(0) if len(x) else np.zeros(x.shape[1])
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def merged(a: Moments, b: Moments) -> Moments:
    """Those of the union of two sets (Chan et al. 1979)."""
    n = a.n + b.n
    if not a.n or not b.n:
        return a if a.n else b
    shift = b.mean - a.mean
    return Moments(n, a.mean + shift * b.n / n, a.scatter + b.scatter + np.outer(shift, shift) * (a.n * b.n / n))


def over_hosts(mine: Moments) -> Moments:
    """Those of the union of all hosts' sets, equal on every host."""
    if jax.process_count() == 1:
        return mine
    flat = np.concatenate([np.array([mine.n], np.float64), mine.mean, mine.scatter.reshape(-1)])
    halves = multihost_utils.process_allgather(flat.view(np.uint32))  # JAX has no float64
    every, d = np.ascontiguousarray(halves).view(np.float64), len(mine.mean)
    total = moments(np.zeros((0, d)))
    for row in every:
        total = merged(total, Moments(int(row[0]), row[1 : 1 + d], row[1 + d :].reshape(d, d)))
    return total


def gaussian(of: Moments) -> Gaussian:
    """Mean and unbiased covariance (with n - 1), as all published FIDs have it. ValueError for less than 2 images."""
    if of.n < 2:
        raise ValueError(f"FID needs at least 2 images in each set, not {of.n}")
    return Gaussian(of.mean, of.scatter / (of.n - 1))


def distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance, which is FID for Inception's features; eq. 6.

    tr (C_1 C_2)^(1/2) is the sum of the square roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric:
    no complex roots, and singular covariances (fewer images than features) need no ridge.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.covariance @ root), 0.0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross)


def read(path: Path, d: int) -> Gaussian:
    """The reference statistics in an .npz file: mu [d] and sigma [d, d], the covariance.

    Raises ValueError for a file that holds anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # numpy raises many types for damaged archives
        raise ValueError(f"{path} is no .npz with mu and sigma ({error}): download it again") from error
    if mu.shape != (d,) or sigma.shape != (d, d):
        raise ValueError(
            f"{path} has mu {mu.shape} and sigma {sigma.shape}, not ({d},) and ({d}, {d}): download it again"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path} has values that are not finite (NaN or infinity): download it again")
    return Gaussian(mu, sigma)

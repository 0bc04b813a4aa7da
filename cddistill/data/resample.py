"""Exact image resampling in float32: one small matrix per axis."""

import functools

import numpy as np
from scipy.sparse import csr_array

SPARSE = 2**13  # elements of a matrix from which products with it skip zeros


def resample(image, size, kind):
    """Float image [h,w,c] -> [size[0],size[1],c]. kind: cubic (antialiased), area, bilinear or bicubic (neither is)."""
    for n, m in zip(image.shape[:2], size, strict=True):  # rows, then columns: each turn swaps the two axes
        image = np.moveaxis((taps(n, m, kind) @ image.reshape(n, -1)).reshape(m, *image.shape[1:]), 0, 1)
    return image


def to_uint8(image):
    """Image, clipped to [0, 1], rounded to 8 bits, as an image file stores it."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_float(image):
    """Image of 8 bits as float32 in [0, 1], the same on every platform."""
    return np.float32(image) / np.float32(255)


@functools.lru_cache(maxsize=4096)  # random resizing needs many sizes
def matrix(n, m, kind):
    """The matrix [m,n] that resamples n points to m. Each row sums to 1."""
    weights = {"cubic": antialiased_cubic, "area": area, "bilinear": bilinear, "bicubic": bicubic}[kind](n, m)
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    weights.flags.writeable = False
    return weights


@functools.lru_cache(maxsize=4096)
def taps(n, m, kind):
    """That matrix, without its zeros where it is large enough for that to be faster."""
    return matrix(n, m, kind) if n * m < SPARSE else csr_array(matrix(n, m, kind))


def cubic(x, a):
    """Keys' cubic convolution kernel; a = -0.5 is third-order accurate."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def antialiased_cubic(n, m):
    """As in Pillow and jax.image.resize: a downsampling kernel widens by the factor; it is cut at the border."""
    centre = (np.arange(m)[:, None] + 0.5) * n / m - 0.5
    return cubic((np.arange(n) - centre) / max(n / m, 1.0), -0.5)


def area(n, m):
    """Mean over the input pixels that an output pixel overlaps (adaptive average pooling)."""
    first, last = np.arange(m) * n // m, -(-(np.arange(1, m + 1) * n) // m)
    return ((np.arange(n) >= first[:, None]) & (np.arange(n) < last[:, None])).astype(float)


def bilinear(n, m):
    """Linear interpolation without antialiasing: downsampling skips pixels."""
    return interpolation(n, m, 1, lambda x: np.maximum(0.0, 1 - np.abs(x)))


def bicubic(n, m):
    """Cubic interpolation (a = -0.75) without antialiasing: downsampling skips pixels."""
    return interpolation(n, m, 2, lambda x: cubic(x, -0.75))


def interpolation(n, m, radius, kernel):
    """Weights of a kernel of fixed width. Pixels outside the image repeat the border pixel."""
    centre = (np.arange(m) + 0.5) * n / m - 0.5
    weights = np.zeros((m, n))
    for offset in range(1 - radius, radius + 1):
        tap = np.floor(centre).astype(int) + offset
        weights[np.arange(m), np.clip(tap, 0, n - 1)] += kernel(tap - centre)
    return weights

"""Distances of an image from its target: PSNR in decibels, and SSIM."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cddistill.perceptual.lpips import Weights, pixel_mean

Images = Float[Array | np.ndarray, "n h w c"]
SMALLEST = 11  # px, the width of SSIM's window


def psnr(a: Images, b: Images, weights: Weights | None = None) -> Float[Array, " n"]:
    """Peak signal-to-noise ratio of images in [0, 1], with weights that of these pixels.

    Equal images get 100 dB, so that the mean is finite.
    """
    mse = pixel_mean((a - b) ** 2, weights).mean(-1)
    return -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))


def ssim(a: Images, b: Images) -> Float[Array, " n"]:
    """Structural similarity of images in [0, 1] (Wang et al. 2004, eq. 13), averaged over channels and whole windows.

    Windows are Gaussian, 11 x 11 with sigma 1.5; C1 = 0.01^2, C2 = 0.03^2. Raises ValueError below 11 px.
    """
    if min(a.shape[1:3]) < SMALLEST:
        raise ValueError(f"SSIM needs images of at least {SMALLEST} px, not {a.shape}")
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b, cov = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2, _blur(a * b) - mean_a * mean_b
    luminance = (2.0 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2.0 * cov + 0.03**2) / (var_a + var_b + 0.03**2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x):
    """Gaussian window means, at the positions where the window fits in the image."""
    taps = np.exp(-0.5 * (np.arange(SMALLEST) - SMALLEST // 2) ** 2 / 1.5**2)
    taps = (taps / taps.sum()).tolist()
    for axis in (1, 2):
        size = x.shape[axis] - SMALLEST + 1
        x = sum(tap * jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i, tap in enumerate(taps))
    return x

"""Random distortions of images, to train a perceptual metric. Kinds and strengths are ours.

    warp and recolour  ->  blur  ->  coarsen  ->  add noise  ->  clip to [-1, 1]

Each kind is applied with probability 1/2, by an amount that is uniform between 0 and the maximum below.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cddistill.perceptual import ensemble

PROBABILITY = 0.5
SCALE = 0.2  # octaves, up or down; half of it for the aspect ratio
ROTATION = 0.25  # radians
SHIFT = 0.1  # fraction of width and height
BRIGHTNESS, CONTRAST, SATURATION = 0.4, 0.6, 1.0  # as in ensemble.Policy
BLUR = 0.05  # standard deviation, fraction of width and height
COARSE = 3.0  # cells of up to 1 + COARSE pixels per axis are averaged
NOISE = 0.4  # standard deviation


class Distortion(NamedTuple):
    """The parameters of one random distortion per sample [b]."""

    transform: dict  # parameters of ensemble.apply
    blur: Float[Array, "*b"]  # standard deviation, fraction of width and height
    coarse: Float[Array, "*b"]  # pixels per cell and axis
    noise: Float[Array, "*b h w c"]


def distort(x: Float[Array, "b h w c"], keys: Key[Array, " b"], strength=1.0) -> Float[Array, "b h w c"]:
    """Images in [-1, 1] with one random distortion per key; strength scales all amounts, 0 is the identity."""
    distortions = jax.vmap(functools.partial(_sample_distortion, x.shape[1:], strength))(keys)
    x = jax.vmap(_blur_and_coarsen)(ensemble.apply(distortions.transform, x), distortions.blur, distortions.coarse)
    return jnp.clip(x + distortions.noise, -1.0, 1.0)


def _sample_distortion(shape, strength, key) -> Distortion:
    k_kind, k_amount, k_where, k_noise = jax.random.split(key, 4)
    kinds = jax.random.bernoulli(k_kind, PROBABILITY, (5,)) * strength
    warp, colour, blur, coarse, noise = kinds * jax.random.uniform(k_amount, (5,))
    u = jax.random.uniform(k_where, (8,), minval=-1.0)
    geometric = ensemble.Geometric(
        scale=jnp.exp2(SCALE * warp * u[0]),
        rotation=ROTATION * warp * u[1],
        stretch=jnp.exp2(0.5 * SCALE * warp * u[2]),
        pre_rotation=jnp.zeros(()),
        offset=SHIFT * warp * u[3:5],
    )
    recolour = ensemble.Colour(
        BRIGHTNESS * colour * u[5], 1.0 + CONTRAST * colour * u[6], 1.0 + SATURATION * colour * u[7]
    )
    transform = {"geometric": geometric, "colour": recolour}
    return Distortion(transform, BLUR * blur, 1.0 + COARSE * coarse, NOISE * noise * jax.random.normal(k_noise, shape))


def _blur_and_coarsen(x, blur, coarse):
    """Gaussian blur, then means over cells of pixels, as one matrix per axis."""
    rows, columns = (_cell_means(n, coarse) @ _gaussian_blur(n, blur * n) for n in x.shape[:2])
    return jnp.einsum("Hh,Ww,hwc->HWc", rows, columns, x, precision="highest")


def _gaussian_blur(n, sigma):
    """[n, n] matrix of a Gaussian blur of sigma pixels, renormalised at the border."""
    distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
    weights = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-3)) ** 2)
    return weights / weights.sum(1, keepdims=True)


def _cell_means(n, coarse):
    """[n, n] matrix that replaces each pixel by the mean of its cell; there are n / coarse cells."""
    cell = jnp.floor((jnp.arange(n) + 0.5) * jnp.round(n / coarse) / n)
    same = (cell[:, None] == cell[None, :]).astype(jnp.float32)
    return same / same.sum(1, keepdims=True)

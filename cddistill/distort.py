"""Random distortions of images: what a metric is asked to compare. Kinds and strengths are ours.

    warp and recolour  ->  blur  ->  coarsen  ->  add noise  ->  clip to [-1, 1]

Each kind comes with chance 1/2, and then by an amount between nothing and the most that is given here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cddistill import augment

CHANCE = 0.5
SCALE = 0.2  # octaves, larger or smaller; half of it for the ratio of width and height
TURN = 0.25  # radians
SHIFT = 0.1  # of width and height
BRIGHTNESS, CONTRAST, SATURATION = 0.4, 0.6, 1.0  # as in augment.Policy
BLUR = 0.05  # standard deviation, of width and height
COARSE = 3.0  # 1 + this many pixels become one
NOISE = 0.4  # standard deviation


class Distortion(NamedTuple):
    """Per sample [b]: one random distortion."""

    transform: dict  # of augment.apply
    blur: Float[Array, "*b"]  # standard deviation, of width and height
    coarse: Float[Array, "*b"]  # pixels that become one, on each axis
    noise: Float[Array, "*b h w c"]


def distort(x: Float[Array, "b h w c"], keys: Key[Array, " b"], strength=1.0) -> Float[Array, "b h w c"]:
    """Images in [-1, 1], each distorted as its own key says, `strength` times as strong; by 0, not at all."""
    drawn = jax.vmap(functools.partial(_draw, x.shape[1:], strength))(keys)
    x = jax.vmap(_soften)(augment.apply(drawn.transform, x), drawn.blur, drawn.coarse)
    return jnp.clip(x + drawn.noise, -1.0, 1.0)


def _draw(shape, strength, key) -> Distortion:
    k_kind, k_amount, k_where, k_noise = jax.random.split(key, 4)
    kinds = jax.random.bernoulli(k_kind, CHANCE, (5,)) * strength
    warp, colour, blur, coarse, noise = kinds * jax.random.uniform(k_amount, (5,))
    u = jax.random.uniform(k_where, (8,), minval=-1.0)
    geometric = augment.Geometric(
        scale=jnp.exp2(SCALE * warp * u[0]),
        turn=TURN * warp * u[1],
        stretch=jnp.exp2(0.5 * SCALE * warp * u[2]),
        tilt=jnp.zeros(()),
        offset=SHIFT * warp * u[3:5],
    )
    recolour = augment.Colour(
        BRIGHTNESS * colour * u[5], 1.0 + CONTRAST * colour * u[6], 1.0 + SATURATION * colour * u[7]
    )
    transform = {"geometric": geometric, "colour": recolour}
    return Distortion(transform, BLUR * blur, 1.0 + COARSE * coarse, NOISE * noise * jax.random.normal(k_noise, shape))


def _soften(x, blur, coarse):
    """Gaussian blur, then means over cells of pixels, both as one matrix for each axis."""
    rows, columns = (_cells(n, coarse) @ _gaussian(n, blur * n) for n in x.shape[:2])
    return jnp.einsum("Hh,Ww,hwc->HWc", rows, columns, x, precision="highest")


def _gaussian(n, sigma):
    """[n, n]: means of neighbours; those beyond the border are left out."""
    distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
    weights = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-3)) ** 2)
    return weights / weights.sum(1, keepdims=True)


def _cells(n, coarse):
    """[n, n]: the mean of each pixel's cell, of which there are n / coarse."""
    cell = jnp.floor((jnp.arange(n) + 0.5) * jnp.round(n / coarse) / n)
    same = (cell[:, None] == cell[None, :]).astype(jnp.float32)
    return same / same.sum(1, keepdims=True)

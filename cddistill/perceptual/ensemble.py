"""E-LatentLPIPS (Kang et al. 2024, arXiv:2405.05967): a metric averaged over random transforms of both images.

    d(a, b) = E_T metric(T(a), T(b))        estimated with one random T per pair and call

Geometric transforms are those of StyleGAN2-ADA (Karras et al. 2020, arXiv:2006.06676), between two sym6 wavelet
filters; colour and cutout are those of DiffAugment (Zhao et al. 2020, arXiv:2006.10738). Unlike StyleGAN2-ADA, the
mirrored margin always has the maximal size, so shapes are static and a sample does not depend on the rest of its batch.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

# The low-pass filter of the symlet with six vanishing moments (Daubechies 1992), scaled to sum to 1.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
) / np.sqrt(2)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Policy:
    """The transforms applied to every pair, in this order, and their strengths."""

    blit: bool = False  # horizontal flip, rotation by multiples of 90 degrees, shift by whole pixels
    geometric: bool = False  # scale, rotation, anisotropic scale, second rotation, shift
    colour: bool = False  # brightness, contrast, saturation
    cutout: bool = False  # a square of zeros, which may cross the border
    shift: float = 0.125  # maximum, fraction of width and height
    scale: float = 0.2  # standard deviation, octaves
    stretch: float = 0.2  # standard deviation, octaves
    offset: float = 0.125  # standard deviation, fraction of width and height
    brightness: float = 0.5  # x + [-0.5, 0.5)
    contrast: float = 0.5  # times 1 + [-0.5, 0.5)
    saturation: float = 1.0  # times 1 + [-1, 1)
    hole: float = 0.5  # side of the square, fraction of width and height


POLICIES = {"none": Policy()} | {
    name: Policy(blit="b" in name, geometric="g" in name, colour="c" in name, cutout="o" in name)
    for name in ("b", "g", "c", "o", "co", "bg", "bgo", "bgc", "bgco")  # the paper uses bgo
}


class Blit(NamedTuple):
    """Parameters per sample [b]."""

    flip: Num[Array, "*b"]  # 0 or 1
    quarter_turns: Num[Array, "*b"]  # rotations by 90 degrees, 0 to 3
    shift: Float[Array, "*b 2"]  # right and down, fraction of width and height; rounded to pixels


class Geometric(NamedTuple):
    """Parameters per sample [b]."""

    scale: Float[Array, "*b"]
    rotation: Float[Array, "*b"]  # radians, after stretching
    stretch: Float[Array, "*b"]  # factor of the width; the height is divided by it
    pre_rotation: Float[Array, "*b"]  # radians, before stretching
    offset: Float[Array, "*b 2"]  # right and down, fraction of width and height


class Colour(NamedTuple):
    """Parameters per sample [b]."""

    brightness: Float[Array, "*b"]  # added
    contrast: Float[Array, "*b"]  # factor of the distance from the image's mean
    saturation: Float[Array, "*b"]  # factor of the distance from the pixel's mean


class Cutout(NamedTuple):
    """Parameters per sample [b]."""

    centre: Float[Array, "*b 2"]  # x and y, fraction of width and height
    side: Float[Array, "*b"]  # fraction of width and height


def ensemble(metric, a, b, keys, policy: Policy, l1: float = 0.0) -> Float[Array, " b"]:
    """metric(T(a), T(b)) float32 [b] with one random T per pair, for a, b [b, h, w, c] and keys [b].

    metric maps two batches to [b]. l1 times the mean |a - b| of the untransformed images is added: 0 in the paper, 1 by
    default in its authors' package. The gradient with respect to a has no part through T(b).
    """
    transform = functools.partial(apply, sample_transforms(keys, policy))
    distance = metric(transform(a), transform(b))
    return distance + l1 * jnp.abs(a.astype(jnp.float32) - b).mean((1, 2, 3)) if l1 else distance


def sample_transforms(keys: Key[Array, " b"], policy: Policy) -> dict:
    """Random parameters of one transform per key: {name: Blit, Geometric, ...} of the policy's transforms."""
    return jax.vmap(functools.partial(_sample_transform, policy))(keys)


def _sample_transform(policy, key):
    k_uniform, k_normal = jax.random.split(key)
    u, n = jax.random.uniform(k_uniform, (11,)), jax.random.normal(k_normal, (4,))
    around = 2 * u - 1
    parts = {
        "blit": Blit(jnp.floor(2 * u[0]), jnp.floor(4 * u[1]), policy.shift * around[2:4]),
        "geometric": Geometric(
            jnp.exp2(policy.scale * n[0]), jnp.pi * around[4], jnp.exp2(policy.stretch * n[1]), jnp.pi * around[5],
            policy.offset * n[2:4],
        ),
        "colour": Colour(
            policy.brightness * around[6], 1 + policy.contrast * around[7], 1 + policy.saturation * around[8]
        ),
        "cutout": Cutout(u[9:11], jnp.asarray(policy.hole)),
    }  # fmt: skip
    return {name: part for name, part in parts.items() if getattr(policy, name)}


def apply(params: dict, x: Num[Array | np.ndarray, " b *d"]) -> Float[Array, " b *d"]:
    """T(x) float32 [b, h, w, c] for any size and number of channels. Linear in x, except colour, which is affine."""
    return jax.vmap(_apply)(params, jnp.asarray(x, jnp.float32))


def _apply(params, x):
    if params.keys() & {"blit", "geometric"}:
        x = _resample(params, x)
    if "colour" in params:
        colour = params["colour"]
        x = x + colour.brightness
        x = (x - (mean := x.mean())) * colour.contrast + mean
        x = (x - (mean := x.mean(-1, keepdims=True))) * colour.saturation + mean
    if "cutout" in params:
        (cx, cy), side = params["cutout"].centre, params["cutout"].side
        inside = [jnp.abs((jnp.arange(n) + 0.5) / n - c) < side / 2 for n, c in zip(x.shape, (cy, cx), strict=False)]
        x = jnp.where((inside[0][:, None] & inside[1][None, :])[..., None], 0.0, x)
    return x


def _resample(params, x):
    """Upsample by 2, resample bilinearly, downsample by 2: less blur than bilinear alone, and no aliasing."""
    h, w, c = x.shape
    fine = _separable(_upsampler(h), _upsampler(w), x)
    # Output grid at twice the resolution, in pixels from the centre, with 5 more on every side for the last filter.
    y, u = ((jnp.arange(2 * n + 10) - n - 4) / 2 for n in (h, w))
    u, y = source_coordinates(params, *jnp.meshgrid(u, y), h, w)
    # Rows and columns of `fine`; points outside of it are moved to its border of zeros.
    u, y = (jnp.clip(2 * v + 3 * n - 3, -1, 6 * n - 4) + 1 for v, n in ((u, w), (y, h)))
    column, row = (jnp.floor(v).astype(jnp.int32) for v in (u, y))
    du, dy = (u - column)[..., None], (y - row)[..., None]
    first, width = row * fine.shape[1] + column, fine.shape[1]
    pixel = lambda i, j: fine.reshape(-1, c).at[first + i * width + j].get(mode="promise_in_bounds")
    top, bottom = (pixel(i, 0) * (1 - du) + pixel(i, 1) * du for i in (0, 1))
    return _separable(_downsampler(h), _downsampler(w), top * (1 - dy) + bottom * dy)


def source_coordinates(params, x, y, h, w):
    """Coordinates in the image of the pixels at (x, y) of T(image), in pixels from the centre, right and down."""
    if "geometric" in params:
        g = params["geometric"]
        x, y = _rotate(x - g.offset[0] * w, y - g.offset[1] * h, g.pre_rotation)
        x, y = _rotate(x / g.stretch, y * g.stretch, g.rotation)
        x, y = x / g.scale, y / g.scale
    if "blit" in params:
        g = params["blit"]
        x, y = x - jnp.round(g.shift[0] * w), y - jnp.round(g.shift[1] * h)
        x, y = _rotate(x, y, jnp.pi / 2 * g.quarter_turns)
        x = x * (1 - 2 * g.flip)
    return x, y


def _rotate(x, y, angle):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _separable(rows, columns, x):
    """Apply matrices along height and width of an image: filters as matrix products, which are fast on every device."""
    return jnp.einsum("Hh,Ww,hwc->HWc", rows, columns, x, precision="highest")


def _upsampler(n):
    """[6n - 1, n] matrix: mirror n - 1 pixels at both ends, upsample by 2, pad zeros (1 before, 2 after)."""
    zeros_between = np.zeros((6 * n - 4, n))
    zeros_between[::2] = np.pad(np.eye(n), ((n - 1, n - 1), (0, 0)), "reflect")
    fine = [np.convolve(column, 2 * SYM6)[5:-6] for column in zeros_between.T]
    return np.pad(np.stack(fine, 1), ((1, 2), (0, 0))).astype(np.float32)


def _downsampler(n):
    """[n, 2n + 10] matrix: the filter with stride 2."""
    return np.stack([np.pad(SYM6, (2 * i, 2 * (n - 1 - i))) for i in range(n)]).astype(np.float32)

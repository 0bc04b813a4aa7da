"""One random transform for both images of a pair, over which E-LatentLPIPS averages a metric (Kang et al. 2024,
arXiv:2405.05967).

    d(a, b) = E_T metric(T(a), T(b))        estimated with one T for each pair and call

Geometry is that of StyleGAN2-ADA (Karras et al. 2020, arXiv:2006.06676), between two sym6 wavelet filters; colour and
cutout are those of DiffAugment (Zhao et al. 2020, arXiv:2006.10738). Other than there, all pixels that a transform
could ask for are always mirrored, so shapes are static and a sample does not depend on the others of its batch.
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
    """Which transforms every pair undergoes, in this order, and how strong they are."""

    blit: bool = False  # mirror, turn by quarters, shift by whole pixels
    geometric: bool = False  # scale, turn, stretch, turn back or further, shift
    colour: bool = False  # brightness, contrast, saturation
    cutout: bool = False  # a square of zeros, which may stick out
    shift: float = 0.125  # at most, of width and height
    scale: float = 0.2  # standard deviation, octaves
    stretch: float = 0.2  # standard deviation, octaves
    offset: float = 0.125  # standard deviation, of width and height
    brightness: float = 0.5  # x + [-0.5, 0.5)
    contrast: float = 0.5  # times 1 + [-0.5, 0.5)
    saturation: float = 1.0  # times 1 + [-1, 1)
    hole: float = 0.5  # side of the square, of width and height


POLICIES = {"none": Policy()} | {
    name: Policy(blit="b" in name, geometric="g" in name, colour="c" in name, cutout="o" in name)
    for name in ("b", "g", "c", "o", "co", "bg", "bgo", "bgc", "bgco")  # the paper's is bgo
}


class Blit(NamedTuple):
    """Per sample [b]."""

    flip: Num[Array, "*b"]  # 0 or 1
    turns: Num[Array, "*b"]  # by 90 degrees
    shift: Float[Array, "*b 2"]  # right and down, of width and height; rounded to pixels


class Geometric(NamedTuple):
    """Per sample [b]."""

    scale: Float[Array, "*b"]
    turn: Float[Array, "*b"]  # radians, after stretching
    stretch: Float[Array, "*b"]  # of the width; the height shrinks by as much
    tilt: Float[Array, "*b"]  # radians, before stretching
    offset: Float[Array, "*b 2"]  # right and down, of width and height


class Colour(NamedTuple):
    """Per sample [b]."""

    brightness: Float[Array, "*b"]  # added
    contrast: Float[Array, "*b"]  # factor of the distance from the image's mean
    saturation: Float[Array, "*b"]  # factor of the distance from the pixel's mean


class Cutout(NamedTuple):
    """Per sample [b]."""

    centre: Float[Array, "*b 2"]  # x and y, of width and height
    side: Float[Array, "*b"]  # of width and height


def ensemble(metric, a, b, keys, policy: Policy, l1: float = 0.0) -> Float[Array, " b"]:
    """metric(T(a), T(b)) with one T per pair, in float32: a, b [b,h,w,c], one key for each -> [b].

    metric takes two batches and returns [b]. l1 adds so much of the mean |a - b| of the images themselves: 0 in the
    paper, 1 by default in its authors' package. The gradient with respect to a does not run through T(b).
    """
    transform = functools.partial(apply, draw(keys, policy))
    distance = metric(transform(a), transform(b))
    return distance + l1 * jnp.abs(a.astype(jnp.float32) - b).mean((1, 2, 3)) if l1 else distance


def draw(keys: Key[Array, " b"], policy: Policy) -> dict:
    """The parameters of one transform per key: the parts that are on, by name."""
    return jax.vmap(functools.partial(_draw, policy))(keys)


def _draw(policy, key):
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


def apply(params: dict, x: Num[Array | np.ndarray, "b h w c"]) -> Float[Array, "b h w c"]:
    """T(x) in float32, of images of any size and number of channels. Linear in x but for colour, which is affine."""
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
    """Twice the resolution, bilinear there, and back: less blur than bilinear alone, no aliasing."""
    h, w, c = x.shape
    fine = _along(_upsampler(h), _upsampler(w), x)
    # Twice the resolution, in pixels from the centre; 5 rows more on every side, for the filter that follows.
    y, u = ((jnp.arange(2 * n + 10) - n - 4) / 2 for n in (h, w))
    u, y = source(params, *jnp.meshgrid(u, y), h, w)
    # To rows and columns of `fine`; what lies outside of it falls on its border of zeros.
    u, y = (jnp.clip(2 * v + 3 * n - 3, -1, 6 * n - 4) + 1 for v, n in ((u, w), (y, h)))
    column, row = (jnp.floor(v).astype(jnp.int32) for v in (u, y))
    du, dy = (u - column)[..., None], (y - row)[..., None]
    first, width = row * fine.shape[1] + column, fine.shape[1]
    pixel = lambda i, j: fine.reshape(-1, c).at[first + i * width + j].get(mode="promise_in_bounds")
    top, bottom = (pixel(i, 0) * (1 - du) + pixel(i, 1) * du for i in (0, 1))
    return _along(_downsampler(h), _downsampler(w), top * (1 - dy) + bottom * dy)


def source(params, x, y, h, w):
    """Where the pixels at (x, y) of T(image) come from; from the centre in pixels of the image, right and down."""
    if "geometric" in params:
        g = params["geometric"]
        x, y = _turn(x - g.offset[0] * w, y - g.offset[1] * h, g.tilt)
        x, y = _turn(x / g.stretch, y * g.stretch, g.turn)
        x, y = x / g.scale, y / g.scale
    if "blit" in params:
        g = params["blit"]
        x, y = x - jnp.round(g.shift[0] * w), y - jnp.round(g.shift[1] * h)
        x, y = _turn(x, y, jnp.pi / 2 * g.turns)
        x = x * (1 - 2 * g.flip)
    return x, y


def _turn(x, y, angle):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _along(rows, columns, x):
    """Two matrices along the height and width of an image: filters as matrix products, which every device does fast."""
    return jnp.einsum("Hh,Ww,hwc->HWc", rows, columns, x, precision="highest")


def _upsampler(n):
    """[6n - 1, n]: mirror n - 1 pixels beyond both ends, double the resolution, zeros around (1 before, 2 behind)."""
    zeros_between = np.zeros((6 * n - 4, n))
    zeros_between[::2] = np.pad(np.eye(n), ((n - 1, n - 1), (0, 0)), "reflect")
    fine = [np.convolve(column, 2 * SYM6)[5:-6] for column in zeros_between.T]
    return np.pad(np.stack(fine, 1), ((1, 2), (0, 0))).astype(np.float32)


def _downsampler(n):
    """[n, 2n + 10]: the filter at every second place."""
    return np.stack([np.pad(SYM6, (2 * i, 2 * (n - 1 - i))) for i in range(n)]).astype(np.float32)

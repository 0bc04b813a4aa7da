"""Arrays in fewer bits, rounded up or down at random so that the mean stays.

Rounding to the nearest value would lose a change that is smaller than half a step each time that it is made: an average
with a decay of 0.999 changes by a thousandth, and bfloat16 has steps of 1/256. Rounded at random, up with a probability
of the value's place between its two neighbours, such changes are kept on average (Gupta et al. 2015, arXiv:1502.02551).
"""

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Stored = Literal["float32", "bfloat16", "int8"]
SMALLEST = 4096  # elements of an array that is worth it; smaller ones, and vectors, stay as they are
LEVELS = 127  # of int8: the values (i / 127)^4 times the block's largest, 8 decades of them


@flax.struct.dataclass
class Coded:
    """A float32 array as int8 codes, and the largest absolute value of each block.

    A block is a slice along the largest axis: the codes are laid out on devices as the array is, see
    `sharding.by_shape`, and finding a block's largest value takes no communication.
    """

    codes: Any  # int8, of the array's shape: sign times level
    scale: Any  # float32 [1, ..., n, ..., 1]


def store(x: jax.Array, dtype: Stored, key: jax.Array) -> jax.Array | Coded:
    """A float32 array in another type, rounded with a random key; arrays that are not large are returned."""
    if dtype == "float32" or not is_large(x):
        return x
    return {"bfloat16": to_bfloat16, "int8": encode}[dtype](x, key)


def load(x: jax.Array | Coded) -> jax.Array:
    """The float32 array that `store` has rounded; integers as they are."""
    if isinstance(x, Coded):
        return decode(x)
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def is_large(x: jax.Array) -> bool:
    """Whether an array is one of float32 that `store` rounds."""
    return x.dtype == jnp.float32 and x.ndim > 1 and x.size >= SMALLEST


def to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16. What is not finite stays as it is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)  # exact, of what is rounded


def encode(x: jax.Array, key: jax.Array) -> Coded:
    """float32 to int8 codes. A value between 0 and the first level becomes that one, never 0: Adam divides by it."""
    largest = np.argsort(x.shape, kind="stable")[-1]
    scale = jnp.abs(x).max([i for i in range(x.ndim) if i != largest], keepdims=True)
    y = jnp.abs(x) / jnp.where(scale > 0, scale, 1.0)
    low = jnp.floor(LEVELS * jnp.sqrt(jnp.sqrt(y)))
    below, above = level(low), level(low + 1)
    up = jax.random.uniform(key, x.shape) * (above - below) < y - below
    codes = jnp.where(y > 0, jnp.clip(low + up, 1, LEVELS), 0)
    return Coded((jnp.sign(x) * codes).astype(jnp.int8), scale)


def decode(x: Coded) -> jax.Array:
    """The float32 array of some codes."""
    codes = x.codes.astype(jnp.float32)
    return jnp.sign(codes) * level(jnp.abs(codes)) * x.scale


def level(i: jax.Array) -> jax.Array:
    """The value of a level, between 0 and 1."""
    return (i / LEVELS) ** 4

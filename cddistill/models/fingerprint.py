"""A number for a network's weights: the same wherever they lie, another as soon as one bit or one name differs."""

import hashlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np


def fingerprint(params) -> str:
    """16 hexadecimal digits of a nested dict of arrays: of their float32 numbers, shapes and paths, and nothing else.

    Every leaf is a sum of mixed integers modulo 2^32, which no order of summation and no sharding changes.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    sums = jax.device_get({name: leaf_sum(x) for name, x in flat.items()})
    said = "\n".join(f"{name} {np.shape(x)} {int(sums[name]):08x}" for name, x in sorted(flat.items()))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


@jax.jit
def leaf_sum(x):
    """The sum of mix(bits, position) over a leaf; a single other number cannot leave it as it was."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):  # not one arange, which a sharded array would have to gather
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return mix(bits ^ mix(position + jnp.uint32(1))).sum(dtype=jnp.uint32)


def mix(x):
    """A bijection of 32 bits in which each bit of x moves about half of them (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

"""A checksum of a network's weights: independent of sharding, different if any bit or name differs."""

import hashlib
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np


def fingerprint(params) -> str:
    """16 hexadecimal digits for a nested dict of arrays, from their float32 values, shapes and paths only.

    Each leaf is hashed to a sum of integers modulo 2^32, which does not depend on summation order or sharding.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    sums = jax.device_get({name: leaf_sum(x) for name, x in flat.items()})
    lines = "\n".join(f"{name} {np.shape(x)} {int(sums[name]):08x}" for name, x in sorted(flat.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def of_network(params, config: dict) -> str:
    """A fingerprint of a network's weights and of its config.json, such as a VAE's scaling factor."""
    options = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"weights {fingerprint(params)}, config {options}"


@jax.jit
def leaf_sum(x):
    """Sum of mix(bits, position) over a leaf; changing a single element always changes the sum."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):  # one arange would gather a sharded array
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return mix(bits ^ mix(position + jnp.uint32(1))).sum(dtype=jnp.uint32)


def mix(x):
    """A bijection of 32-bit integers in which each input bit flips half of the output (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

"""A checksum of a network's weights: independent of sharding, different if any bit or name differs."""

import hashlib
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 2**16  # elements of a leaf that `chunk_sum` takes at a time


def fingerprint(params) -> str:
    """16 hexadecimal digits for a nested dict of arrays, from their float32 values, shapes and paths only.

    Each leaf is hashed to a sum of integers modulo 2^32, which does not depend on summation order or sharding.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    sums = jax.device_get({name: host_sum(x) if is_whole(x) else leaf_sum(x) for name, x in flat.items()})
    lines = "\n".join(f"{name} {np.shape(x)} {int(sums[name]):08x}" for name, x in sorted(flat.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def of_network(params, module) -> str:
    """A fingerprint of a network's weights and of its config.json, such as a VAE's scaling factor."""
    options = hashlib.sha256(json.dumps(module.to_config(), sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"weights {fingerprint(params)}, config {options}"


def is_whole(x) -> bool:
    """Whether this host has all of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def host_sum(x) -> int:
    """`leaf_sum` of an array that this host has, by one program for all shapes: compiling takes longer than adding."""
    flat, total = np.asarray(x, np.float32).reshape(-1).view(np.uint32), 0
    for start in range(0, flat.size, CHUNK):
        bits = flat[start : start + CHUNK]
        padded = bits if bits.size == CHUNK else np.pad(bits, (0, CHUNK - bits.size))
        total = total + chunk_sum(padded, np.uint32(start % 2**32), np.uint32(bits.size))  # does not wait for the last
    return int(total)


@jax.jit
def chunk_sum(bits, start, size):
    """The part of `leaf_sum` of `size` elements from the row-major position `start` on."""
    place = jnp.arange(CHUNK, dtype=jnp.uint32)
    return jnp.where(place < size, mix(bits ^ mix(start + place + jnp.uint32(1))), 0).sum(dtype=jnp.uint32)


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

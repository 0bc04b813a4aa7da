"""Kernel gradients on this CPU: a matrix product per tap (models/convolution.py) against XLA's own convolution.

    python benchmarks/convolution.py

Prints medians of interleaved runs, for a batch of 16 with as many channels out as in, and their ratios.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from cddistill.models.convolution import conv2d

SHAPES = ((64, 24), (64, 48), (32, 96), (16, 96), (16, 192), (8, 256))  # height = width, channels
RUNS = 9


def kernel_gradient(convolution):
    """A compiled function of x, kernel and the output's gradient."""

    def gradient(x, kernel, dy):
        return jax.vjp(lambda k: convolution(x, k, (1, 1), ((1, 1), (1, 1))), kernel)[1](dy)

    return jax.jit(gradient)


def xla(x, kernel, strides, padding):
    """XLA's convolution with XLA's gradients."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def seconds(f, *args):
    """Time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


def main():
    """Print the table."""
    rng, functions = np.random.default_rng(0), [kernel_gradient(f) for f in (xla, conv2d)]
    print("| px | channels | XLA, ms | per tap, ms | ratio |\n|---|---|---|---|---|")
    for size, channels in SHAPES:
        shapes = ((16, size, size, channels), (3, 3, channels, channels), (16, size, size, channels))
        args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
        for f in functions:
            seconds(f, *args)  # compiles
        times = zip(*([seconds(f, *args) for f in functions] for _ in range(RUNS)), strict=True)
        theirs, ours = (statistics.median(t) for t in times)
        print(f"| {size} | {channels} | {1e3 * theirs:.1f} | {1e3 * ours:.1f} | {theirs / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()

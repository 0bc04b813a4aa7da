"""What models/convolution.py saves on this CPU, against XLA's own convolution.

    python benchmarks/convolution.py

Two tables: kernel gradients, a matrix product per tap; and convolutions of an enlarged image, forward and with both
gradients. Medians of interleaved runs, as many channels out as in, and their ratios.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import sharding
from cddistill.models.convolution import conv2d, of_enlarged

SHAPES = ((64, 24), (64, 48), (32, 96), (16, 96), (16, 192), (8, 256))  # height = width, channels
ENLARGED = ((8, 4, 160), (8, 8, 96), (4, 16, 48), (16, 16, 96), (16, 32, 48), (2, 16, 640), (2, 32, 320))  # with batch
ONES = ((1, 1), ((1, 1), (1, 1)))  # strides, padding
OPTIONS = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
RUNS = 21


def kernel_gradient(convolution):
    """A compiled function of x, kernel and the output's gradient."""

    def gradient(x, kernel, dy):
        return jax.vjp(lambda k: convolution(x, k, (1, 1), ((1, 1), (1, 1))), kernel)[1](dy)

    return jax.jit(gradient)


def xla(x, kernel, strides, padding):
    """XLA's convolution with XLA's gradients."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def medians(functions, *args, runs=RUNS, clock=time.perf_counter):
    """Milliseconds of each function by a clock of seconds, in turns."""

    def seconds(f):
        start = clock()
        jax.block_until_ready(f(*args))
        return clock() - start

    for f in functions:
        seconds(f)  # compiles
    times = zip(*(map(seconds, functions) for _ in range(runs)), strict=True)
    return [1e3 * statistics.median(t) for t in times]


def written_out(x, kernel):
    """XLA's convolution of x, enlarged by 2."""
    return xla(x.repeat(2, 1).repeat(2, 2), kernel, *ONES)


def main():
    """Print the tables."""
    rng, functions = np.random.default_rng(0), [kernel_gradient(f) for f in (xla, conv2d)]
    arrays = lambda *shapes: [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    print("| px | channels | XLA, ms | per tap, ms | ratio |\n|---|---|---|---|---|")
    for n, c in SHAPES:
        theirs, ours = medians(functions, *arrays((16, n, n, c), (3, 3, c, c), (16, n, n, c)))
        print(f"| {n} | {c} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} |", flush=True)
    both = (written_out, sharding.inside(sharding.make_mesh(), lambda x, k: of_enlarged(x, k, *ONES, **OPTIONS)))
    forward = [jax.jit(f) for f in both]
    backward = [jax.jit(lambda x, kernel, dy, f=f: jax.vjp(f, x, kernel)[1](dy)) for f in both]
    print("\n| batch | px | channels | XLA, ms | 2 x 2, ms | ratio | gradients, ms | 2 x 2, ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for b, n, c in ENLARGED:
        args = arrays((b, n, n, c), (3, 3, c, c), (b, 2 * n, 2 * n, c))
        pairs = (medians(forward, *args[:2]), medians(backward, *args))
        cells = [f"{theirs:.1f} | {ours:.1f} | {theirs / ours:.2f}" for theirs, ours in pairs]
        print(f"| {b} | {n} -> {2 * n} | {c} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""What models/attention.py saves on this CPU, against XLA's own attention.

    python benchmarks/attention.py

Forward, and with the gradients of queries, keys and values. Medians of interleaved runs in CPU seconds of all threads,
which other work on the machine changes less than it changes the clock; their ratios; and the memory of temporaries.
"""

import functools
import time

import convolution
import jax
import numpy as np

from cddistill.models.attention import loop, xla

SHAPES = (  # batch, queries, keys, heads, their width
    (2, 1024, 1024, 8, 8), (2, 1024, 1024, 8, 40), (2, 1024, 1024, 1, 64), (2, 1024, 77, 8, 8), (8, 256, 256, 4, 24),
    (8, 256, 77, 4, 24), (8, 64, 64, 4, 48), (1, 4096, 4096, 5, 64), (1, 4096, 4096, 1, 512),
)  # fmt: skip
medians = functools.partial(convolution.medians, runs=7, clock=time.process_time)


def gradients(f):
    """A compiled function of q, k, v and the output's gradient."""
    return jax.jit(lambda q, k, v, dy: jax.vjp(f, q, k, v)[1](dy))


def main():
    """Print the table."""
    rng = np.random.default_rng(0)
    print("| batch, queries, keys, heads, width | XLA, ms | ours | ratio | with gradients | ours | ratio | MB | ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for b, length, keys, heads, width in SHAPES:
        q, dy, k, v = (rng.normal(size=(b, n, heads, width)).astype("f") for n in (length, length, keys, keys))
        both = [gradients(f) for f in (xla, loop)]
        memory = [f.lower(q, k, v, dy).compile().memory_analysis().temp_size_in_bytes / 1e6 for f in both]
        forward, backward = medians([jax.jit(f) for f in (xla, loop)], q, k, v), medians(both, q, k, v, dy)
        cells = [f"{a:.1f} | {b:.1f} | {a / b:.2f}" for a, b in (forward, backward)] + [f"{x:.0f}" for x in memory]
        print(f"| {b}, {length}, {keys}, {heads}, {width} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""What DMD2's two turns cost, against the network passes that each must make: time and memory, as ratios.

    python benchmarks/dmd2_turns.py [--batch=16] [--guidance=2] [--remat] [--dtype=float32]

Student's turn: one pass of the student forward and back, the teacher (twice if guided) and fake forward, fake's encoder
forward and back to its input. Critic's turn: the student forward, fake forward and back, its encoder forward and back
for drawn and for real images. Each pass is jitted and timed alone; the sum leaves out optimisers and averages, which
the turns have. Memory is that of state, gradients and frozen nets, in bytes per weight of the teacher.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from train_step import seconds

from cddistill import config, data, sharding
from cddistill.build import build, make_optimizers
from cddistill.step import train_step


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    settings = config.defaults("dmd2")
    settings.update(batch_size=args.batch, dtype=args.dtype, remat=args.remat, sample_steps=(1,))
    settings.method.update(real_guidance=args.guidance, ema_decay=0.999)
    parts = build(config.resolve(settings))
    method, driver = parts.experiment.method, parts.driver()
    state, frozen = driver.put_state(parts.init()), driver.put_frozen(parts.frozen)
    rows = next(data.batches(parts.experiment.data, batch_size=args.batch, seed=0, rows=parts.rows))
    batch = driver.put_batch(rows)

    net, disc, x0, text, t = frozen["teacher"], state.nets["disc"], batch["x0"], batch["text"], jnp.array([500])
    inside = functools.partial(sharding.inside, parts.mesh)
    out, judge = inside(lambda net: net(x0, t, text).x0), inside(lambda net, x: disc(net.features(x, t, text)).sum())
    passes = {
        "forward": jax.jit(out),
        "forward and back": jax.jit(jax.grad(lambda net: (out(net) ** 2).sum())),
        "encoder, to its input": jax.jit(lambda net: jax.grad(judge, 1)(net, x0)),
        "encoder, to its weights": jax.jit(lambda net: jax.grad(judge)(net, x0)),
    }
    cost = {name: seconds(functools.partial(f, net), args.repeats) for name, f in passes.items()}
    guided = 2 if args.guidance != 1.0 else 1
    due = {
        "student": cost["forward and back"] + (guided + 1) * cost["forward"] + cost["encoder, to its input"],
        "critic": cost["forward"] + cost["forward and back"] + 2 * cost["encoder, to its weights"],
    }

    weights = sum(x.size for x in jax.tree.leaves(net.params))
    held = sum(x.nbytes for x in jax.tree.leaves((state, net)))
    gradients = sum(x.nbytes for x in jax.tree.leaves(state.nets["fake"]))
    print(f"embedded, batch {args.batch}, {args.dtype}, {jax.devices()[0].device_kind}, median of {args.repeats}")
    for name, s in cost.items():
        print(f"{name:24}{s * 1e3:8.1f} ms")
    for turn, parts_s in due.items():
        plain = functools.partial(
            train_step, turns=method.turns(), optimizers=make_optimizers(parts.experiment), ema=method.ema()
        )
        step = jax.jit(inside(functools.partial(plain, play=(turn,))))
        turn_s = seconds(lambda step=step: step(state, frozen, batch), args.repeats)
        memory = step.lower(state, frozen, batch).compile().memory_analysis()
        print(f"{turn + ' turn':24}{turn_s * 1e3:8.1f} ms   {turn_s / parts_s:.3f} of its passes (aim: <= 1.15), "
              f"temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB")  # fmt: skip
    both = f"{held / weights:.1f} bytes a weight, {(held + gradients) / weights:.1f} with gradients"
    print(f"state and teacher       {both} (38 is usual: both nets' gradients, the teacher in bfloat16)")


if __name__ == "__main__":
    main()

"""The cost of a method's turns as ratios to the network passes they need: time and memory.

    python benchmarks/turns.py dmd2 [--batch=16] [--guidance=2] [--remat] [--dtype=float32]
    python benchmarks/turns.py diffusion2gan --pairs=runs/pairs_emoji [--batch=16] [--regression=lpips]

DMD2, student's turn: student forward and backward; teacher (twice with guidance) and fake forward; fake's encoder
forward and backward to its input. Critic's turn: student forward; fake forward and backward; its encoder forward and
backward for generated and for real images. Diffusion2GAN, critic's turn: student forward; disc forward and backward
twice; on lazy steps the penalty of one image. Student's turn: student forward and backward; the regression loss; disc
forward and backward to the generated image. Each pass is jitted and timed alone; the sum excludes optimisers and moving
averages, which the turns include. Memory is that of state, gradients and frozen nets, in bytes per teacher weight.
"""

import argparse
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from train_step import seconds

from cddistill import build, config, data, losses, sharding
from cddistill.step import train_step

T = jnp.array([500])


def dmd2(args):
    """Settings of a run, and how often each pass is needed, by the turns played."""
    settings = config.defaults("dmd2")
    settings.update(sample_steps=(1,))
    settings.method.update(real_guidance=args.guidance, ema_decay=0.999)
    guided = 2 if args.guidance != 1.0 else 1
    return settings, {
        ("student",): {"forward and backward": 1, "forward": guided + 1, "encoder, to its input": 1},
        ("critic",): {"forward": 1, "forward and backward": 1, "encoder, to its weights": 2},
    }


def diffusion2gan(args):
    """As `dmd2`."""
    settings = config.defaults("diffusion2gan")
    settings.update(sample_steps=(1,))
    settings.data.pairs = args.pairs
    settings.method.update(regression=args.regression, r1_stride=args.batch)
    both = {
        "forward": 1,
        "forward and backward": 1,
        "regression": 1,
        "disc, to its input": 1,
        "disc, to its weights": 2,
    }
    return settings, {("critic", "student"): both, ("critic", "student", "critic/lazy"): both | {"penalty": 1}}


def passes(n, batch, method) -> dict:
    """Name -> (function, its argument)."""
    x0, text, key = batch["x0"], batch["text"], jax.random.key(0)
    out = lambda net: net(x0, T, text).x0
    found = {
        "forward": (out, n.teacher),
        "forward and backward": (jax.grad(lambda net: (out(net) ** 2).sum()), n.teacher),
    }
    if "pairs" not in batch:
        judge = lambda net, x: n.disc(net.features(x, T, text)).sum()
        return found | {
            "encoder, to its input": (lambda net: jax.grad(judge, 1)(net, x0), n.teacher),
            "encoder, to its weights": (lambda net: jax.grad(judge)(net, x0), n.teacher),
        }
    z, keys = batch["pairs"]["noise"], jax.random.split(key, len(x0))
    judge = lambda disc, x: losses.gan(disc(x, T, text, z), real=True).mean()
    first = jax.tree.map(lambda a: a[:1], (x0, z, text, batch["index"]))

    def penalty(disc):
        return method.penalty(SimpleNamespace(**(vars(n) | {"disc": disc})), *first, key).mean()

    return found | {
        "regression": (jax.grad(lambda x: method.distance(n, x, x0, text, keys).mean()), z),
        "disc, to its input": (lambda disc: jax.grad(judge, 1)(disc, x0), n.disc),
        "disc, to its weights": (lambda disc: jax.grad(judge)(disc, x0), n.disc),
        "penalty": (jax.grad(penalty), n.disc),
    }


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("dmd2", "diffusion2gan"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--regression", default="lpips")
    parser.add_argument("--pairs", default="runs/pairs_emoji", help="folder that --mode=pairs wrote")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    settings, needed = {"dmd2": dmd2, "diffusion2gan": diffusion2gan}[args.method](args)
    settings.update(batch_size=args.batch, dtype=args.dtype, remat=args.remat)
    parts = build.build(config.resolve(settings))
    method, driver, inside = parts.experiment.method, parts.driver(), functools.partial(sharding.inside, parts.mesh)
    state, frozen = driver.put_state(parts.init()), driver.put_frozen(parts.frozen)
    stream = data.batches(parts.experiment.data, batch_size=args.batch, seed=0, rows=parts.rows)
    batch = driver.put_batch(next(stream))
    n = SimpleNamespace(**frozen, **state.nets)

    print(f"embedded, batch {args.batch}, {args.dtype}, {jax.devices()[0].device_kind}, median of {args.repeats}")
    cost = {}
    for name, (f, given) in passes(n, batch, method).items():
        jitted = jax.jit(inside(f))
        cost[name] = seconds(lambda jitted=jitted, given=given: jitted(given), args.repeats)
        print(f"{name:24}{cost[name] * 1e3:8.1f} ms", flush=True)
    plain = functools.partial(
        train_step, turns=method.turns(), optimizers=build.make_optimizers(parts.experiment), ema=method.ema()
    )
    for play, counts in needed.items():
        step = jax.jit(inside(functools.partial(plain, play=play)))
        turn_s = seconds(lambda step=step: step(state, frozen, batch), args.repeats)
        memory = step.lower(state, frozen, batch).compile().memory_analysis().temp_size_in_bytes / 1e9
        parts_s = sum(count * cost[name] for name, count in counts.items())
        print(f"{' + '.join(play):24}{turn_s * 1e3:8.1f} ms   {turn_s / parts_s:.3f} of its passes (target: <= 1.15), "
              f"temporaries {memory:.2f} GB", flush=True)  # fmt: skip
    weights = sum(x.size for x in jax.tree.leaves(n.teacher.params))
    held = sum(x.nbytes for x in jax.tree.leaves((state, n.teacher)))
    gradients = max(sum(x.nbytes for x in jax.tree.leaves(net)) for net in state.nets.values())
    both = f"{held / weights:.1f} bytes a weight, {(held + gradients) / weights:.1f} with gradients"
    print(f"state and teacher       {both} (38 is usual for DMD2: all gradients, the teacher in bfloat16)")


if __name__ == "__main__":
    main()

"""The cost of a CoDi step: every figure also as a ratio to a plain reference measured in the same run.

    python benchmarks/train_step.py                       the embedded config
    python benchmarks/train_step.py --shape=sd --width=320 --size=64 --batch=8 --dtype=bfloat16
                                                          Stable Diffusion 2.1's shape; --width=64 fits a laptop

The reference is the bare network: one forward and backward pass and one more forward pass, each jitted alone. A CoDi
step must compute at least these. The peak is the best rate of a large matrix product in the same dtype and device.
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import clock, config, data, log, models, sharding
from cddistill.build import build, make_optimizers
from cddistill.diffusion import DDPM
from cddistill.models.configured import POLICIES
from cddistill.net import Adapted, Autoencoder
from cddistill.step import active, init_state, train_step


def seconds(f, repeats):
    """Median seconds of a call after a warm-up call; f returns what to wait for."""
    jax.block_until_ready(f())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_flops(dtype, n):
    """FLOP/s of an n x n matrix product."""
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * n**3 / min(seconds(lambda: product(a), 1) for _ in range(10))


def embedded(args):
    """The experiment of configs/ccd_sr.py and its first batch."""
    settings = config.defaults("codi")
    settings.data.task = "sr"
    settings.batch_size = args.batch
    settings.dtype = args.dtype
    parts = build(config.resolve(settings))
    stream = data.batches(parts.experiment.data, batch_size=args.batch, seed=0, rows=parts.rows)
    return parts.experiment, parts.frozen, stream


def sd(args):
    """CoDi on a UNet of Stable Diffusion 2.1's shape; latents, text and condition images are noise."""
    w = args.width
    shape = {
        "block_out_channels": [w, 2 * w, 4 * w, 4 * w],
        "attention_head_dim": [max(w * k // 64, 1) for k in (1, 2, 4, 4)],
        "use_linear_projection": True, "cross_attention_dim": 1024,
    }  # fmt: skip
    settings = config.defaults("codi")
    settings.update(batch_size=args.batch, dtype=args.dtype, remat=bool(args.remat))
    teacher = models.init(shape, 0, DDPM(), "v", False, jnp.dtype(args.dtype), args.remat)
    rng, size = np.random.default_rng(0), args.size
    text = {"encoder_hidden_states": rng.normal(size=(args.batch, 77, 1024)).astype("f")}
    batch = {"x0": rng.normal(size=(args.batch, size, size, 4)).astype("f"), "text": text, "null": text,
             "cond": rng.uniform(size=(args.batch, 8 * size, 8 * size, 3)).astype("f"),
             "index": np.arange(args.batch, dtype="i")}  # fmt: skip
    return config.resolve(settings), {"teacher": teacher, "autoencoder": Autoencoder()}, iter(lambda: batch, None)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("embedded", "sd"), default="embedded")
    parser.add_argument("--width", type=int, default=64, help="sd: channels of the first block (320 = SD)")
    parser.add_argument("--size", type=int, default=32, help="sd: height and width of the latents")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", nargs="?", const=True, default=False, choices=POLICIES, help="sd: a policy, or none")
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args()


def of_parts(student, batch, mesh, repeats: int) -> tuple[float, float]:
    """Seconds and FLOPs of the passes that a step must compute: one with gradients, one without."""
    t, z = jnp.array([500]), batch["x0"]
    eps = sharding.inside(mesh, lambda net, b: net(z, t, b["text"], b["cond"]).eps)  # with the step's attention kernels
    parts = jax.jit(jax.grad(lambda net, b: (eps(net, b) ** 2).mean())), jax.jit(eps)
    flops = sum(f.lower(student, batch).compile().cost_analysis()["flops"] for f in parts)
    return sum(seconds(lambda f=f: f(student, batch), repeats) for f in parts), flops


class Loops:
    """The step alone, in a loop with data and metrics, and as `cddistill.train` runs it, with every step timed."""

    def __init__(self, driver, state, frozen, batch, stream, turns, size: int):
        self.driver, self.state, self.frozen, self.batch, self.turns = driver, state, frozen, batch, turns
        self.on_devices, self.delayed, self.number = map(driver.put_batch, stream), log.Delayed(lambda: "none"), 0
        self.times = clock.Clock(pathlib.Path(tempfile.mkdtemp()), 0, time.monotonic(), size, writes=False)
        self.play = clock.Programs(driver.step, self.times, 1)

    def bare(self, n=1):
        """n steps on one batch; what the last one says."""
        for _ in range(n):
            self.state, values = self.driver.step(self.state, self.frozen, self.batch, tuple(self.turns))
        return values

    def turn(self, step, batch):
        """One step of a loop, by this function."""
        self.number += 1
        self.state, values = step(self.state, self.frozen, batch, active(self.turns, self.number))
        self.delayed.push(self.number, values)

    def loop(self, n):
        """n steps on data."""
        for _ in range(n):
            self.turn(self.driver.step, next(self.on_devices))
        return self.state

    def observed(self, n):
        """n steps on data, whose times are taken."""
        for _ in range(n):
            self.turn(self.play, self.times.next(self.on_devices))
        self.times.take(self.times.noted)
        return self.state

    def ratios(self, n, rounds=5):
        """(bare / loop, loop / observed), medians of rounds in turns, so that a slow machine slows all."""
        self.loop(2), self.observed(2)
        found = [[timed(lambda f=f: f(n)) for f in (self.bare, self.loop, self.observed)] for _ in range(rounds)]
        return [statistics.median(row[i] / row[i + 1] for row in found) for i in (0, 1)]


def main():
    """Measure and print."""
    args = arguments()
    experiment, frozen, stream = {"embedded": embedded, "sd": sd}[args.shape](args)
    method, optimizers = experiment.method, make_optimizers(experiment)
    turns, batch = method.turns(), next(stream)
    nets = jax.jit(method.init)(jax.random.key(0), frozen, batch)
    state = jax.jit(lambda nets: init_state(nets, turns, optimizers, method.ema()))(nets)
    step = functools.partial(train_step, turns=turns, optimizers=optimizers, ema=method.ema())

    mesh = sharding.make_mesh()
    driver = sharding.make_driver("jit", step, mesh, state)
    state, frozen, on_device = driver.put_state(state), driver.put_frozen(frozen), driver.put_batch(batch)
    start = time.perf_counter()
    compiled = driver.step.lower(state, frozen, on_device, tuple(turns)).compile()
    compile_s = time.perf_counter() - start
    flops, memory = compiled.cost_analysis()["flops"], compiled.memory_analysis()

    parts_s, parts_flops = of_parts(Adapted(nets["backbone"], nets["branch"]), on_device, mesh, args.repeats)
    loops = Loops(driver, state, frozen, on_device, stream, turns, args.batch)
    step_s = seconds(loops.bare, args.repeats)
    bare_over_loop, loop_over_observed = loops.ratios(args.repeats)
    peak = peak_flops(args.dtype, 4096 if jax.default_backend() == "cpu" else 16384) * jax.device_count()

    device, rate = f"{jax.device_count()} x {jax.devices()[0].device_kind}", flops / step_s
    print(f"{args.shape}, batch {args.batch}, {args.dtype}, {device}, median of {args.repeats}")
    print(f"compile           {compile_s:8.1f} s")
    print(f"step              {step_s * 1e3:8.1f} ms   {args.batch / step_s:.1f} images/s")
    print(f"temporaries       {memory.temp_size_in_bytes / 1e9:8.2f} GB")
    print(f"XLA's FLOPs       {flops / 1e9:8.1f} G    {rate / 1e9:.1f} GFLOP/s")
    print(f"share of peak     {rate / peak:8.1%}      of a matrix product's {peak / 1e9:.0f} GFLOP/s")
    print(f"step / its parts  {step_s / parts_s:8.3f}      (target: <= 1.15; FLOPs {flops / parts_flops:.3f})")
    print(f"loop / bare step  {bare_over_loop:8.3f}      of the throughput (target: >= 0.97)")
    print(f"observed / loop   {loop_over_observed:8.3f}      of the throughput, with the times of every step")


def timed(f):
    """Seconds until f's result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

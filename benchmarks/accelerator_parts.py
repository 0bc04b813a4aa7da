"""The parts of accelerator.py. Each runs in a process of its own and yields rows as they are measured."""

import concurrent.futures
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import shapes

PEAKS = {  # dense bfloat16 FLOP/s of one device, by words of its name; more words first
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}  # fmt: skip
ATTENTION = (  # queries = keys, heads and their width: Stable Diffusion 2.x's and 1.x's self-attention at 512 px
    (4096, 5, 64), (1024, 10, 64), (256, 20, 64), (64, 20, 64), (4096, 8, 40), (1024, 8, 80),
)  # fmt: skip
TINY_VAE = {
    "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip


class Given(NamedTuple):
    """What a part is given."""

    tiny: bool
    output: Path  # folder for what outlives the run
    began: float  # time.perf_counter() at the part's start
    seconds: float  # that it may take

    def setup(self, unet: str, batch: int, size: int = 64, **of_torch) -> shapes.Setup:
        """A published network in bfloat16, or a tiny one."""
        if self.tiny:
            return shapes.Setup(shapes.tiny_unet(unet), 4, batch, "float32", **of_torch)
        return shapes.Setup(shapes.unet(unet), size, batch, "bfloat16", **of_torch)

    def guess(self, batch: int, gb: float) -> int:
        """A batch for devices of 80 GB, scaled to this one's memory, as a power of two."""
        scaled = max(batch * gb / 80, 1)
        return 2 if self.tiny else max(p for p in (2**i for i in range(20)) if p <= scaled * 1.2)

    def timed(self, work: shapes.Work, images: int) -> dict:
        """Milliseconds of a unit (min, median, max of three rounds of about a second) after a warm-up, and images/s."""
        for _ in range(2):
            start = time.perf_counter()
            work.run()
            work.wait()
            one = time.perf_counter() - start
        number, rounds = 1 if self.tiny else max(1, min(50, int(1 / one))), []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(number):
                work.run()
            work.wait()
            rounds.append((time.perf_counter() - start) / number)
        median = statistics.median(rounds)
        return {"ms": [1e3 * min(rounds), 1e3 * median, 1e3 * max(rounds)], "images_per_s": images / median}


# ---- measuring


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None for unknown ones."""
    return next((rate for words, rate in PEAKS.items() if re.search(rf"\b{words}\b", kind)), None)


def out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory, in JAX's or PyTorch's words."""
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory"))


def largest(given: Given, batch: int, attempt: Callable[[int], Iterator[dict]]) -> Iterator[dict]:
    """The rows of attempt(batch) with half the batch as often as it is out of memory, and once more with a larger one
    if all rows say that it fits and there is time. Other errors are raised."""
    failed, done = 2**30, False
    while True:
        start, rows = time.perf_counter(), []
        try:
            for row in attempt(batch):
                rows.append(row)
                yield row
        except Exception as error:
            if not out_of_memory(error) or batch == 1:
                raise
            failed = batch
        if done:
            return
        done, tried = failed != batch, batch
        batch = min(*(row.get("fits", batch) for row in rows), failed // 2) if done else batch // 2
        if done and (batch <= tried or 2 * time.perf_counter() - start > given.began + given.seconds):
            return
        gc.collect()  # after the clause: the error held the arrays of its frames
        print(f"now a batch of {batch}, after {tried}", file=sys.stderr, flush=True)


def fitting(program, batch: int) -> int:
    """The power of two of images that a compiled program would have memory for, by its plan for `batch` of them."""
    plan, limit = program.memory_analysis(), memory("bytes_limit")
    if not limit or not plan.temp_size_in_bytes:
        return batch
    new = plan.output_size_in_bytes - plan.alias_size_in_bytes
    free = 0.95 * limit - memory("bytes_in_use") - new / 1e9
    return 2 ** int(math.log2(max(free / (plan.temp_size_in_bytes / 1e9 / batch), 1)))


def memory(what: str) -> float:
    """ "bytes_limit" or "peak_bytes_in_use" of JAX's first device in GB; 0 if it does not say."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get(what, 0) / 1e9


def rate(flops: float | None, seconds: float, dtype: str) -> dict:
    """TFLOP/s and model FLOPs utilisation, or why there is none."""
    import jax

    if flops is None:
        return {"mfu": None, "note": "no CPU backend, which counts FLOPs: leave JAX_PLATFORMS unset"}
    kind, found = jax.devices()[0].device_kind, {"flops": flops, "tflops": flops / seconds / 1e12}
    if dtype != "bfloat16" or (peak := peak_flops(kind)) is None:
        return found | {"mfu": None, "note": f"no MFU: the peak of {dtype} on {kind} is not in PEAKS"}
    return found | {"mfu": flops / seconds / peak}


# ---- (1) to (5): attention and train steps


def parity(given: Given) -> Iterator[dict]:
    """Fused attention against XLA's, out and gradients; the yardstick is XLA's in float32 at highest precision."""
    import jax
    import jax.numpy as jnp
    import jax_side
    import numpy as np

    from cddistill.models import attention

    kernels = {"loop": attention.loop, **attention.KERNELS}
    dtype = jnp.float32 if given.tiny else jnp.bfloat16
    for length, heads, width in ((256, 2, 8),) if given.tiny else ATTENTION:
        row = {"work": f"attention, {length} tokens, {heads} heads of {width}"}
        name = attention.kernel(jax.default_backend(), dtype, length, length, width)
        if name not in kernels:
            yield row | {"kernel": name, "note": f"XLA computes this shape on {jax.default_backend()}"}
            continue
        rng = np.random.default_rng(0)
        inputs = [jnp.asarray(rng.standard_normal((2, length, heads, width), "f"), dtype) for _ in range(4)]
        ours, plain = both_ways(kernels[name]), both_ways(attention.xla)
        with jax.default_matmul_precision("highest"):
            right = both_ways(attention.xla)(*(x.astype(jnp.float32) for x in inputs))
        off, usual = (errors(f(*inputs), right) for f in (ours, plain))
        ms = [given.timed(jax_side.calls(f, *inputs), 2)["ms"] for f in (ours, plain)]
        agrees = all(off[k] <= 2 * usual[k] + 1e-6 for k in off)  # which in float32 is that of another order of sums
        yield row | {"kernel": name, "off": off, "off_xla": usual, "agrees": agrees, "ms": ms[0], "ms_xla": ms[1]}


def both_ways(attend: Callable) -> Callable:
    """(q, k, v, g) -> its output and the gradients of q, k and v for the output's gradient g, compiled."""
    import jax

    def run(q, k, v, g):
        out, vjp = jax.vjp(attend, q, k, v)
        return {"out": out} | dict(zip(("dq", "dk", "dv"), vjp(g), strict=True))

    return jax.jit(run)


def errors(found: dict, right: dict) -> dict[str, float]:
    """The largest differences, in multiples of the largest value."""
    import jax.numpy as jnp

    size = lambda x: float(jnp.abs(x.astype(jnp.float32)).max())
    return {k: size(found[k].astype(jnp.float32) - right[k]) / size(right[k]) for k in right}


def turn_row(given: Given, parts, recipe: str, setup: shapes.Setup, play: tuple[str, ...]):
    """(row, the state after it) of one set of turns of a recipe."""
    import jax_side

    start = time.perf_counter()
    lowered = parts.driver.step.lower(parts.state, parts.frozen, parts.batch, play)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        counted = pool.submit(jax_side.flops, recipe, setup, play)  # while the compiler works
        program = lowered.compile()
        compile_s = time.perf_counter() - start
    fits, state, metrics = fitting(program, setup.batch), parts.state, None

    def run():
        nonlocal state, metrics
        state, metrics = program(state, parts.frozen, parts.batch)

    import jax

    run()
    jax.block_until_ready(state)
    first = time.perf_counter() - given.began
    row = {"work": f"{recipe}, {' + '.join(play)}", "batch": setup.batch, "compile_s": compile_s, "first_s": first}
    row["fits"] = fits
    row |= given.timed(shapes.Work(run, lambda: jax.block_until_ready((state, metrics))), setup.batch)
    row |= rate(counted.result(), row["ms"][1] / 1e3, setup.dtype) | {"peak_gb": memory("peak_bytes_in_use")}
    return row, state


def train_part(given: Given, recipe: str, unet: str, batch: int, size: int = 64, **options) -> Iterator[dict]:
    """A row for each turn of a recipe, at the largest batch that fits; batch is a guess for 80 GB, rather too small."""
    import jax_side

    def attempt(batch):
        setup = given.setup(unet, batch, size)
        parts = jax_side.training(recipe, setup, **options)
        for turn in parts.turns:
            row, state = turn_row(given, parts, recipe, setup, (turn,))
            parts = parts._replace(state=state)
            yield row | {"options": options}

    yield from largest(given, given.guess(batch, memory("bytes_limit")), attempt)


def dmd2(given: Given) -> Iterator[dict]:
    """DMD2's two turns, and the cycle that they make."""
    found = {}
    for row in train_part(given, "dmd2", "sd15", 4):
        yield row
        found.setdefault(row["batch"], {})[row["work"].split()[-1]] = row["ms"]
    batch, ms = [(batch, ms) for batch, ms in found.items() if len(ms) == 2][-1]  # at which both turns fit
    cycle = [shapes.RATIO * c + s for c, s in zip(ms["critic"], ms["student"], strict=True)]
    row = {"work": "dmd2, cycle", "batch": batch, "ms": cycle, "images_per_s": 1e3 * shapes.RATIO * batch / cycle[1]}
    yield row | {"note": f"sum of {shapes.RATIO} turns of the critic and one of the student"}


def torch_part(given: Given, name: str, unet: str, batch: int, images: int = 1, compile: bool = True):
    """The same work in PyTorch, channels last, with or without torch.compile."""
    import torch
    import torch_side

    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as JAX's default
    torch._dynamo.config.cache_size_limit = 64  # networks of one class share their number of compiled variants
    gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else 0

    def attempt(batch):
        device = {"device": "cuda" if cuda else "cpu", "channels_last": True, "compile": compile}
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        work = getattr(torch_side, name)(given.setup(unet, batch, **device))
        work.run()
        work.wait()
        row = {"work": f"PyTorch {name}", "batch": batch, "first_s": time.perf_counter() - given.began}
        row |= given.timed(work, images * batch) | {"options": {"channels_last": True, "torch.compile": compile}}
        yield row | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0}

    yield from largest(given, given.guess(batch, gb), attempt)


# ---- (6) sampling


def sample(given: Given) -> Iterator[dict]:
    """Images from noise by DDIM without guidance, and the VAE's decoder."""
    import jax_side

    for steps in (4, 1, 50):
        setup = given.setup("sd21", 2 if given.tiny else 8)
        start = time.perf_counter()
        work = jax_side.sampling_steps(setup, steps, TINY_VAE if given.tiny else shapes.VAE)
        work.run()
        work.wait()
        row = {"work": f"sampling in {steps} steps, VAE", "batch": setup.batch, "first_s": time.perf_counter() - start}
        yield row | given.timed(work, setup.batch) | {"peak_gb": memory("peak_bytes_in_use")}

"""Seconds and memory that models.load takes to load a teacher's folder, here of random weights.

    python benchmarks/load_teacher.py --gb=2 --dtype=float16 [--devices=8]

The reference, measured in the same run, is safetensors.numpy.load_file, which copies the file into memory and neither
converts nor transposes. Every load has its own process, with the file in the page cache. GB are of weights as float32,
which is what a run keeps. CPU seconds are for shared machines. Memory is the peak during the load above what the
process held before. Linux only.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from cddistill import build, models, sharding
from cddistill.models import convert
from cddistill.models.init import weight_shapes

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FEW, MANY = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4


def shapes_of(width):
    """(module, {path: shape}) of a UNet without attention, Stable Diffusion's at width 320."""
    widths = [width, 2 * width, 4 * width, 4 * width]
    config = {"block_out_channels": widths, "down_block_types": FEW, "up_block_types": MANY}
    module = convert.build(config | {"mid_block_type": "UNetMidBlock2D"})
    shapes = weight_shapes(module)
    return module, flax.traverse_util.flatten_dict(shapes)


def write_folder(folder: Path, gb: float, dtype) -> int:
    """Write a UNet of about this size; returns the bytes of its weights as float32."""
    size = sum(4 * x.size for x in shapes_of(320)[1].values())
    module, shapes = shapes_of(max(round(320 * (gb * 1e9 / size) ** 0.5 / 32), 1) * 32)
    noise = np.random.default_rng(0).normal(size=2**20)
    layouts = {convert.torch_name(p): convert.to_torch(p, np.empty(x.shape)).shape for p, x in shapes.items()}
    tensors = {name: np.resize(noise, shape).astype(dtype) for name, shape in layouts.items()}
    safetensors.numpy.save_file(tensors, folder / convert.TORCH_FILE)
    (folder / "config.json").write_text(json.dumps(module.to_config()))
    return sum(4 * x.size for x in tensors.values())


def ours(folder):
    """Load as a run does with config.fsdp = -1: large weights are sharded over the devices."""
    place = functools.partial(build.place, sharding.make_mesh(-1))
    return jax.block_until_ready(models.load(folder, place=place).params)


def reference(folder):
    """Load with safetensors alone."""
    return safetensors.numpy.load_file(folder / convert.TORCH_FILE)


def memory(key: str) -> int:
    """Bytes of memory of this process: VmRSS is the current value, VmHWM the peak since the last reset."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(load, folder) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak bytes above those held before) of one load."""
    weight_shapes(convert.build(convert.read_config(folder)))  # warm-up: what tracing does only once
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start, busy = time.perf_counter(), time.process_time()
    kept = load(folder)
    seconds, cpu, peak = time.perf_counter() - start, time.process_time() - busy, memory("VmHWM")
    del kept
    return seconds, cpu, peak - before


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="weights as float32")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1, help="number of simulated CPU devices")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"  # for the processes below
    with tempfile.TemporaryDirectory() as folder:
        size = write_folder(Path(folder), args.gb, DTYPES[args.dtype])
        pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
        runs = {load: [] for load in (reference, ours)}
        for _ in range(args.repeats):
            for load, results in runs.items():  # interleaved, so that a slow machine slows both
                results.append(pool.apply(measure, (load, Path(folder))))
        pool.close()
    print(f"{size / 1e9:.2f} GB of weights from {args.dtype} to {args.devices} device(s), median of {args.repeats}")
    medians = {load: [statistics.median(x) for x in zip(*results, strict=True)] for load, results in runs.items()}
    for load, (seconds, cpu, peak) in medians.items():
        rates = f"{seconds / size * 1e9:7.2f} s/GB {cpu / size * 1e9:7.2f} CPU s/GB"
        print(f"{load.__name__:10}{rates}   peak {peak / size:5.2f} of the weights")
    seconds, cpu, _ = (a / b for a, b in zip(medians[ours], medians[reference], strict=True))
    print(f"{'ratio':10}{seconds:7.2f}      {cpu:7.2f}            (aim: peak <= 1.3 of the weights)")


if __name__ == "__main__":
    main()

"""Ours against the same algorithm in PyTorch diffusers, in turns A B A B: the ratio of the times, memory, first step.

    python benchmarks/duel.py                             all, on a CPU at a fifth of the width of Stable Diffusion
    python benchmarks/duel.py unet8 dmd2 --repeats=9 --theirs eager
    python benchmarks/duel.py unet8 --width=320 --size=64 --batch=8 --dtype=bfloat16 --device=cuda --theirs compile

Needs torch and diffusers (extra dev). Each side is a process of its own; while one works, the others are stopped. All
have the same architecture (random weights), batch, optimiser (AdamW) and moving average. PyTorch runs as it is
(eager), in its other memory format (channels_last), and compiled in that format by torch.compile (compile).

unet8, unet64   a training step of Stable Diffusion 1.x's UNet (eight heads at each level) and of 2.x's (heads of 64)
dmd2            five turns of the critic and one of the student, guidance 1.75, GAN on the fake score's bottleneck
codi            one step of CoDi: ControlNet and UNet trained, noise consistency and signal (eq. 8)
sample50, 4, 1  DDIM without guidance, of 1.x's UNet
loader          random crops of 256 px from JPEG files of 512 x 640 px, PyTorch's with four workers; --images of them

The published code of the methods is not needed: `torch_side` writes them in PyTorch from the same equations, and
`jax_side` is ours.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import shapes

WORK = ("unet8", "unet64", "dmd2", "codi", "sample50", "sample4", "sample1", "loader")
VARIANTS = {  # of PyTorch: (channels_last, compile)
    "eager": (False, False), "channels_last": (True, False), "compile": (True, True),
}  # fmt: skip
OURS = "ours"


def work_of(args) -> shapes.Work:
    """The work of a side, as its module writes it."""
    side = importlib.import_module("jax_side" if args.side == OURS else "torch_side")
    if args.work == "loader":
        return side.loader(args.folder, args.images)
    common = {"cross_attention_dim": 768, "norm_num_groups": 16}
    config = shapes.unet("sd21" if args.work == "unet64" else "sd15", args.width, **common)
    setup = shapes.Setup(config, args.size, args.batch, args.dtype, args.device, *VARIANTS.get(args.side, ()))
    if args.work.startswith("sample"):
        return side.sampling_steps(setup, int(args.work.removeprefix("sample")))
    made = {"unet8": "unet_step", "unet64": "unet_step", "dmd2": "dmd2_cycle", "codi": "codi_step"}
    return getattr(side, made[args.work])(setup)


def serve(args):
    """A side's process: prints the seconds to its first result, then does one unit for each line that it reads."""
    began, answers = time.perf_counter(), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what the sides print is no answer
        run, wait = work_of(args)
        run()
        wait()
        print(time.perf_counter() - began, file=answers, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            run()
            wait()
            seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps([seconds, device_peak(args) or peak]), file=answers, flush=True)


def device_peak(args) -> float:
    """Most GB in use on an accelerator; 0 on a CPU."""
    if args.side != OURS:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30


@dataclasses.dataclass
class Side:
    """A process and what it has said."""

    process: subprocess.Popen
    first: float

    @classmethod
    def start(cls, side: str, work: str, flags: list[str]):
        """Start it, and wait for its first result."""
        # XLA would take three quarters of a GPU's memory at once
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, __file__, work, *flags, f"--side={side}"]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=env, start_new_session=True)
        if not (first := process.stdout.readline()):
            raise SystemExit(f"{side} ended in {work}; its error is above")
        os.killpg(process.pid, signal.SIGSTOP)
        return cls(process, float(first))

    def go(self) -> tuple[float, float]:
        """(seconds of one more unit, peak memory in GB)."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = tuple(json.loads(self.process.stdout.readline()))
        os.killpg(self.process.pid, signal.SIGSTOP)  # its threads, too: a loader would go on reading ahead
        return found

    def stop(self) -> None:
        """End it."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def duel(work: str, args, flags: list[str]) -> list[dict]:
    """All sides in turns, after a warm-up: a row of the table for each variant of PyTorch."""
    names = [OURS, *(args.theirs if work != "loader" else ["eager"])]
    sides = [Side.start(side, work, flags) for side in names]
    for side in sides:
        side.go()
    times = [[side.go() for side in sides] for _ in range(args.repeats)]
    for side in sides:
        side.stop()
    rows = []
    for i, name in enumerate(names[1:], start=1):
        ratios = sorted(found[0][0] / found[i][0] for found in times)
        rows.append({
            "work": work, "theirs": name, "ratio": [ratios[0], statistics.median(ratios), ratios[-1]],
            "seconds": [statistics.median(found[k][0] for found in times) for k in (0, i)],
            "GB": [times[-1][k][1] for k in (0, i)], "first": [sides[k].first for k in (0, i)],
        })  # fmt: skip
    return rows


def make_images(folder: pathlib.Path, n: int) -> None:
    """JPEG files of 512 x 640 px of smooth noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "train").mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8))
        small.resize((640, 512), Image.BICUBIC).save(folder / "train" / f"{i}.jpg", quality=90)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)}; default: all")
    parser.add_argument("--width", type=int, default=64, help="channels of the first block (320 = Stable Diffusion)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of PyTorch; JAX takes what it finds")
    parser.add_argument("--theirs", nargs="+", default=[*VARIANTS], choices=VARIANTS, help="variants of PyTorch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", help="file to write, after every row")
    parser.add_argument("--side", choices=(OURS, *VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = "width", "size", "batch", "dtype", "device", "images"
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    if unknown := {*args.work} - {*WORK}:
        parser.error(f"unknown work {', '.join(unknown)}: known are {', '.join(WORK)}")
    if args.side:
        args.work = args.work[0]
        serve(args)
        return
    print(f"| work | PyTorch | {OURS} / theirs: min, median, max | seconds | peak, GB | first result, s |")
    print("|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for work in args.work or WORK:
            if work == "loader":
                make_images(pathlib.Path(folder), args.images)
            for row in duel(work, args, [*flags, f"--folder={folder}"]):
                print(line(row), flush=True)
                rows.append(row)
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps({"flags": flags, "rows": rows}, indent=1))


def line(row: dict) -> str:
    """A row of the table."""
    low, middle, high = row["ratio"]
    both = lambda name, digits: " / ".join(f"{x:.{digits}f}" for x in row[name])
    numbers = f"{low:.2f}, **{middle:.2f}**, {high:.2f} | {both('seconds', 3)} | {both('GB', 2)} | {both('first', 1)}"
    return f"| {row['work']} | {row['theirs']} | {numbers} |"


if __name__ == "__main__":
    main()

"""What an accelerator gives: one prepared run of a few minutes, most valuable part first.

    python benchmarks/accelerator.py --minutes=9                      all parts, as many as there is time for
    python benchmarks/accelerator.py dmd2 dmd2_torch pocket           these parts, in this order
    python benchmarks/accelerator.py --tiny --minutes=30              every part at toy size on a CPU

Each part is a process of its own, so one that fails, is out of memory or over its time costs only its own rows, and all
memory goes back. Rows are printed as they come and OUTPUT/accelerator.json is written again after each; rows of parts
that are not run now stay in it. Weights are random, networks have their published shapes, data are noise. The parts:

parity       fused attention against XLA's: how far output and gradients are off, in multiples of the largest value
unet         a training step of Stable Diffusion 2.1's UNet at 512 px in bfloat16, the largest batch that fits;
             _xla without fused attention, _remat with activations recomputed,
             _torch in PyTorch (bf16 autocast, channels_last, torch.compile, fused AdamW), _torch_eager not compiled
dmd2         the two turns at Stable Diffusion 1.5's size, and their cycle; _torch is the cycle in PyTorch
codi         a CoDi step of Stable Diffusion 2.1 at 512 px; pe_codi trains only the ControlNet
sdxl         DMD2's turns with LoRAs of SDXL at 1024 px, activations recomputed
sample       512 px images in 50, 4 and 1 steps, VAE included
pocket       the pocket teacher's training for the minutes that are left, its weights in OUTPUT/pocket; the same
             command resumes

Parts ending in _torch need torch and diffusers (extra dev). docs/performance.md explains the columns.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import accelerator_parts as parts
import shapes


class Part(NamedTuple):
    """One of the parts above."""

    seconds: float  # that it may take at most
    measure: Callable  # Given -> rows
    against: str = ""  # the part whose last row is the same work in JAX


def pocket(given) -> Iterator[dict]:
    """Training of the pocket teacher."""
    import accelerator_pocket

    return accelerator_pocket.pocket(given)


UNET = {"recipe": "unet", "unet": "sd21"}
UNET_TORCH = {"name": "unet_step", "unet": "sd21", "batch": 16}
DMD2_TORCH = {"name": "dmd2_cycle", "unet": "sd15", "batch": 8, "images": shapes.RATIO}
train, theirs = (functools.partial(functools.partial, f) for f in (parts.train_part, parts.torch_part))
PARTS = {  # the most valuable first; batches are guesses for 80 GB
    "parity": Part(60, parts.parity),
    "unet": Part(160, train(**UNET, batch=8)),
    "unet_torch": Part(130, theirs(**UNET_TORCH), "unet"),
    "dmd2": Part(220, parts.dmd2),
    "dmd2_torch": Part(220, theirs(**DMD2_TORCH), "dmd2"),
    "unet_xla": Part(130, train(**UNET, batch=4, flash=False)),
    "unet_remat": Part(130, train(**UNET, batch=16, remat=True)),
    "unet_torch_eager": Part(60, theirs(**UNET_TORCH, compile=False), "unet"),
    "pe_codi": Part(150, train(recipe="pe_codi", unet="sd21", batch=8)),
    "codi": Part(150, train(recipe="codi", unet="sd21", batch=4)),
    "sdxl": Part(240, train(recipe="sdxl_lora", unet="sdxl", batch=2, size=128, remat=True)),
    "sample": Part(150, parts.sample),
    "pocket": Part(float("inf"), pocket),
}
LEAST = 20  # seconds that must be left to start a part
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile


# ---- a part's process


def serve(args) -> None:
    """Import what is slow to import, wait for a line with the seconds that there are, then print a row a line."""
    answers, part = sys.stdout, PARTS[args.part]
    with contextlib.redirect_stdout(sys.stderr):  # what else is printed is no answer
        try:
            import_slow(args.part)
            seconds = float(sys.stdin.readline())
            given = parts.Given(args.tiny, pathlib.Path(args.output).resolve(), time.perf_counter(), seconds)
            for row in part.measure(given):
                print(json.dumps(row), file=answers, flush=True)
        except Exception as error:  # whatever it is costs only this part
            sys.excepthook(*sys.exc_info())
            said = str(error).strip().splitlines() or [""]
            print(json.dumps({"error": f"{type(error).__name__}: {said[0][:300]}"}), file=answers, flush=True)


def import_slow(name: str) -> None:
    """The modules that a part needs, but no device yet: the part before is still at work."""
    if name == "pocket":
        return
    if "torch" in name:
        import torch_side  # noqa: F401
    else:
        import jax_side  # noqa: F401


class Child:
    """The process of a part."""

    def __init__(self, name: str, args):
        command = [sys.executable, __file__, f"--part={name}", f"--output={args.output}", *["--tiny"] * args.tiny]
        self.process = subprocess.Popen(
            command, stdin=-1, stdout=-1, text=True, env=environment(args), start_new_session=True
        )

    def rows(self, seconds: float) -> Iterator[dict]:
        """Its rows, as they come; it is ended when the time is over."""
        lines, until = queue.Queue(), time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # it has ended; its status says so below
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        read = lambda: [lines.put(line) for line in itertools.chain(self.process.stdout, [None])]
        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                self.end()
                yield {"error": f"not ready after {seconds:.0f} s, and ended"}
                return
            if line is None:
                break
            yield json.loads(line)
        if self.process.wait():
            yield {"error": f"its process ended with status {self.process.returncode}; what it said is above"}

    def end(self) -> None:
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment(args) -> dict[str, str]:
    """JAX takes memory as it needs it, nearly all; with --tiny it runs on the CPU and compiles quickly."""
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"}
    found |= {"JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(args.output).resolve() / "programs")} | os.environ
    root = str(pathlib.Path(__file__).parents[1])
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    tiny = {
        "JAX_PLATFORMS": "cpu",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}",
    }
    return found | tiny if args.tiny else found


# ---- the run


def run(names: list[str], args, report: Callable[[str, dict], None]) -> None:
    """Measure these parts while there is time; report(part, row) is called for each row."""
    end, waiting = time.monotonic() + 60 * args.minutes, None
    try:
        for name, following in zip(names, [*names[1:], None], strict=True):
            child, waiting = waiting or Child(name, args), None
            left = end - time.monotonic()
            if left < LEAST:
                child.end()
                report(name, {"error": f"not run: {max(left, 0):.0f} s were left"})
                continue
            if following and left > LEAST:
                waiting = Child(following, args)
            for row in child.rows(left if args.tiny else min(PARTS[name].seconds, left)):
                report(name, row)
    finally:
        if waiting:
            waiting.end()


class Report:
    """Prints rows, and keeps them in a JSON file."""

    def __init__(self, file: pathlib.Path):
        self.file, self.new = file, set()
        self.rows = json.loads(file.read_text())["rows"] if file.exists() else []

    def add(self, part: str, row: dict) -> None:
        """Print a row and write the file; the part's rows of an earlier run go."""
        if part not in self.new:
            self.rows = [x for x in self.rows if x["part"] != part]
        self.new.add(part)
        row = {"part": part} | row | self.ratio(PARTS[part].against, row)
        self.rows.append(row)
        print(line(row), flush=True)
        found = {"versions": versions(), "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), "rows": self.rows}
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps(found, indent=1) + "\n")
        draft.replace(self.file)

    def ratio(self, ours: str, row: dict) -> dict:
        """Our time for an image over this row's."""
        rates = [x["images_per_s"] for x in self.rows if x["part"] == ours and "images_per_s" in x]
        return {"ours_over_theirs": row["images_per_s"] / rates[-1]} if rates and "images_per_s" in row else {}


def versions() -> dict[str, str]:
    """Of the installed packages that count."""
    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "diffusers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


HEAD = "| part | work | batch | ms: min, median, max | images/s | TFLOP/s | MFU | peak, GB | first result, s | |"


def line(row: dict) -> str:
    """A row of the table."""
    number = lambda key, form: format(row[key], form) if row.get(key) is not None else ""
    ms = ", ".join(f"{x:.4g}" for x in row.get("ms", ()))
    worst = lambda key: f"{max(row[key].values()):.1e}"
    said = [row.get("error")]
    if "agrees" in row:
        said += [
            f"agrees: {row['agrees']}, off by {worst('off')}, XLA by {worst('off_xla')} in {row['ms_xla'][1]:.4g} ms"
        ]
    said += [f"ours / theirs {row['ours_over_theirs']:.2f}"] if "ours_over_theirs" in row else []
    said += [row.get("note"), f"{row['seconds']:.0f} s" if "seconds" in row else ""]
    cells = [
        row["part"], row.get("work", ""), number("batch", "d"), ms, number("images_per_s", ".4g"),
        number("tflops", ".4g"), number("mfu", ".1%"), number("peak_gb", ".1f"), number("first_s", ".0f"),
        "; ".join(filter(None, said)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=9, help="that all may take together")
    parser.add_argument("--output", default="runs/accelerator", help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return serve(args)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: known are {', '.join(PARTS)}")
    if args.minutes * 60 < LEAST:
        parser.error(f"--minutes={args.minutes:g} is less than the {LEAST} s that a part needs")
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    report = Report(output / "accelerator.json")
    print(f"{HEAD}\n{'|---' * 10}|", flush=True)
    return run(args.parts or [*PARTS], args, report.add)


if __name__ == "__main__":
    main()

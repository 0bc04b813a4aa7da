"""Training of the pocket teacher for a part of accelerator.py, by the package's own commands. As a program:

    python benchmarks/accelerator_pocket.py runs/pocket_latents [--teacher=pocket] [--scenes=10000]

encodes its data; drawing the scenes takes minutes, so all cores do it.
"""

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from cddistill.data.sources import scenes
from cddistill.data.splits import SPLITS

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs/teacher_pocket.py'}"
EXPORT = 100  # seconds that stopping and exporting may take
FIELDS = {  # of the config; ours. The rate is constant, so that a run may go on for as long as there is time
    "steps": 10**7, "batch_size": 256, "optim.lr": 5e-4, "optim.warmup": 200, "report": False, "log_every": 50,
    "eval_every": 10**8, "checkpoint_every": 2000,
}  # fmt: skip
TINY = {"steps": 4, "batch_size": 8, "log_every": 1}
KEPT = ("image", "caption", "label")


def draw(seed, size: int, training: bool) -> dict:
    """What training needs of a scene."""
    found = scenes.scene(seed, size, training)
    return {key: found[key] for key in KEPT}


@contextlib.contextmanager
def drawn(size: int):
    """In this context the package finds all scenes drawn."""
    wanted = [((k, i), size, k == 0) for k, split in enumerate(SPLITS) for i in range(scenes.COUNTS[split])]
    with multiprocessing.get_context("spawn").Pool() as pool:
        found = dict(zip(wanted, pool.starmap(draw, wanted, chunksize=50), strict=True))
    original, scenes.scene = scenes.scene, lambda *seed: found[seed]
    yield
    scenes.scene = original


def encode(args) -> None:
    """Write latents and token ids."""
    import runpy

    from cddistill import commands

    config = runpy.run_path(CONFIG.removeprefix("--config="))["get_config"]("encode")
    config.teacher, config.batch_size = args.teacher, 250
    if args.scenes:
        scenes.COUNTS.update(dict.fromkeys(SPLITS, args.scenes))
        config.batch_size, config.data.mixture = args.scenes, ("scenes",)
    with drawn(config.data.size):
        commands.encode_data(config, pathlib.Path(args.output))


def pocket(given, teacher: str = "pocket") -> Iterator[dict]:
    """Train as long as there is time, resuming what given.output holds; the weights go to its folder pocket."""
    latents, run, exported = (given.output / name for name in ("pocket_latents", "pocket_run", "pocket"))
    clock = lambda: time.perf_counter() - given.began
    if not (latents / "complete").exists():
        command = [sys.executable, __file__, str(latents), f"--teacher={teacher}", *["--scenes=16"] * given.tiny]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (latents / "complete").touch()
        yield {"work": "pocket, draw and encode the data", "seconds": clock()}
    if given.seconds - clock() < 2 * EXPORT:
        raise RuntimeError(
            f"{given.seconds - clock():.0f} s are left, and training needs {2 * EXPORT}: give more --minutes"
        )
    fields = FIELDS | {"teacher": teacher, "data.path": latents} | (TINY if given.tiny else {})
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "cddistill.main", CONFIG, f"--workdir={run}", *flags]
    began, before = clock(), steps_of(run / "metrics.jsonl")
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    try:
        process.wait(given.seconds - EXPORT - clock())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves a checkpoint
    if process.wait():
        raise RuntimeError(f"training ended with status {process.returncode}; its error is above")
    yield progress(run / "metrics.jsonl", before, fields["batch_size"]) | {"seconds": clock() - began}
    shutil.rmtree(exported, ignore_errors=True)
    subprocess.run([*command, "--mode=export", f"--output={exported}"], cwd=ROOT, check=True, stdout=sys.stderr)
    yield {"work": "pocket, export", "seconds": clock(), "note": f"weights are in {exported}"}


def records(metrics: pathlib.Path) -> list[dict]:
    """The records of training in a run's log."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [found for text in lines if "student/loss" in (found := json.loads(text))]


def steps_of(metrics: pathlib.Path) -> int:
    """Steps in a run's log."""
    return max((record["step"] for record in records(metrics)), default=0)


def progress(metrics: pathlib.Path, before: int, batch: int) -> dict:
    """Steps, last loss, and images/s between the first and the last record after step `before`."""
    found = [record for record in records(metrics) if record["step"] > before]
    if len(found) < 2:
        raise RuntimeError(f"{metrics} has {len(found)} new records, too few for a rate: give more --minutes")
    first, last = found[0], found[-1]
    images = (last["step"] - first["step"]) * batch
    row = {"work": "pocket, training", "batch": batch, "steps": last["step"], "loss": last["student/loss"]}
    row["note"] = f"step {last['step']}, loss {last['student/loss']:.4f}"
    return row | {"images_per_s": images / max(last["time"] - first["time"], 1e-9)}


def main():
    """Encode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--teacher", default="pocket", help="whose VAE and tokenizer are used")
    parser.add_argument("--scenes", type=int, help="so many scenes of each split alone, for tests")
    encode(parser.parse_args())


if __name__ == "__main__":
    main()

"""kill -9 at random moments, 120 in all, and full disks: every mode ends with what an undisturbed command writes.

Takes about 18 minutes on two idle cores. The mode "buckets" is encode with data.buckets.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from cddistill import checkpoint, commands, config, train
from cddistill.build import build

pytestmark = pytest.mark.slow

KILLS = 20  # of each mode


def settings(teacher, pictures, mode):
    """CoDi super-resolution of 8 px emoji; encoding: of 64 px pictures with the embedded pipeline."""
    c = config.defaults("dmd2" if mode == "pairs" else "codi")
    c.update(teacher=str(teacher), steps=30, batch_size=8, log_every=1, checkpoint_every=1, eval_every=10)
    c.update(eval_images=16, sample_steps=(2,))
    c.data.size = 8
    if mode == "pairs":
        c.update(num_pairs=200, pairs_shard=8, teacher_steps=(20,), teacher_guidance=1.5)
        return c
    c.data.update(task="sr", scale=2)
    if mode in ("encode", "buckets"):
        c.update(teacher="pocket", batch_size=2, encode_shard=5)
        c.data.update(source="folder", path=str(pictures), size=64)
        c.data.buckets = "64x64,96x64" if mode == "buckets" else ""
    return c


def work(mode, teacher, pictures, folder, run):
    """What a child does, after saying that it begins."""
    c, folder = settings(teacher, pictures, mode), pathlib.Path(folder)
    print("begins", flush=True)
    match mode:
        case "train":
            train.train(c, folder)
        case "encode" | "buckets":
            commands.encode_data(c, folder)
        case "pairs":
            commands.make_pairs(c, folder)
        case "evaluate":
            commands.evaluate_run(c, pathlib.Path(run))
        case "export":
            commands.export_run(c, pathlib.Path(run), str(folder))


def child(*arguments):
    """A process that has begun to work."""
    script = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_kills; "
    script += f"test_kills.work(*{[str(x) for x in arguments]!r})"
    return started(script, arguments[3])


def started(script, folder):
    """A process of this script that has begun to work in a folder."""
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    folder = pathlib.Path(folder)
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=log, stderr=log)
    while "begins\n" not in said_in(folder) and process.poll() is None:
        time.sleep(0.02)
    return process


def said_in(folder):
    """What the last child that worked in this folder printed."""
    return folder.with_name(f"{folder.name}.log").read_text()


def done(folder, process):
    """Its seconds until it ended well."""
    start = time.monotonic()
    assert process.wait() == 0, said_in(folder)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 noisy pictures with captions, every third of them wide."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, n in (("train", 32), ("validation", 8), ("test", 8)):
        (folder / split).mkdir()
        for i in range(n):
            width = 64 if i % 3 else 96
            Image.fromarray(rng.integers(0, 256, (64, width, 3), np.uint8)).save(folder / split / f"{i}.png")
            (folder / split / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture(scope="module")
def run(teacher, pictures, tmp_path_factory):
    """A finished run's workdir."""
    workdir = tmp_path_factory.mktemp("run")
    done(workdir, child("train", teacher, pictures, workdir, workdir))
    return workdir


def contents(folder):
    """The bytes of every file below a folder that is not hidden."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not ("/" + name).count("/.")}


def result(mode, c, folder, run):
    """What must not depend on kills: the state and the records of a training run, and otherwise whole files."""
    if mode == "evaluate":
        return (run / "scores.json").read_bytes()
    if mode != "train":
        return contents(folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], r["student/loss"]) for r in records if "student/loss" in r]
    saved = checkpoint.Checkpoints(folder / "checkpoints", read_only=True)
    state = saved.restore(build(config.resolve(c)).abstract)
    saved.close()
    return losses, [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("mode", ["train", "encode", "buckets", "pairs", "evaluate", "export"])
def test_after_kills_the_same_command_ends_with_the_same_result(mode, teacher, pictures, run, tmp_path):
    """Whatever a killed command leaves, it is not in the way of the next; what has its final name is whole."""
    c, moment = settings(teacher, pictures, mode), random.Random(mode)
    begin = lambda folder: child(mode, teacher, pictures, folder, run)
    done(tmp_path / "first", begin(tmp_path / "first"))  # which also fills the compilation cache
    seconds, kills, k = done(tmp_path / "whole", begin(tmp_path / "whole")), 0, 0
    expected, folder = result(mode, c, tmp_path / "whole", run), tmp_path / "0"
    while kills < KILLS:
        process = begin(folder)
        try:
            finished = process.wait(timeout=moment.uniform(0.0, seconds)) == 0
            assert finished, said_in(folder)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            finished = mode == "export" and contents(folder) != {}
        if mode == "evaluate":
            assert (run / "report.html").read_text().rstrip().endswith("</html>")
        if finished or mode == "evaluate":
            assert result(mode, c, folder, run) == expected
        if finished:  # the next kills are of another command
            k, folder = k + 1, tmp_path / str(k + 1)
    done(folder, begin(folder))
    assert result(mode, c, folder, run) == expected
    if mode == "buckets":
        assert {path.parent.name for path in (folder / "train").glob("*/0*.safetensors")} == {"64x64", "96x64"}
    if mode != "evaluate":
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []  # no drafts, no lock


@pytest.mark.parametrize("mode", ["encode", "buckets", "pairs", "evaluate", "export"])
def test_on_a_full_disk_the_file_is_named_and_once_there_is_room_the_command_succeeds(
    mode, teacher, pictures, run, tmp_path, larger_disk
):
    """Training on one: test_trust.py."""
    c, copy = settings(teacher, pictures, mode), shutil.copytree(run, larger_disk / "run")
    begin = lambda folder, run: work(mode, teacher, pictures, folder, run)
    begin(tmp_path / "whole", run)
    if mode == "evaluate":
        (copy / "scores.json").unlink()
    with contextlib.suppress(OSError), (larger_disk / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(larger_disk / "filling", (larger_disk / "filling").stat().st_size - 8192)
    with pytest.raises((OSError, ValueError), match="No space left on device") as refused:
        begin(larger_disk / "out", copy)
    assert f"{larger_disk}/" in str(refused.value)
    assert mode != "evaluate" or not (copy / "scores.json").exists() or json.loads((copy / "scores.json").read_text())
    assert mode != "export" or contents(larger_disk / "out") == {}
    (larger_disk / "filling").unlink()
    begin(larger_disk / "out", copy)
    assert result(mode, c, larger_disk / "out", copy) == result(mode, c, tmp_path / "whole", run)

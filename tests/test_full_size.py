"""Stable Diffusion 1.5 at full size on a CPU: loaded, compared with PyTorch, encoding, sampling, one training step.

Each stage is a process of its own, with the memory that a user's has. Weights are random (full_size.py), so images show
nothing: they are finite, in range and not constant. Needed are 15 GB of memory, 10 GB of disk and half an hour on two
cores: `pytest -n0 -m slow -s tests/test_full_size.py`. FULL_SIZE=FOLDER keeps the files there, so that one stage can
run again.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from cddistill import data

pytestmark = pytest.mark.slow
HERE = pathlib.Path(__file__).parent
MOST = 22  # GB of memory that a stage may take
INPAINT = "configs/ccd_inpaint.py:sd15"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the pipeline, sd15, and images."""
    folder = pathlib.Path(os.environ.get("FULL_SIZE") or tmp_path_factory.mktemp("full"))
    folder.mkdir(exist_ok=True)
    for what, name, last in (("make", "sd15", "model_index.json"), ("images", "images", "test/d.txt")):
        if not (folder / name / last).is_file():
            run(folder, what, HERE / "full_size.py", what, folder / name)
    return folder


def run(folder, name, *arguments):
    """Run Python with these arguments, print what it took, and check the memory. Returns what the process printed."""
    report = folder / f"{name}.json"
    command = [sys.executable, HERE / "full_size.py", "measure", report, sys.executable, *arguments]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(HERE.parent)}  # one device, optimised, as a user's
    done = subprocess.run(list(map(str, command)), cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    took = types.SimpleNamespace(**json.loads(report.read_text()))
    print(f"\n{name}: {took.seconds:.0f} s, {took.cpu_seconds:.0f} CPU-s, peak {took.peak_gb:.1f} GB\n{done.stdout}")
    assert took.peak_gb < MOST
    return done.stdout


def mode(folder, name, config, *options):
    """Run a mode of the command line with the full-size teacher, computing in float32."""
    options = (f"--config={config}", f"--config.teacher={folder / 'sd15'}", "--config.dtype=float32", *options)
    return run(folder, name, "-m", "cddistill.main", f"--mode={name}", *options)


def test_the_unet_equals_pytorchs(place):
    """Of the largest number of the output; both load the same float16 weights and compute in float32."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    for what in ("ours", "theirs"):
        run(place, what, HERE / "full_size.py", what, place / "sd15", place / f"{what}.npy")
    ours, theirs = (np.load(place / f"{what}.npy") for what in ("ours", "theirs"))
    assert ours.shape == theirs.shape == (1, 64, 64, 4)
    assert 0.1 < theirs.std() < 10  # that of a network whose every layer counts
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"error {error:.1e}")
    assert error < 1e-4


@pytest.fixture(scope="module")
def latents(place):
    """A folder with the four images encoded."""
    images, output = place / "images", place / "latents"
    mode(place, "encode", INPAINT, f"--config.data.path={images}", "--config.batch_size=1", f"--output={output}")
    return output


def test_encode(latents):
    rows = []
    for split, n in (("train", 2), ("validation", 1), ("test", 1)):
        found = data.load(data.configure(source="arrays", path=str(latents), task="inpaint", size=512), split)
        assert len(found) == n
        rows += [found.item(i, np.random.default_rng(0)) for i in range(n)]
    for row in rows:
        assert row["x0"].shape == (64, 64, 4)
        assert row["cond"].shape[:2] == (512, 512)
        assert row["text"]["encoder_hidden_states"].shape == (77, 768)
        for x in (row["x0"], row["text"]["encoder_hidden_states"]):
            assert np.isfinite(x).all()
            assert 1e-2 < x.std() < 10
    latents = np.stack([row["x0"] for row in rows])
    assert len({row["caption"] for row in rows}) == 4
    assert latents.std(0).max() > 1e-2  # images differ


def test_sample(place):
    output = place / "sample.png"
    output.unlink(missing_ok=True)
    options = ("--prompt=a red house", "--config.sample_steps=4,", f"--output={output}", f"--workdir={place / 'none'}")
    mode(place, "sample", "configs/pretrained.py", *options)
    image = np.asarray(Image.open(output))
    assert image.shape == (512, 512, 3)
    assert image.std() > 1  # of 255


def test_one_step_of_pe_codi(place, latents):
    workdir = place / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    small = {"batch_size": 1, "steps": 1, "log_every": 1, "report": False, "log": "none", "optim.warmup": 0}
    small |= {"optim.state_dtype": "int8", "data.source": "arrays", "data.path": latents}
    options = (*(f"--config.{key}={value}" for key, value in small.items()), f"--workdir={workdir}")
    mode(place, "train", INPAINT, *options)
    (found,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    print(found)
    assert 0 < found["student/loss"] < 100
    assert 0 < found["student/grad_norm"] < np.inf
    assert (workdir / "checkpoints" / "1").is_dir()

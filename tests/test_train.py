"""The whole program on a UNet of a few thousand weights: train, stop, resume, evaluate, sample, export, refuse."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from cddistill import checkpoint, commands, config, models, train
from cddistill.build import build

pytestmark = pytest.mark.usefixtures("two_devices")

ROOT = pathlib.Path(__file__).parents[1]


def settings(teacher, method="codi", **changes):
    """CoDi super-resolution of 4 px to 8 px emoji, or a smaller method without a condition."""
    c = config.defaults(method)
    c.update(teacher=str(teacher), steps=6, batch_size=8, log_every=2, checkpoint_every=2, eval_every=3, eval_images=16)
    c.update(sample_steps=(1, 2))
    c.data.size = 8
    if method == "codi":
        c.data.update(task="sr", scale=2)
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """A finished run's workdir."""
    workdir = tmp_path_factory.mktemp("run")
    train.train(settings(teacher, profile=(3, 4)), workdir)
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(workdir, step, teacher, **changes):
    """All leaves of a checkpoint."""
    parts = build(config.resolve(settings(teacher, **changes)))
    saved = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True).restore(parts.abstract, step)
    return [np.asarray(x) for x in jax.tree.leaves(saved)]


def test_a_run_writes_config_metrics_checkpoints_samples_and_report(run):
    assert json.loads((run / "config.json").read_text())["method"]["name"] == "codi"
    steps = [r["step"] for r in records(run) if "student/loss" in r]
    assert steps == [2, 4, 6]
    assert {"student/consistency", "student/signal", "student/grad_norm"} <= set(records(run)[0])
    assert any("val/psnr" in r for r in records(run))
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} >= {"4", "6"}
    assert Image.open(run / "samples" / "000006.png").size[0] > 100
    report = (run / "report.html").read_text()
    for word in ("bicubic", "student, 1 step", "student, 2 steps", "PSNR", "±", "time per step", "(goodput)"):
        assert word in report


def test_a_run_says_where_its_time_went(run):
    for record in (r for r in records(run) if "student/loss" in r):
        assert record["time/step_ms"] > 0.0
        assert record["time/images_per_s"] > 0.0
        assert 0.0 <= record["time/data_wait"] <= 1.0
        assert 0.0 < record["time/goodput"] < 1.0
        assert "time/mfu" not in record  # the peak of a CPU is not known
    known = json.loads((run / "goodput.json").read_text())
    assert (known["from_step"], known["step"], known["steps"]) == (0, 6, 6)
    assert all(known["seconds"][kind] > 0.0 for kind in ("step", "start", "compile", "evaluation", "checkpoint"))


def test_a_profile_of_the_steps_asked_for_is_written(run):
    (trace,) = run.glob("profile/plugins/profile/*/*.xplane.pb")
    found = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in found.planes for line in plane.lines for event in line.events]
    assert {dict(event.stats)["step_num"] for event in events if event.name == "train"} == {3, 4}


def test_resuming_is_bit_exact(run, teacher, tmp_path):
    """Killed after four steps and started again by the same command, a run of six is the same, also in its metrics.
    More steps than were planned at first: test_extension.py."""
    again = tiny.until(4, run, tmp_path / "run")
    train.train(settings(teacher, report=False), again)
    for a, b in zip(weights(run, 6, teacher), weights(again, 6, teacher), strict=True):
        np.testing.assert_array_equal(a, b)
    keep = lambda workdir: [
        {k: v for k, v in r.items() if not k.startswith("time")} for r in records(workdir) if "student/loss" in r
    ]
    assert keep(run) == keep(again)


@pytest.mark.slow
def test_resuming_under_another_layout_is_exact_to_rounding(run, teacher, tmp_path):
    """Started under jit, resumed under pmap."""
    again = tiny.until(4, run, tmp_path / "run")
    train.train(settings(teacher, report=False, parallel="pmap"), again)
    for a, b in zip(weights(run, 6, teacher), weights(again, 6, teacher), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)  # Adam's first steps are lr = 1e-4 whatever the gradient's size


def test_resuming_with_another_config_is_refused(run, teacher):
    with pytest.raises(ValueError, match=r"batch_size: 8 in the workdir, 16 now"):
        train.train(settings(teacher, batch_size=16), run)


def test_evaluate_sample_and_export_of_a_finished_run(run, teacher, tmp_path):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    commands.evaluate_run(settings(teacher), run)
    assert (run / "report.html").read_text().count("<td") == before.count("<td")
    Image.new("RGB", (40, 50), (200, 30, 30)).save(tmp_path / "in.png")
    commands.sample(settings(teacher), run, str(tmp_path / "in.png"), str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (8, 8)
    commands.export_run(settings(teacher), run, str(tmp_path / "student"))
    state = checkpoint.Checkpoints(run / "checkpoints", read_only=True).restore_weights(
        build(config.resolve(settings(teacher))).abstract
    )
    for name, subfolder in (("backbone", "unet"), ("branch", "controlnet")):
        back = models.load(tmp_path / "student", subfolder=subfolder)
        for a, b in zip(jax.tree.leaves(state.ema[name].params), jax.tree.leaves(back.params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)  # float16


def test_the_python_example_in_the_readme_runs(run, tmp_path, monkeypatch, capsys):
    """The unchanged lines of README.md, with this run as runs/ccd_sr."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ccd_sr").symlink_to(run)
    Image.new("RGB", (20, 30), (200, 30, 30)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec((ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0], scope)
    assert scope["images"].shape == (1, 8, 8, 3)
    assert capsys.readouterr().out.startswith("Denoiser(UNet2DConditionModel, 3.1 M weights")


def test_a_non_finite_loss_stops_the_run(teacher, tmp_path):
    bad = settings(teacher, "diffusion", report=False)
    bad.optim.update(lr=1e30, clip=0.0)
    with pytest.raises(FloatingPointError, match=r"student/\w+ is (nan|inf) at step \d+; last good checkpoint"):
        train.train(bad, tmp_path)


def test_bad_input_is_refused_before_the_first_step(teacher, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        (settings(teacher, batch_size=12), "not divisible by 8 devices"),
        (settings(tmp_path / "nowhere"), "nowhere"),
        (settings(empty), "config.json is missing"),
    ]
    for bad, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            train.train(bad, tmp_path / "run")
    folder = settings(teacher)
    folder.data.update(source="folder", path=str(empty))
    with pytest.raises(ValueError, match="empty"):
        train.train(folder, tmp_path / "run")
    (empty / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        train.train(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be written"):
        train.train(settings(teacher), tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="holds no run"):
        commands.evaluate_run(settings(teacher), tmp_path / "never")
    assert not (tmp_path / "run" / "config.json").exists()


def command(teacher, workdir):
    """A training run in a process of its own, with ten thousand steps to go."""
    script = f"""
import sys, pathlib
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_train
from cddistill import train
settings = test_train.settings({str(teacher)!r}, "diffusion", steps=10_000, checkpoint_every=5, eval_every=100_000)
sys.exit(train.train(settings, pathlib.Path({str(workdir)!r})))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    return subprocess.Popen([sys.executable, "-c", script], env=env, stdout=-1, stderr=-2, text=True)


def wait_for_checkpoint(process, workdir):
    """Fails if the process ends first."""
    while process.poll() is None:
        if any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*")):
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0])


def test_sigterm_leaves_a_complete_checkpoint(teacher, tmp_path):
    """Of the last step, and status 143, which is no success. What SIGKILL leaves: test_kills.py."""
    process = command(teacher, tmp_path)
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 143, out
    assert "the same command resumes" in out
    stopped = int(out.split("stopped at step ")[1].split(";")[0])
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    assert len(weights(tmp_path, None, teacher, method="diffusion")) > 10
    lines = [r["step"] for r in records(tmp_path)]
    assert lines == sorted(lines)

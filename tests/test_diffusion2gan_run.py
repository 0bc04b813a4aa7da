"""Diffusion2GAN end to end: pairs, training, report, resume and export."""

import json

import jax
import numpy as np
import pytest
import tiny

from cddistill import commands, config, data, health, models, train

pytestmark = [pytest.mark.usefixtures("two_devices"), pytest.mark.slow]  # the path is that of test_dmd2_run


@pytest.fixture(scope="module")
def pairs(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    commands.make_pairs(settings(teacher, ""), folder)
    return folder


def settings(teacher, pairs, method=(), **changes):
    """A student of a class-conditional teacher, on 8 px emoji."""
    c = config.defaults("diffusion2gan")
    c.update(teacher=str(teacher), steps=6, batch_size=8, log_every=2, checkpoint_every=1, eval_every=3, eval_images=16)
    c.update(keep=6, sample_steps=(1,), teacher_steps=(3,), teacher_guidance=1.5, num_pairs=24, pairs_shard=16)
    options = {"regression": "teacher", "warmup": 2, "r1_every": 1, "ema_decay": 0.9}
    c.method.update(**options | dict(method))
    c.data.update(size=8, pairs=str(pairs))
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def run(teacher, pairs, tmp_path_factory):
    """A finished run's workdir."""
    workdir = tmp_path_factory.mktemp("run")
    train.train(settings(teacher, pairs), workdir)
    return workdir


def test_run_writes_metrics_scores_and_report(run):
    first, *rest = health.read(run / "metrics.jsonl")
    assert not any(name.startswith("critic/") for name in first)  # the warm-up
    logged = {name for record in rest for name in record}
    for name in ("critic/gan", "critic/r1", "critic/real_accuracy", "critic/generated_accuracy", "student/regression",
                 "student/gan", "student/l2", "val/diversity"):  # fmt: skip
        assert name in logged
    scores = json.loads((run / "scores.json").read_text())
    assert [*scores] == ["teacher, 3 steps", "student, 1 step"]
    assert np.isfinite(scores["student, 1 step"]["metrics"]["PSNR to the teacher"][0])
    assert "to the teacher" in (run / "report.html").read_text()


@pytest.mark.slow
def test_resuming_is_bit_exact(run, teacher, pairs, tmp_path):
    """Resumed from step 1, within the warm-up, against the uninterrupted run of six steps."""
    again = tiny.until(1, run, tmp_path / "run")
    train.train(settings(teacher, pairs, report=False), again)
    for a, b in zip(*(jax.tree.leaves(tiny.newest(w, settings(teacher, pairs))) for w in (run, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_export_writes_a_diffusers_folder(run, teacher, pairs, tmp_path, capsys):
    commands.export_run(settings(teacher, pairs), run, str(tmp_path / "out"))
    assert float(capsys.readouterr().out.split("at most ")[1].split()[0]) < 2e-2
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["_timesteps"]) == ("LCMScheduler", [999])
    student = tiny.newest(run, settings(teacher, pairs)).ema["student"]
    for a, b in zip(*map(jax.tree.leaves, (models.load(tmp_path / "out").params, student.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_mismatched_pairs_are_those_of_the_next_row(teacher, pairs):
    """Also where the next row is on another host."""
    c = config.resolve(settings(teacher, pairs)).data
    whole = next(data.batches(c, batch_size=8, seed=0))
    half = next(data.batches(c, batch_size=8, seed=0, rows=slice(4, 8)))
    for name in ("noise", "x0"):
        np.testing.assert_array_equal(whole["others"][name], np.roll(whole["pairs"][name], -1, 0))
        np.testing.assert_array_equal(half["others"][name], whole["others"][name][4:])


def test_bad_settings_are_refused_before_training(teacher, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"make them with --mode=pairs, and set data\.pairs"):
        train.train(settings(teacher, ""), tmp_path)
    with pytest.raises(ValueError, match=r"there is no manifest\.json"):
        train.train(settings(teacher, tmp_path / "none"), tmp_path)
    metric = {"regression": "latent_lpips", "family": "sd15"}
    with pytest.raises(ValueError, match=r"needs method\.metric: a file"):
        train.train(settings(teacher, pairs, metric), tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.pth is missing: download"):
        train.train(settings(teacher, pairs, metric | {"metric": "nowhere.pth"}), tmp_path)
    with pytest.raises(ValueError, match="in one step, not 4"):
        train.train(settings(teacher, pairs, sample_steps=(4,)), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()

"""DMD2 end to end: training, report, resume, export; pairs, warm-up and a second stage."""

import contextlib
import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from cddistill import commands, config, models, sampling, train
from cddistill.build import build
from cddistill.method import normal
from cddistill.models import lora
from cddistill.models.schedulers import read_sampling

pytestmark = pytest.mark.usefixtures("one_device")


def settings(teacher, method=(), **changes):
    """A two-step student of a class-conditional teacher, on 8 px emoji."""
    c = config.defaults("dmd2")
    c.update(teacher=str(teacher), steps=6, batch_size=8, log_every=2, checkpoint_every=3, eval_every=3, eval_images=16)
    c.update(sample_steps=(1, 2), teacher_steps=(3,), teacher_guidance=1.5)
    c.method.update(student_timesteps=(999, 499), ratio=2, real_guidance=1.5, ema_decay=0.9, **dict(method))
    c.data.update(size=8)
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """A finished run's workdir."""
    workdir = tmp_path_factory.mktemp("run")
    train.train(settings(teacher), workdir)
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_run_writes_metrics_scores_and_report(run):
    logged = {name for record in records(run) for name in record}
    for name in ("critic/denoising", "critic/eps_error", "critic/real_accuracy", "critic/sample_mean", "critic/moved",
                 "student/dm", "student/gan", "student/gan_share", "student/moved", "val/diversity"):  # fmt: skip
        assert name in logged
    scores = json.loads((run / "scores.json").read_text())
    assert [*scores] == ["teacher, 3 steps", "student, 1 step", "student, 2 steps"]
    assert (scores["teacher, 3 steps"]["nfe"], scores["student, 2 steps"]["nfe"]) == (6, 2)
    report = (run / "report.html").read_text()
    assert "Health: " in report
    assert "to the teacher" in report


@pytest.mark.slow
def test_resuming_is_bit_exact(run, teacher, tmp_path):
    """Both optimisers, resumed from step 3, against the uninterrupted run of six steps."""
    again = tiny.until(3, run, tmp_path / "run")
    train.train(settings(teacher, report=False), again)
    for a, b in zip(*(jax.tree.leaves(tiny.newest(w, settings(teacher))) for w in (run, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def exported(run, teacher, tmp_path_factory):
    """(folder of the exported student, what the command printed)."""
    out, said = tmp_path_factory.mktemp("exported") / "out", io.StringIO()
    with contextlib.redirect_stdout(said):
        commands.export_run(settings(teacher), run, str(out))
    return out, said.getvalue()


@pytest.mark.slow
def test_export_writes_a_diffusers_folder(run, teacher, exported):
    out, said = exported
    assert float(said.split("at most ")[1].split()[0]) < 2e-2
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["_timesteps"]) == ("LCMScheduler", [999, 499])
    assert "guidance_scale=1.0" in (out / "README.md").read_text()
    student = tiny.newest(run, settings(teacher)).ema["student"]
    for a, b in zip(*map(jax.tree.leaves, (models.load(out).params, student.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.slow
def test_exported_student_generates_the_same_images(run, teacher, exported):
    """As `pretrained` samples it: LCM's boundary condition, absent in DMD2, is negligible at these timesteps."""
    how = read_sampling(exported[0] / "scheduler" / "scheduler_config.json")
    parts = build(config.resolve(settings(teacher)))
    student, method = tiny.newest(run, settings(teacher)).ema["student"], parts.experiment.method
    batch, noise, key = tiny.make_batch(size=4), tiny.randn(0, 4, 8, 8, 3), jax.random.key(3)
    fresh = lambda i: normal(jax.random.fold_in(key, i), batch["index"], (8, 8, 3))
    n = SimpleNamespace(teacher=parts.frozen["teacher"], student_ema=student)
    ours = jax.jit(lambda: method.sample(n, noise, batch, tiny.step_noise(noise, key), 2))()
    denoise = lambda z, t: student(z, t, batch["text"])
    np.testing.assert_allclose(
        ours, jax.jit(lambda: sampling.sample(how, denoise, student.schedule, noise, 2, fresh))(), atol=1e-4
    )


def test_unsupported_step_counts_are_refused_before_training(teacher, tmp_path):
    with pytest.raises(ValueError, match="cannot be sampled in 4 steps"):
        train.train(settings(teacher, sample_steps=(1, 4)), tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        train.train(settings(teacher, sample_steps=(0,)), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_lora_student_is_merged_on_export(teacher, tmp_path):
    method = {"student_lora": "blocks", "fake_lora": "blocks", "lora_rank": 2, "gan_weight": 0.0}
    c = settings(teacher, method, steps=1, report=False)
    train.train(c, tmp_path / "run")
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    student = tiny.newest(tmp_path / "run", c).ema["student"]
    assert isinstance(student.apply, lora.Update)
    merged = jax.tree.leaves(student(models.load(teacher).params))
    for a, b in zip(jax.tree.leaves(models.load(tmp_path / "out").params), merged, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.fixture(scope="module")
def pairs(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    commands.make_pairs(settings(teacher, num_pairs=20), folder)
    return folder


WARM = {"dm_weight": 0.0, "gan_weight": 0.0, "regression_weight": 1.0, "regression": "l2"}


@pytest.mark.slow
def test_regression_warm_up_initialises_a_second_run(pairs, teacher, tmp_path):
    """Regression trains only the student; the second run starts from it, with a new fake and disc."""
    warm = settings(teacher, WARM, steps=40, report=False)
    warm.update(eval_every=100, checkpoint_every=40)
    warm.method.ratio = 1
    warm.optim.lr = 1e-3
    with pytest.raises(ValueError, match="needs data.pairs"):
        train.train(warm, tmp_path / "warm")
    warm.data.pairs = str(pairs)
    train.train(warm, tmp_path / "warm")
    losses = [r["student/regression"] for r in records(tmp_path / "warm") if "student/regression" in r]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    state = tiny.newest(tmp_path / "warm", warm)
    assert {*state.nets} == {"student"}
    second = settings(teacher, steps=1, report=False, init_from_run=str(tmp_path / "warm"))
    second.optim.lr = 0.0
    train.train(second, tmp_path / "second")
    for part in ("nets", "ema"):
        got = getattr(tiny.newest(tmp_path / "second", second), part)["student"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, state.nets["student"])
    second.init_from_run = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no run"):
        train.train(second, tmp_path / "third")


@pytest.mark.slow
def test_training_without_a_gan_needs_no_images(teacher, tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        np.save(tmp_path / "texts" / split / "class_labels.npy", np.arange(16) % 9)
    c = settings(teacher, {"gan_weight": 0.0}, steps=1, eval_every=1)
    c.data.update(source="arrays", path=str(tmp_path / "texts"))
    with pytest.raises(ValueError, match=r"text and data\.x0_shape, as in \(64, 64, 4\)"):
        train.train(c, tmp_path / "run")
    c.data.x0_shape = (8, 8, 3)
    train.train(c, tmp_path / "run")
    assert not any(name.startswith("critic/real") for record in records(tmp_path / "run") for name in record)
    metrics = json.loads((tmp_path / "run" / "scores.json").read_text())["student, 2 steps"]["metrics"]
    assert metrics
    assert all(name.endswith(" to the teacher") for name in metrics)
    c.method.gan_weight = 0.1
    with pytest.raises(ValueError, match=r"needs real images, and the data are prompts only.*gan_weight=0"):
        train.train(c, tmp_path / "gan")

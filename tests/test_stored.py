"""Stored images of a baseline: found if nothing has changed, and those that would be generated."""

import jax
import numpy as np
import pytest
import tiny
from test_config import load

from cddistill import config, data, generate, sharding
from cddistill.build import build
from cddistill.evals import compare, stored
from cddistill.methods import UNTRAINED

pytestmark = pytest.mark.usefixtures("one_device")


def student(seed=0, **options):
    nets = {"teacher": tiny.teacher(seed=seed), "controlnet": tiny.teacher(seed=2)}
    return generate.Student(UNTRAINED(**options), sharding.make_mesh(), nets, {}, {})


def test_images_are_found_until_something_changes(tmp_path):
    batch = tiny.make_batch(size=4) | {"x0": np.zeros((4, 8, 8, 3), np.float32)}
    del batch["pairs"], batch["others"]
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype("f")
    assert stored.find(tmp_path, student(), batch, 50, 0) is None
    stored.write(tmp_path, student(), batch, 50, 0, images)
    np.testing.assert_allclose(stored.find(tmp_path, student(), batch, 50, 0), images, atol=1e-5)
    np.testing.assert_array_equal(
        stored.find(tmp_path, student(), batch | {"cond": batch["cond"] + 1e-7}, 50, 0),
        stored.find(tmp_path, student(), batch, 50, 0),
    )
    others = [
        (student(), batch, 50, 1),
        (student(seed=1), batch, 50, 0),
        (student(guidance=2.0), batch, 50, 0),
        (student(), batch | {"cond": batch["cond"][::-1]}, 50, 0),
        (student(), batch | {"text": {"class_labels": batch["text"]["class_labels"][::-1]}}, 50, 0),
        (student(), jax.tree.map(lambda x: x[:2], batch), 50, 0),
    ]
    assert [stored.find(tmp_path, *other) for other in others] == [None] * len(others)
    assert stored.find(tmp_path, student(), batch, 4, 0) is None


@pytest.fixture(scope="module")
def first_command():
    """(folder, baseline, batch, steps, seed, task) of the job in the README."""
    settings = load("ccd_sr")
    settings.batch_size = 8  # of training; there are eight devices
    experiment = config.resolve(settings)
    parts, run = build(experiment, {"test": "the baseline is sampled on it"}), experiment.run
    batch = generate.batch_of(parts, data.examples(experiment.data, "test", run.eval_images))
    steps = max(run.baseline_steps)
    return (
        compare.baseline_folder(run),
        compare.load_baseline(parts)(steps),
        batch,
        steps,
        run.seed,
        experiment.data.task,
    )


def test_the_first_command_finds_the_shipped_images(first_command):
    """If this fails, write them again: benchmarks/store_baseline.py."""
    *where, _ = first_command
    assert stored.find(*where).shape == (192, 32, 32, 3)


@pytest.mark.slow
def test_the_shipped_images_are_those_that_would_be_generated(first_command):
    folder, baseline, batch, steps, seed, task = first_command
    rows = jax.tree.map(lambda x: x[:4], batch)
    images = generate.sample(baseline, rows, steps, seed, task=task)
    np.testing.assert_allclose(stored.find(*first_command[:-1])[:4], images, atol=2 / 255)

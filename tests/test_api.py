"""The Python interface: load a folder, sample, and errors in one sentence."""

import subprocess
import sys

import numpy as np
import pytest

import cddistill
from cddistill import generate, models

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def model(teacher):
    return cddistill.load(teacher)


def test_importing_the_package_does_not_import_jax():
    """The command line parses its flags before JAX is imported."""
    script = "import sys, cddistill; print(cddistill.__version__, 'jax' in sys.modules, dir(cddistill)[0])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == [cddistill.__version__, "False", "METHODS"]


def test_samples_are_reproducible_and_follow_the_folders_scheduler(model, teacher):
    images = cddistill.sample(model, label=[0, 3], steps=2, seed=1)
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), np.float32)
    assert images.min() >= 0
    assert images.max() <= 1
    np.testing.assert_array_equal(images, cddistill.sample(model, label=(0, 3), steps=2, seed=1))
    assert np.abs(images - cddistill.sample(model, label=[0, 3], steps=2, seed=2)).max() > 1e-3
    assert np.abs(images - cddistill.sample(model, label=[0, 3], steps=2, seed=1, guidance=3.0)).max() > 1e-3
    np.testing.assert_allclose(cddistill.sample(model, n=2, steps=2)[0], cddistill.sample(model, steps=2)[0], atol=1e-5)
    net = models.load(teacher)
    noise = generate.noises(1, np.arange(2), (8, 8, 3), 1)[:, 0]
    t = net.schedule.grid(1)
    expected = net(noise, t, {"class_labels": np.array([0, 3])}).x0 * 0.5 + 0.5
    once = cddistill.sample(model, label=[0, 3], steps=1, seed=1)
    np.testing.assert_allclose(once, np.clip(expected, 0, 1), atol=1e-5)


def test_a_model_prints_on_one_line(model):
    assert repr(model).endswith("Pretrained, 8x8x3, 50 steps)")
    assert "\n" not in repr(model)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "a cat"}, "has no text encoder, so it takes no prompt"),
        ({"label": 10}, "labels of .* are 0 to 8, not"),
        ({"label": [1, 2], "n": 3}, "label has 2 entries for 3 images: give one, or as many"),
    ],
)
def test_unsupported_inputs_are_refused(model, given, said):
    with pytest.raises(ValueError, match=said):
        cddistill.sample(model, steps=1, **given)


def test_loading_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is neither a folder nor an embedded model"):
        cddistill.load("nothing")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        cddistill.load(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'train_all'"):
        _ = cddistill.train_all

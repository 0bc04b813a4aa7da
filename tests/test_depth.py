"""Depth to image: normalised inverse depth, and a person's depth maps."""

import numpy as np
import pytest
from PIL import Image

from cddistill import data
from cddistill.data.tasks.depth import Depth
from cddistill.net import Autoencoder

RAMP = np.linspace(10, 250, 16 * 16).reshape(16, 16)  # near at the end


def test_the_nearest_pixel_is_white_and_the_farthest_black():
    depth = np.array([[1.0, 2.0], [4.0, 4.0]])
    cond = Depth().condition({"depth": depth}, None)
    np.testing.assert_allclose(cond[..., 0], [[1, 1 / 3], [0, 0]], atol=1e-6)
    assert cond.shape == (2, 2, 3)
    assert cond.dtype == np.float32


def test_scenes_have_depth_and_it_is_exact():
    config = data.configure(source="scenes", task="depth", size=32, num_classes=24)
    batch = data.examples(config, "test", 2)
    inverse = 1 / data.load(config, "test").source.element(0, None)["depth"]
    expected = (inverse - inverse.min()) / (inverse.max() - inverse.min())
    np.testing.assert_allclose(batch["cond"][0, ..., 0], expected, atol=1e-6)


def stored(path, values):
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "values", "options"),
    [
        ("a.png", np.uint8(RAMP), {}),
        ("b.png", np.uint16(RAMP * 200), {}),
        ("c.npy", np.float32(RAMP), {}),
        ("d.npy", 1 / RAMP, {"depth_files": "metres"}),
        ("e.png", np.repeat(np.uint8(RAMP)[..., None], 3, -1), {}),
    ],
)
def test_depth_maps_are_read(tmp_path, name, values, options):
    cond = Depth(**options).read(stored(tmp_path / name, values), 16)
    np.testing.assert_allclose(cond[..., 0], (RAMP - 10) / 240, atol=1 / 240)


@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        (np.full((16, 16), 3.0), {}, "a.npy is constant"),
        (np.where(RAMP < 20, np.nan, RAMP), {}, "a.npy holds NaN or infinite values"),
        (RAMP - 20, {"depth_files": "metres"}, "a.npy holds distances of 0 or less"),
        (RAMP.reshape(8, 16, 2), {}, r"a.npy is float64 \(8, 16, 2\); expected a depth map of one channel"),
        (RAMP + np.array([[[0]], [[1]], [[2]]]), {}, "expected a depth map of one channel"),
    ],
)
def test_bad_depth_maps_are_refused(tmp_path, values, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Depth(**options).read(stored(tmp_path / "a.npy", values), 16)


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="a.png cannot be read"):
        Depth().read(tmp_path / "a.png", 16)


def test_data_without_depth_are_refused():
    with pytest.raises(ValueError, match="data.task depth needs a depth map for every image"):
        data.examples(data.configure(task="depth"), "test", 1)
    with pytest.raises(ValueError, match="data.depth_files must be one of inverse, metres, not 'cm'"):
        data.configure(task="depth", depth_files="cm")


def test_latent_conditions_span_minus_one_to_one():
    cond = np.random.default_rng(0).uniform(0.2, 0.7, (2, 16, 16, 3)).astype(np.float32)
    latents = np.asarray(Depth().encode(Autoencoder(), cond))
    assert latents.shape == (2, 16, 16, 1)
    np.testing.assert_allclose([latents.min((1, 2, 3)), latents.max((1, 2, 3))], [[-1, -1], [1, 1]], atol=1e-5)

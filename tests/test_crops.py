"""Crops of images at their own resolution, and of all images of an element alike."""

import json

import numpy as np
import pytest
from PIL import Image

from cddistill import data
from cddistill.data import images
from cddistill.data.sources import folder as source_file

SIZE = 16


def noise(seed, width, height):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def configured(root, task="none", **changes):
    settings = {"source": "folder", "path": str(root), "split": "all", "crop": "random", "flip": False}
    return data.configure(**settings | {"task": task, "size": SIZE, "num_classes": 1} | changes)


def drawn(config, n=20, split="train"):
    dataset = data.load(config, split)
    return [dataset.item(i % len(dataset), np.random.default_rng(i)) for i in range(n)]


def pixels(item, key="x0"):
    return np.rint((item[key] + 1) * 127.5 if key == "x0" else item[key] * 255).astype(np.uint8)


def place(crop, image):
    """(left, top) of a crop in an image; None if it is no crop of it."""
    windows = np.lib.stride_tricks.sliding_window_view(image, crop.shape[:2], (0, 1))  # [y, x, c, h, w]
    found = np.argwhere((windows == crop.transpose(2, 0, 1)).all((2, 3, 4)))
    return tuple(found[0][::-1]) if len(found) else None


def test_training_sees_random_crops_at_full_resolution(tmp_path):
    image = noise(0, 40, 24)
    Image.fromarray(image).save(tmp_path / "a.png")
    places = [place(pixels(item), image) for item in drawn(configured(tmp_path))]
    assert None not in places
    assert len({*places}) > 15
    lefts, tops = zip(*places, strict=True)
    assert max(lefts) > 16
    assert min(lefts) < 8
    assert {*tops} <= {*range(9)}


def test_every_corner_is_reached(tmp_path):
    image = noise(0, 17, 17)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert {place(pixels(item), image) for item in drawn(configured(tmp_path))} == {(0, 0), (1, 0), (0, 1), (1, 1)}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_splits_have_the_crop_in_the_centre(tmp_path, split):
    image = noise(0, 40, 24)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert [place(pixels(item), image) for item in drawn(configured(tmp_path), 3, split)] == [(12, 4)] * 3


def test_a_crop_depends_on_the_row_and_the_seed_alone(tmp_path, monkeypatch):
    for i in range(3):
        Image.fromarray(noise(i, 40, 24)).save(tmp_path / f"{i}.png")
    first = drawn(configured(tmp_path), 6)
    monkeypatch.setattr(source_file, "CACHE_BYTES", 0)  # nothing is kept: the same again
    data.loader.open_source.cache_clear()
    again = drawn(configured(tmp_path), 6)[::-1]
    for a, b in zip(first, again[::-1], strict=True):
        np.testing.assert_array_equal(a["x0"], b["x0"])


def test_the_condition_of_super_resolution_is_of_the_crop(tmp_path):
    """A checkerboard of single pixels is grey at a quarter of the resolution, and resizing the image would lose it."""
    board = np.uint8(255 * (np.indices((64, 64)).sum(0) % 2))
    Image.fromarray(board).save(tmp_path / "a.png")
    (item,) = drawn(configured(tmp_path, "sr", scale=4), 1)
    assert {*np.unique(pixels(item))} == {0, 255}
    np.testing.assert_allclose(item["cond"], 0.5, atol=0.01)
    (resized,) = drawn(configured(tmp_path, "sr", scale=4, crop="resize"), 1)
    assert np.abs(resized["x0"]).max() < 0.2


def test_an_edit_is_cropped_as_its_image(tmp_path):
    images = {name: noise(i, 40, 24) for i, name in enumerate(("old", "new"))}
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    row = {"original_image": "old.png", "edited_image": "new.png", "edit_prompt": "turn it blue"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    for item in drawn(configured(tmp_path, "edit", flip=True), 10):
        sides = [(pixels(item, "cond"), pixels(item)), (pixels(item, "cond")[:, ::-1], pixels(item)[:, ::-1])]
        both = [(place(a, images["old"]), place(b, images["new"])) for a, b in sides]
        assert sorted(x is None for x, _ in both) == [False, True]  # mirrored or not
        assert all(x == y for x, y in both)


def depth(root, values):
    root.mkdir(exist_ok=True)
    Image.fromarray(noise(0, *values.shape[::-1])).save(root / "a.png")
    np.save(root / "a_depth.npy", values)


def test_a_depth_map_is_cropped_as_its_image_and_says_something(tmp_path):
    """Only 2 of 48 columns of the map differ from the rest: crops without them are drawn again."""
    values = np.zeros((16, 48))
    values[:, 23:25] = np.arange(32).reshape(16, 2) + 1
    depth(tmp_path, values)
    image = np.asarray(Image.open(tmp_path / "a.png"))
    for item in drawn(configured(tmp_path, "depth")):
        left, top = place(pixels(item), image)
        crop = values[top : top + SIZE, left : left + SIZE]
        np.testing.assert_allclose(item["cond"][..., 0], crop / crop.max(), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        (np.full((16, 48), 3.0), {}, "a.png: its depth map is constant"),
        (np.where(np.arange(48) == 47, np.nan, np.ones((16, 1))), {}, "a.png: its depth map holds NaN"),
        (np.arange(48) * np.ones((16, 1)), {"depth_files": "metres"}, "a.png: its depth map holds distances of 0"),
    ],
)
def test_maps_are_checked_as_a_whole_before_the_first_step(tmp_path, values, options, sentence):
    depth(tmp_path, values)
    with pytest.raises(ValueError, match=sentence):
        data.load(configured(tmp_path, "depth", **options))


@pytest.mark.parametrize("task", ["none", "depth"])
def test_images_that_are_too_small_are_named(tmp_path, task):
    depth(tmp_path, np.arange(15 * 30.0).reshape(15, 30))
    with pytest.raises(ValueError, match="a.png is 30 x 15 px, and data.size=16 is cropped: leave it out, or set data"):
        data.load(configured(tmp_path, task))
    assert len(data.load(configured(tmp_path, task, crop="resize"))) == 1


def test_a_large_photo_is_measured_by_its_own_size(tmp_path):
    """JPEGs are decoded at an eighth of their size for the check."""
    Image.fromarray(noise(0, 24, 20)).save(tmp_path / "a.jpg")
    assert drawn(configured(tmp_path), 1)[0]["x0"].shape == (SIZE, SIZE, 3)


def photo(width, height, turn=1):
    """A smooth picture in a JPEG file, and its EXIF tags."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    exif = Image.Exif()
    exif[0x0112] = turn
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)), exif


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize(("sides", "decoded"), [((200, 129), (25, 17)), ((200, 127), (50, 32)), ((31, 40), (31, 40))])
def test_a_draft_is_decoded_at_the_smallest_size_that_suffices(tmp_path, sides, decoded, turn):
    (image, exif), turned = photo(*sides, turn), turn > 4
    image.save(tmp_path / "a.jpg", exif=exif)
    read = images.read(tmp_path / "a.jpg", least=(SIZE, SIZE))
    assert read.size == (decoded[::-1] if turned else decoded)
    assert images.whole(read).sides == (sides[::-1] if turned else sides)
    draft, whole = (drawn(configured(tmp_path, crop=crop), 1)[0] for crop in ("draft", "resize"))
    np.testing.assert_allclose(draft["x0"], whole["x0"], atol=0.15)
    assert np.abs(draft["x0"] - whole["x0"]).mean() < 0.02


@pytest.mark.parametrize("height", [100, 101])
def test_a_draft_is_compared_with_other_images_by_the_sizes_of_their_files(tmp_path, height):
    image, _ = photo(200, 100)
    image.save(tmp_path / "a.jpg")
    photo(200, height)[0].save(tmp_path / "b.png")
    line = {"file_name": "a.jpg", "edited_file_name": "b.png", "instruction": "turn it"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    config = configured(tmp_path, "edit", crop="draft")
    if height == 100:
        assert drawn(config, 1)[0]["x0"].shape == (SIZE, SIZE, 3)
    else:
        with pytest.raises(ValueError, match="b.png is 200 x 101 px, but 200 x 100 is a.jpg"):
            drawn(config, 1)


def test_a_draft_has_the_place_of_its_file(tmp_path):
    photo(1001, 400)[0].save(tmp_path / "a.jpg")
    places = [data.load(configured(tmp_path, crop=crop), "train").source.element(0, None)["place"]
              for crop in ("draft", "resize")]  # fmt: skip
    assert places[0] == places[1]


def test_unknown_crops_are_refused():
    with pytest.raises(ValueError, match="data.crop='native' must be one of resize, draft, random"):
        data.configure(crop="native", source="folder")

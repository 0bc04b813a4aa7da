"""Folders of one's own edits (InstructPix2Pix's format) and depth maps."""

import json

import numpy as np
import pytest
from PIL import Image

from cddistill import data

RAMP = np.linspace(10, 250, 16 * 16).reshape(16, 16)  # near at the end


def picture(path, seed, size=(16, 16)):
    """Random pixels, written to a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels / np.float32(255)


def configured(root, task, **changes):
    return data.configure(source="folder", path=str(root), task=task, size=16, split="all", num_classes=1, **changes)


def edits(root, n=4, keys=("original_image", "edited_image", "edit_prompt"), size=(16, 16), **changes):
    """A folder of n edits with a metadata.jsonl; changes replace values of its last line. The pixels of both kinds."""
    pixels = [(picture(root / f"old/{i}.png", i), picture(root / f"new/{i}.png", 100 + i, size)) for i in range(n)]
    rows = [dict(zip(keys, (f"old/{i}.png", f"new/{i}.png", f"make it {i}"), strict=True)) for i in range(n)]
    rows[-1] = {key: x for key, x in (rows[-1] | changes).items() if x is not None}
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return pixels


@pytest.mark.parametrize(
    "keys",
    [
        ("original_image", "edited_image", "edit_prompt"),
        ("file_name", "edited", "instruction"),
        ("original_file_name", "edited_file_name", "Edit"),
    ],
)
def test_a_folder_of_edits_is_read(tmp_path, keys, capsys):
    """The edited image is the target, the original the condition, the instruction the text."""
    pixels = edits(tmp_path, keys=keys)
    batch = data.examples(configured(tmp_path, "edit"), "test")
    assert "4 images, no captions" in (said := capsys.readouterr().out)
    assert "4 edited images" in said
    order = [int(text.removeprefix("make it ")) for text in batch["caption"]]
    assert sorted(order) == [0, 1, 2, 3]
    for row, i in enumerate(order):
        np.testing.assert_allclose(batch["cond"][row], pixels[i][0], atol=1e-6)
        np.testing.assert_allclose(batch["x0"][row], pixels[i][1] * 2 - 1, atol=1e-6)


def test_edits_in_a_table_are_mirrored_together(tmp_path):
    pixels = edits(tmp_path, n=1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("original,edited,edit_prompt\nold/0.png,new/0.png,turn it blue\n")
    dataset = data.load(configured(tmp_path, "edit"), "train")
    items = [dataset.item(0, np.random.default_rng(k)) for k in range(8)]
    mirrored = [np.allclose(item["cond"], pixels[0][0][:, ::-1], atol=1e-6) for item in items]
    assert 0 < sum(mirrored) < 8
    for item, flip in zip(items, mirrored, strict=True):
        np.testing.assert_allclose(item["x0"], pixels[0][1][:, :: -1 if flip else 1] * 2 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"edited_image": "new/9.png"}, "line 4 of .*metadata.jsonl .*its edited file new/9.png does not exist"),
        ({"edited_image": None}, "old/3.png: data.task edit needs an edited image for every image, and here is none"),
        ({"edit_prompt": None}, "old/3.png: data.task edit needs an instruction for every image"),
        ({"edit_prompt": ["a"]}, r"line 4 of .*instruction is \['a'\]; write a text"),
        ({"size": (16, 12)}, "new/0.png is 16 x 12 px, but 16 x 16 is old/0.png: save both at one size"),
    ],
)
def test_edits_that_are_incomplete_are_refused_when_the_folder_is_opened(tmp_path, changes, sentence):
    edits(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence):
        data.load(configured(tmp_path, "edit"), "train")


def depths(root, values, name="{}_depth.png", n=3):
    """A folder of n images, each with these values as its depth map under the name."""
    for i in range(n):
        picture(root / f"{i}.png", i)
        path = root / name.format(i)
        np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path)


@pytest.mark.parametrize(
    ("name", "values", "options"),
    [
        ("{}_depth.png", np.uint16(RAMP * 200), {}),
        ("{}_depth.npy", 1 / RAMP, {"depth_files": "metres"}),
        ("map{}.png", np.uint8(RAMP), {}),
    ],
)
def test_depth_maps_lie_beside_the_images_or_are_named_in_the_metadata(tmp_path, name, values, options, capsys):
    depths(tmp_path, values, name)
    if "_depth" not in name:
        rows = [{"file_name": f"{i}.png", "text": "a", "depth": name.format(i)} for i in range(3)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = data.examples(configured(tmp_path, "depth", **options), "test")
    assert "3 depth maps" in capsys.readouterr().out
    assert batch["cond"].shape == (3, 16, 16, 3)
    np.testing.assert_allclose(batch["cond"][..., 0], np.stack([(RAMP - 10) / 240] * 3), atol=1 / 240)


@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        (np.full((16, 16), 3.0), {}, "0.png: its depth map is constant"),
        (np.where(RAMP < 20, np.nan, RAMP), {}, "0.png: its depth map holds NaN"),
        (RAMP - 20, {"depth_files": "metres"}, "0.png: its depth map holds distances of 0 or less"),
        (RAMP[:8], {}, "0_depth.npy is 16 x 8 px, but 16 x 16 is 0.png"),
    ],
)
def test_depth_maps_that_say_nothing_are_refused_when_the_folder_is_opened(tmp_path, values, options, sentence):
    depths(tmp_path, values, "{}_depth.npy")
    with pytest.raises(ValueError, match=sentence):
        data.load(configured(tmp_path, "depth", **options), "train")


def test_an_image_without_its_depth_map_is_named(tmp_path):
    depths(tmp_path, np.uint8(RAMP))
    (tmp_path / "1_depth.png").unlink()
    with pytest.raises(ValueError, match="1.png: data.task depth needs a depth map for every image"):
        data.load(configured(tmp_path, "depth"), "train")
    assert data.examples(configured(tmp_path, "depth", skip_bad=True), "train")["cond"].shape[0] == 3  # one twice

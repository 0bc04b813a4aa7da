"""SDXL's size conditions: each training image's own size before resizing and its crop, from the file to the network."""

import io

import jax
import numpy as np
import pytest
from golden import make_clip as golden
from PIL import Image
from test_clip import RECORDED
from test_crops import noise
from test_indexed import PICTURES, WRITERS
from test_prompt import recorded_prompts

from cddistill import build, checks, config, data, encoders, models
from cddistill.data import configure, shards
from cddistill.data.crops import Place, placed
from cddistill.data.encoded import EncodedItems
from cddistill.data.images import fit
from cddistill.models.prompt import time_ids
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline
from cddistill.precompute import encode, writing

SIZE = 16
UNET = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 0,
    "down_block_types": ["DownBlock2D"], "mid_block_type": "UNetMidBlock2D", "up_block_types": ["UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 2,
}  # fmt: skip


def of(root, **changes):
    settings = {"source": "folder", "path": str(root), "split": "all", "size": SIZE, "num_classes": 1}
    return configure(**settings | {"size_conditions": "own"} | changes)


def drawn(config, n=20, split="train"):
    dataset = data.load(config, split)
    return [dataset.item(i % len(dataset), np.random.default_rng(i)) for i in range(n)]


def pixels(item):
    return np.rint((item["x0"] + 1) * 127.5).astype(np.uint8)


# --- what the numbers are


def test_the_order_is_that_of_diffusers():
    """The recorded ids are those of diffusers' pipeline: original size, top and left of the crop, target size."""
    sizes = golden.SIZES
    place = Place(sizes["original_size"], (0, 0), sizes["crop"], sizes["target_size"])
    np.testing.assert_array_equal(place.time_ids(), RECORDED["sdxl/time_ids"].reshape(-1)[:6])
    np.testing.assert_array_equal(Place((1, 2), (0, 0), (3, 4), (5, 6)).time_ids(), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(time_ids(1, (5, 6), (1, 2), (3, 4))[0], [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("flip", [False, True])
def test_a_random_crop_says_where_it_lies(tmp_path, flip):
    """In the mirrored picture if it is mirrored, as if the picture had been mirrored first."""
    image = noise(0, 40, 24)
    Image.fromarray(image).save(tmp_path / "a.png")
    mirrored = []
    for item in drawn(of(tmp_path, crop="random", flip=flip)):
        height, width, top, left, *target = item["time_ids"].astype(int)
        assert (height, width, target) == (24, 40, [SIZE, SIZE])
        window = np.s_[top : top + SIZE, left : left + SIZE]
        plain, turned = ((picture[window] == pixels(item)).all() for picture in (image, image[:, ::-1]))
        assert plain != turned
        mirrored.append(turned)
    assert {*mirrored} == {False, flip}


@pytest.mark.parametrize(("width", "height", "resized"), [(41, 24, (16, 27)), (24, 50, (33, 16)), (16, 16, (16, 16))])
def test_a_resized_picture_keeps_its_size_and_its_crop(tmp_path, width, height, resized):
    image = noise(0, width, height)
    Image.fromarray(image).save(tmp_path / "a.png")
    top, left = (resized[0] - SIZE) // 2, (resized[1] - SIZE) // 2
    plain, turned = [height, width, top, left, SIZE, SIZE], [height, width, top, resized[1] - SIZE - left, SIZE, SIZE]
    for item in drawn(of(tmp_path), 8):
        is_plain = (pixels(item) == fit(Image.fromarray(image), SIZE)).all()
        assert item["time_ids"].tolist() == (plain if is_plain else turned)
    assert placed((width, height), SIZE).resized == resized
    assert placed((64, 32), (8, 32)).corner == (4, 0)  # covers 32 x 8 px at 32 x 16


def test_the_size_is_that_of_the_upright_picture(tmp_path):
    image = Image.fromarray(noise(0, 40, 24))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    (item,) = drawn(of(tmp_path, flip=False), 1)
    assert item["time_ids"].tolist() == [40, 24, 5, 0, SIZE, SIZE]


@pytest.mark.parametrize("source", WRITERS)
def test_shards_know_sizes(tmp_path, source, monkeypatch):
    """Pictures of 8 x 10 px."""
    monkeypatch.setenv("HOME", str(tmp_path))
    WRITERS[source](tmp_path, "a", range(2))
    for crop, corner in (("resize", [1, 0]), ("random", None)):
        settings = of(tmp_path, source=source, size=8, num_classes=9, crop=crop, flip=False)
        for item in drawn(settings, 4):
            *_, top, left, height, width = item["time_ids"].astype(int)
            assert item["time_ids"][:2].tolist() == [10, 8]
            assert corner in (None, [top, left])
            picture = np.asarray(Image.open(io.BytesIO(PICTURES[int(item["caption"][-1])])))
            assert crop == "resize" or (pixels(item) == picture[top : top + 8, left : left + 8]).all()


def test_only_training_rows_have_their_own_and_only_if_asked(tmp_path):
    Image.fromarray(noise(0, 40, 24)).save(tmp_path / "a.png")
    for split in ("validation", "test"):
        assert "time_ids" not in drawn(of(tmp_path), 1, split)[0]
    assert "time_ids" not in drawn(of(tmp_path, size_conditions="full"), 1)[0]
    kept = data.examples(of(tmp_path), "train")  # as in the first pass of --mode=encode: not augmented
    assert kept["time_ids"].tolist() == [[24, 40, 0, 5, SIZE, SIZE]]


# --- where they go


@pytest.fixture
def rows(tmp_path):
    """(settings, two training rows of random crops, captions as recorded)."""
    for i, caption in enumerate(golden.PROMPTS[:2]):
        Image.fromarray(noise(i, 40, 24)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    settings = of(tmp_path, crop="random")
    return settings, next(data.batches(settings, batch_size=2, seed=0, prepare=dict))


def encoders_of(name="sdxl", **changes):
    """The encoders of a recorded pipeline's prompts, for images as they are."""
    teacher, c = Pipeline("made up"), config.defaults("diffusion")  # it is not read
    vars(teacher).update(autoencoder=Autoencoder(), prompts=recorded_prompts(name))
    c.data.update(size=SIZE, source="folder", **changes)
    return encoders.make(config.resolve(c), teacher), encoders.networks(teacher)


def test_a_crops_offset_arrives_in_the_network(rows):
    """In the text and in the null text; the network's output depends on it."""
    _, batch = rows
    encoder, nets = encoders_of(size_conditions="own")
    tokens = encoder.tokenized(batch)
    given = encoders.inputs(tokens)
    made = encoders.joined(tokens, jax.jit(encoder)(nets, given))
    for name in ("text", "null"):
        np.testing.assert_array_equal(made[name]["added_cond_kwargs"]["time_ids"], batch["time_ids"])
    assert np.ptp(batch["time_ids"], 0)[2:4].any()
    assert "time_ids" not in made
    added = made["text"]["added_cond_kwargs"]
    unet = models.init(UNET | {
        "projection_class_embeddings_input_dim": 12 + added["text_embeds"].shape[-1],
    }, 0, zero_out=False)  # fmt: skip
    predict = jax.jit(lambda text: unet(batch["x0"], np.array([500, 500]), text).x0)
    other = batch["time_ids"] + np.float32([0, 0, 3, 0, 0, 0])
    moved = made["text"] | {"added_cond_kwargs": added | {"time_ids": other}}
    assert np.abs(predict(made["text"]) - predict(moved)).max() > 1e-5


def test_without_them_all_images_are_whole(rows):
    _, batch = rows
    encoder, nets = encoders_of(size_conditions="full")
    given = {name: x for name, x in encoders.inputs(encoder.tokenized(batch)).items() if name != "time_ids"}
    made = jax.jit(encoder)(nets, given | {"x0": np.zeros((2, SIZE, 2 * SIZE, 3), np.float32)})  # of one of the buckets
    for name in ("text", "null"):
        ids = made[name]["added_cond_kwargs"]["time_ids"]
        np.testing.assert_array_equal(ids, [[SIZE, 2 * SIZE, 0, 0, SIZE, 2 * SIZE]] * 2)


def test_encoded_rows_keep_them(rows, tmp_path):
    """In float32, though the rest is float16; the null text of a row has the row's."""
    settings, _ = rows
    encoder, nets = encoders_of(size_conditions="own")
    dataset, folder = data.load(settings, "train"), tmp_path / "out"
    item = lambda i: dataset.item(i, np.random.default_rng([0, i]))
    manifest = {"format": shards.FORMAT, "rows": 2, "shard": 2, "made_by": "", "seed": 0, "fingerprints": {}}
    null = {name: x[0] for name, x in shards.flatten_text(jax.device_get(dict(encoder.null))).items()}
    how = encode.How(encode.program_of(encoder, nets, 8), 8, 1, np.dtype(np.float16), null)
    encode.write_split(folder, manifest, item, how)
    stored = EncodedItems(folder, settings)
    for i in range(2):
        for name in ("text", "null"):
            found = stored.item(i)[name]["added_cond_kwargs"]["time_ids"]
            np.testing.assert_array_equal(found, item(i)["time_ids"])


def test_a_folder_of_a_version_without_these_options_is_continued():
    manifest = {"data": {"path": "a", "size": 8, "size_conditions": "full", "buckets": ""}, "rows": 2}
    old = {"data": {"path": "a", "size": 8}, "rows": 2}
    assert writing.with_new_options(old, manifest) == manifest
    other = {"data": manifest["data"] | {"size_conditions": "own"}, "rows": 2}
    assert writing.with_new_options(old, other) != other
    assert writing.with_new_options({"rows": 2}, manifest) == {"rows": 2}


def test_the_shape_of_a_batch_is_known_before_the_first_step(rows):
    settings, _ = rows
    assert checks.first_rows(settings)["time_ids"].shape == (2, 6)


# --- bad input


def test_sources_without_sizes_are_refused():
    for source in ("emoji", "prompts", "mixture"):
        with pytest.raises(
            ValueError, match=f"needs the pictures' own sizes, which data.source={source} does not have"
        ):
            configure(source=source, size_conditions="own")
    assert configure(source="arrays", size_conditions="own").source.precomputed  # they have those that were encoded


def test_teachers_without_sizes_are_refused(teacher, tmp_path):
    said = "own is for teachers that take sizes of images, such as Stable Diffusion XL, and .* takes none: set it to"
    with pytest.raises(ValueError, match=said):
        encoders_of("sd15", size_conditions="own")
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher))
    c.data.update(source="folder", path=str(tmp_path), split="all", size=8, size_conditions="own")
    Image.fromarray(noise(0, 8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=said):
        build.build(config.resolve(c))

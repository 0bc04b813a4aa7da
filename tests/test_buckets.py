"""Aspect-ratio buckets: which image is in which, what each step has, and runs on several shapes."""

import collections
import dataclasses
import io
import itertools
import json
import os

import numpy as np
import pytest
import tiny
from PIL import Image
from test_crops import noise, place
from test_indexed import FORMATS, records, tar, write_table

from cddistill import build, checks, config, train
from cddistill.data import batches, buckets, configure, examples, index, indexed, loader, order_digest, sides
from cddistill.data.images import fit

SHAPES = ((8, 8), (6, 12))  # "8x8,12x6": squares and wide ones
SIDES = [(10, 10)] * 5 + [(24, 12)] * 9 + [(30, 16)] * 2  # width, height: 5 squares, 11 wide ones


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """The cache of indices is no user's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen pictures, captioned by their numbers."""
    root = tmp_path_factory.mktemp("pictures")
    for i, shape in enumerate(SIDES):
        Image.fromarray(noise(i, *shape)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(str(i))
    return root


def of(root, **changes):
    settings = {"source": "folder", "path": str(root), "split": "all", "size": 8, "num_classes": 4, "flip": False}
    return configure(**settings | {"buckets": "8x8,12x6"} | changes)


def taken(n, config, **options):
    return [*itertools.islice(batches(config, **{"batch_size": 4, "seed": 3, "prepare": dict} | options), n)]


# --- division


def test_shapes_are_widths_and_heights():
    assert buckets.parse("512x512,576x448") == ((512, 512), (448, 576))
    assert buckets.parse("64x32, 32x64") == ((32, 64), (64, 32))
    assert buckets.parse("") == ()


@pytest.mark.parametrize("text", ["512", "512x512;64x64", "8x8,8x8", "0x8", "8x99999", "8x8,", "8 x 8", "-8x8", ","])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="data.buckets=.* must be widths x heights like 512x512,576x448, each"):
        configure(source="folder", buckets=text)


def test_an_image_is_in_the_bucket_of_the_nearest_aspect_ratio():
    sides = np.array([(10, 10), (20, 10), (100, 71), (100, 70), (10, 40), (0, 0)], np.int32)
    found = buckets.divide(sides, ((8, 8), (6, 12), (90, 10)))  # 1:1, 2:1, 1:9; the bound of the first two is sqrt(2):1
    expected = {(8, 8): [0, 2, 5], (6, 12): [1, 3], (90, 10): [4]}
    assert {shape: rows.tolist() for shape, rows in found.items()} == expected
    assert [*buckets.divide(sides[:1], ((6, 12), (8, 8)))] == [(8, 8)]  # those without images are left out


# --- order


@pytest.mark.parametrize("sizes", [(5, 11), (1, 3, 100), (40,), (2, 1)])
def test_every_image_is_used_once_an_epoch(sizes):
    """Each bucket's batches come one after the other, without a gap, as often as its share of the images."""
    schedule = buckets.Schedule(np.array(sizes, np.int64), 8, 0)
    epochs = 48  # a multiple of the batch: nothing waits at its end
    steps = [schedule(k) for k in range(epochs * sum(sizes) // 8)]
    for bucket, n in enumerate(sizes):
        numbers = [number for b, number in steps if b == bucket]
        assert sorted(numbers) == [*range(epochs * n // 8)]
        assert all(abs(number - i) <= n // 8 + 1 for i, number in enumerate(numbers))  # shuffled within an epoch only
    assert steps == [buckets.Schedule(np.array(sizes, np.int64), 8, 0)(k) for k in range(len(steps))]
    other = [buckets.Schedule(np.array(sizes, np.int64), 8, 1)(k) for k in range(len(steps))]
    assert (steps == other) == (len(sizes) == 1 and sizes[0] < 16)


def test_a_late_step_is_found_at_once():
    schedule = buckets.Schedule(np.array([12_000_000 - 7, 7], np.int64), 1024, 0)
    assert [schedule(k)[1] for k in (0, 10**7)] != [0, 0]


def test_a_batch_has_one_shape_and_an_epoch_every_image(folder):
    """Four epochs of sixteen images in sixteen batches of four."""
    found = taken(16, of(folder))
    counts = collections.Counter(itertools.chain(*(batch["caption"] for batch in found)))
    assert counts == {str(i): 4 for i in range(16)}
    for batch in found:
        shape = SHAPES[int(batch["caption"][0]) >= 5]
        assert batch["x0"].shape == (4, *shape, 3)
        assert {int(i) >= 5 for i in batch["caption"]} == {shape == SHAPES[1]}
    assert len({batch["x0"].shape for batch in found[:4]}) == 2


def test_batches_depend_on_the_step_alone(folder):
    """Not on where a run starts, on the number of hosts or on threads; on the seed."""
    expected = taken(9, of(folder))
    for other in (
        taken(3, of(folder), start=6),
        [
            {name: np.concatenate([a[name], b[name]]) for name in ("x0", "caption")}
            for a, b in zip(*(taken(9, of(folder, threads=1), rows=slice(i, i + 2)) for i in (0, 2)), strict=True)
        ][6:],
    ):
        for a, b in zip(expected[6:], other, strict=True):
            np.testing.assert_array_equal(a["x0"], b["x0"])
            assert [*a["caption"]] == [*b["caption"]]
    assert [b["caption"] for b in taken(9, of(folder), seed=4)] != [b["caption"] for b in expected]


def test_hosts_with_other_sizes_have_another_digest(folder, monkeypatch):
    ours = order_digest(of(folder), seed=0)
    assert ours == order_digest(of(folder, threads=2), seed=0)
    assert ours != order_digest(of(folder, buckets="12x6,8x8"), seed=0)
    assert ours != order_digest(of(folder, buckets=""), seed=0)


# --- pixels


def test_a_picture_is_resized_to_cover_its_bucket(folder):
    for batch in taken(4, of(folder)):
        for x0, caption in zip(batch["x0"], batch["caption"], strict=True):
            picture = Image.open(folder / f"{caption}.png")
            np.testing.assert_allclose((x0 + 1) * 127.5, fit(picture, x0.shape[:2]), atol=1e-3)


def test_crops_at_the_pictures_own_resolution(folder):
    for batch in taken(4, of(folder, crop="random", flip=True, size_conditions="own")):
        for x0, caption, ids in zip(batch["x0"], batch["caption"], batch["time_ids"].astype(int), strict=True):
            image, crop = np.asarray(Image.open(folder / f"{caption}.png")), np.rint((x0 + 1) * 127.5).astype(np.uint8)
            assert (ids[3], ids[2]) in (place(crop, image), place(crop, image[:, ::-1]))
            assert (*ids[:2], *ids[4:]) == (*image.shape[:2], *crop.shape[:2])


def test_conditions_have_the_shape_of_the_bucket(folder):
    for batch in taken(4, of(folder, task="sr", scale=2)):
        assert batch["cond"].shape == batch["x0"].shape


def test_validation_and_test_stay_squares(folder):
    for split in ("train", "validation", "test"):
        assert examples(of(folder), split)["x0"].shape == (16, 8, 8, 3)


def test_the_header_is_turned_as_the_picture_is(tmp_path):
    image = Image.fromarray(noise(0, 12, 24))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert loader.numbers_of(of(tmp_path)) == {(6, 12): 1}


# --- shards


def write_shards(root, source, pictures=None, columns=None):
    """The pictures of SIDES, or these files of pictures, in two shards."""
    root.mkdir(exist_ok=True)
    if pictures is None:
        pictures = [encoded(noise(i, *shape)) for i, shape in enumerate(SIDES)]
    for k in (0, 1):
        numbers = range(8 * k, min(8 * k + 8, len(pictures)))
        if source == "webdataset":
            members = {f"{i}.txt": b"%d" % i for i in numbers} | {f"{i}.png": pictures[i] for i in numbers}
            tar(root / f"{k}.tar", dict(sorted(members.items(), key=lambda x: x[0].split(".")[0])))
        elif source == "parquet":
            table = {"jpg": [pictures[i] for i in numbers], "caption": [*map(str, numbers)]}
            table |= {name: x[numbers.start : numbers.stop] for name, x in (columns or {}).items()}
            write_table(root / f"{k}.parquet", table, row_group_size=3)
        else:
            records(root / f"{k}.array_record", [{"image": pictures[i], "caption": str(i)} for i in numbers])
    return root


def encoded(pixels, **options):
    """A picture's file."""
    Image.fromarray(pixels).save(file := io.BytesIO(), options.pop("format", "png"), **options)
    return file.getvalue()


def headers_read(monkeypatch):
    """The names of pictures whose header is read from now on; other processes' caches are forgotten."""
    seen, read = [], sides.sides_of
    monkeypatch.setattr(sides, "sides_of", lambda file, name: seen.append(name) or read(file, name))
    return seen


def as_another_process():
    """Forget what was opened."""
    for cached in (indexed.scan, loader.open_source, loader.parts_of):
        cached.cache_clear()


@pytest.mark.parametrize("source", FORMATS)
def test_pictures_in_shards_are_those_of_a_folder(folder, source, tmp_path):
    """Also when their shapes, which only their headers tell, decide: the same buckets and the same pixels."""
    config = of(write_shards(tmp_path / "x", source), source=source)
    assert loader.numbers_of(config) == {(8, 8): 5, (6, 12): 11}
    pairs = (pair for batch in taken(16, of(folder)) for pair in zip(batch["caption"], batch["x0"], strict=True))
    expected = {int(caption): x0 for caption, x0 in pairs}
    for batch in taken(8, config):
        for x0, caption in zip(batch["x0"], batch["caption"], strict=True):
            np.testing.assert_array_equal(x0, expected[int(caption)])


@pytest.mark.parametrize("source", FORMATS)
def test_the_headers_in_shards_are_read_once(source, tmp_path, monkeypatch):
    """Again those of a shard that has changed; splits and hosts share what was read."""
    config, seen = of(write_shards(tmp_path / "x", source), source=source), headers_read(monkeypatch)
    order = order_digest(config, seed=0)
    assert len({*seen}) == len(seen) == len(SIDES)
    as_another_process()
    assert order_digest(config, seed=0) == order
    assert order_digest(of(tmp_path / "x", source=source, buckets="6x12,8x8"), seed=0) != order
    assert len(seen) == len(SIDES)
    shard = min(path for path in (tmp_path / "x").iterdir() if path.is_file())
    os.utime(shard, (1, 1))
    as_another_process()
    assert loader.numbers_of(config) == {(8, 8): 5, (6, 12): 11}
    assert len(seen) == len(SIDES) + 8
    assert all(shard.name in name for name in seen[-8:])
    as_another_process()
    loader.numbers_of(config)
    assert len([*(tmp_path / "x" / ".cddistill").iterdir()]) == 4  # two indices, of two files each


@pytest.mark.parametrize("source", FORMATS)
def test_headers_in_shards_are_turned_as_the_picture_is_and_those_that_cannot_be_read_are_named(source, tmp_path):
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = encoded(noise(0, 12, 24), format="jpeg", exif=exif)
    pictures = [turned, encoded(noise(1, 9, 9)), b"no picture", turned[:9]]
    config = of(write_shards(tmp_path / "x", source, pictures), source=source)
    bad = r"2 of 4 pictures in .*x have no header that can be read: .* cannot be read .*; .* \(data.skip_bad=True skips"
    with pytest.raises(ValueError, match="2 of 4 images in .*x cannot be used"):  # as without buckets
        loader.numbers_of(config)
    skipping = dataclasses.replace(config, skip_bad=True)
    assert loader.numbers_of(skipping) == {(8, 8): 3, (6, 12): 1}
    opened = loader.load(skipping, "train").source
    opened.skip = False
    with pytest.raises(ValueError, match=bad):
        opened.sides()


def test_a_tar_whose_samples_are_no_longer_there_is_named(tmp_path):
    """Only as far as the headers of its members tell."""
    found = loader.load(of(write_shards(tmp_path / "x", "webdataset"), source="webdataset"), "train").source
    (tmp_path / "x" / "0.tar").write_bytes(b"something else" * 4000)
    rows = found.index.rows[:8]
    left = found.format.sides(tmp_path / "x" / "0.tar", "0.tar", rows).left
    assert left[0] == "0.tar is damaged at byte 0: download it again"
    assert len(left) == 8


def test_an_index_of_sides_that_is_of_other_samples_is_named(tmp_path, monkeypatch):
    config = of(write_shards(tmp_path / "x", "webdataset"), source="webdataset")
    monkeypatch.setattr(type(config.source.format), "sides", lambda *_: index.Found(np.zeros(7, sides.SIDES)))
    with pytest.raises(ValueError, match=r"the index of sides in .*x is not that of its samples: delete its folder"):
        loader.numbers_of(config)


def test_columns_of_parquet_state_sides(tmp_path, monkeypatch):
    """As img2dataset writes them; the pictures are then not looked at."""
    columns = {"WIDTH": [w for w, _ in SIDES], "height": [h for _, h in SIDES]}
    seen = headers_read(monkeypatch)
    for changes, expected in (
        ({}, {(8, 8): 5, (6, 12): 11}),
        ({"height": [1000] * 16}, {(8, 8): 16}),
        ({"height": [None] * 16}, {(8, 8): 16}),  # not known
    ):
        root = write_shards(tmp_path / str(len(seen)), "parquet", columns=columns | changes)
        as_another_process()
        assert loader.numbers_of(of(root, source="parquet")) == expected
    assert seen == []


@pytest.mark.parametrize("wrong", ["high", -8])
def test_columns_of_parquet_that_are_no_sides_are_named(wrong, tmp_path):
    columns = {"width": [8] * 16, "height": [wrong] * 16}
    root = write_shards(tmp_path / "x", "parquet", columns=columns)
    with pytest.raises(ValueError, match="parquet has sides of images that are no whole numbers of pixels") as error:
        loader.numbers_of(of(root, source="parquet"))
    assert "\n" not in str(error.value)


# --- runs


def settings(teacher, folder, **changes):
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher), steps=4, batch_size=8, log_every=1, checkpoint_every=2, eval_every=9, report=False)
    c.data.update(source="folder", path=str(folder), split="all", size=8, buckets="8x8,12x6", num_classes=4)
    c.data.update(changes)
    return c


def losses(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["student/loss"] for r in records if "student/loss" in r}


@pytest.mark.slow
def test_a_run_trains_on_all_shapes_and_resumes(one_device, teacher, folder, tmp_path, capsys):
    """A program for each shape; a run in two parts has the losses of one."""
    c = settings(teacher, folder)
    assert train.train(c, tmp_path / "whole") == 0
    said = "training images in 2 buckets, for each of which a program is compiled: 8x8 5, 12x6 11"
    assert said in capsys.readouterr().out
    found = taken(4, config.resolve(c).data, seed=c.seed, batch_size=8)
    assert {batch["x0"].shape[1:3] for batch in found} == {*SHAPES}
    c.steps = 2
    train.train(c, tmp_path / "parts")
    c.steps = 4
    train.train(c, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert {*losses(tmp_path / "whole")} == {1, 2, 3, 4}


# --- bad input


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"source": "emoji"}, "data.buckets cannot go with data.source=emoji, whose images are not of several shapes"),
        ({"source": "tfds"}, "data.buckets cannot go with data.source=tfds, .* only reading all of them"),
        ({"source": "arrays"}, "data.buckets cannot go with data.source=arrays"),
        ({"task": "inpaint"}, "data.buckets cannot go with data.task=inpaint, which is for squares"),
        ({"window": 10}, "data.buckets cannot go with data.window, which orders all images as one"),
        ({"pairs": "x"}, "data.buckets cannot go with data.pairs, which have one shape"),
        ({"task": "sr", "scale": 4}, "12x6 in data.buckets: data.size 6 must be divisible by data.scale 4"),
    ],
)
def test_what_buckets_cannot_go_with(folder, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        of(folder, **changes)


def test_pictures_that_are_too_small_to_be_cropped_are_named(folder):
    config = of(folder, crop="random", buckets="8x8,26x12")
    with pytest.raises(ValueError, match=r"9 images are smaller than 26x12, their bucket, .*png is 24 x 12 px; "):
        loader.numbers_of(config)


def test_headers_that_cannot_be_read_are_named_or_skipped(folder, tmp_path):
    Image.fromarray(noise(0, 24, 12)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 of 2 .*b.png cannot be read"):
        loader.numbers_of(of(tmp_path))
    config = of(tmp_path, skip_bad=True, buckets="12x6,8x8")
    assert loader.numbers_of(config) == {(6, 12): 2}
    assert len({x0.tobytes() for x0 in taken(1, config)[0]["x0"]}) == 1


def test_teachers_that_cannot_take_a_bucket():
    batch = {"x0": np.zeros((2, 7, 8, 5), np.float32), "text": {"class_labels": np.zeros(2, np.int32)}}
    with pytest.raises(ValueError, match=r"the teacher cannot take 8x7 in data.buckets \(.*\): leave it out"):
        checks.check_bucket((7, 8), {"teacher": tiny.teacher()}, batch)


def test_every_bucket_is_checked_before_the_first_step(one_device, teacher, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "check_bucket", lambda shape, frozen, batch: seen.append((shape, batch["x0"].shape)))
    parts = build.build(config.resolve(settings(teacher, folder)))
    assert seen == [(shape, (8, *shape, 3)) for shape in SHAPES]
    said = "training images in 2 buckets, for each of which a program is compiled: 8x8 5, 12x6 11"
    assert train.overview(parts).endswith(said)
    stream = parts.batches(parts.driver(), parts.frozen)
    assert {next(stream)["x0"].shape for _ in range(4)} == {(8, *shape, 3) for shape in SHAPES}

"""Sources, splits and batches: they depend only on seed and position, and errors name bad input."""

import itertools
import json
import re

import numpy as np
import pytest

from cddistill.data import DataConfig, batches, configure, examples, load, loader, order_digest, splits
from cddistill.data.sources import arrays as sources
from cddistill.data.sources import emoji, scenes

SR = configure(task="sr")


def take(n, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), n))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            assert_same(a[name], b[name])
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def join(halves):
    first = halves[0]
    return {k: join([x[k] for x in halves]) if isinstance(v, dict) else np.concatenate([x[k] for x in halves])
            for k, v in first.items()}  # fmt: skip


# --- splits


def test_splits_are_disjoint_complete_and_fixed():
    parts = {split: splits.members(emoji.pack(), split) for split in splits.SPLITS}
    assert sorted(itertools.chain(*parts.values())) == sorted(emoji.pack())
    assert {split: len(names) for split, names in parts.items()} == {"train": 1490, "validation": 170, "test": 192}
    assert splits.split_of("1f385") == "train"  # fixed: another hash would leak test images of old runs into training
    assert parts["test"][:2] == ["1f1f2-1f1e6", "1f4e4"]
    assert all(splits.split_of(name) == split for split, names in parts.items() for name in names)


def test_adding_images_keeps_the_order_of_a_split():
    names = [f"{i}.png" for i in range(200)]
    few, many = splits.members(names[:100], "train"), splits.members(names, "train")
    assert [name for name in many if name in set(few)] == few
    assert few != sorted(few)


# --- the embedded images


def test_emoji_pack_contents():
    pack = emoji.pack()
    drawings = list(itertools.chain(*pack.values()))
    assert len(pack) == 1852
    assert len(drawings) == 3388
    assert {label for _, label, _ in drawings} == set(range(9))
    santa = pack["1f385"]
    assert [caption for _, _, caption in santa][:2] == ["Santa Claus", "Santa Claus: light skin tone"]
    checksum = sum(int(image.sum()) for image, _, _ in drawings)  # of the images that the pack was made from
    assert checksum == 2097239887


def test_skin_tones_are_random_in_training_only():
    train, test = load(configure(flip=False), "train"), load(configure(), "test")
    santa = train.source.bases.index("1f385")
    drawn = {train.item(santa, np.random.default_rng(k))["caption"] for k in range(40)}
    assert drawn == {caption for _, _, caption in emoji.pack()["1f385"]}
    captions = examples(configure(), "train")["caption"]
    captions += [test.item(i, np.random.default_rng(i))["caption"] for i in range(len(test))]
    assert not any("skin tone" in caption for caption in captions)


def test_flip_mirrors_training_images_with_probability_half():
    dataset, still = load(configure(), "train"), load(configure(flip=False), "train")
    i = next(i for i, base in enumerate(dataset.source.bases) if len(emoji.pack()[base]) == 1)
    plain = examples(configure(), "train")["x0"][i]
    seen = [dataset.item(i, np.random.default_rng(k))["x0"] for k in range(100)]
    mirrored = sum(np.array_equal(x, plain[:, ::-1]) for x in seen)
    assert mirrored + sum(np.array_equal(x, plain) for x in seen) == 100
    assert 30 < mirrored < 70
    assert all(np.array_equal(still.item(i, np.random.default_rng(k))["x0"], plain) for k in range(20))


def test_emoji_are_downscaled_but_not_upscaled():
    assert examples(configure(size=16), "test", 2)["x0"].shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="emoji are 32 px; data.size must be at most that, not 64"):
        load(configure(size=64))


# --- batches


def test_batch_shapes_dtypes_and_ranges():
    batch = next(batches(SR, batch_size=6, seed=0))
    assert {name: value.shape for name, value in batch.items() if name not in ("text", "null")} == {
        "x0": (6, 32, 32, 3), "cond": (6, 32, 32, 3), "index": (6,)}  # fmt: skip
    assert batch["x0"].dtype == batch["cond"].dtype == np.float32
    assert -1 <= batch["x0"].min() < -0.5
    assert 0.5 < batch["x0"].max() <= 1
    assert 0 <= batch["cond"].min() < batch["cond"].max() <= 1
    labels, null = batch["text"]["class_labels"], batch["null"]["class_labels"]
    assert labels.dtype == null.dtype == batch["index"].dtype == np.int32
    assert labels.max() < 9
    assert null.tolist() == [9] * 6
    assert batch["index"].tolist() == list(range(6))


def test_batches_depend_on_the_seed():
    a, b = take(3, SR, batch_size=8, seed=1), take(3, SR, batch_size=8, seed=1)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)
    assert not np.array_equal(a[0]["x0"], next(batches(SR, batch_size=8, seed=2))["x0"])
    assert not np.array_equal(a[0]["x0"], a[1]["x0"])


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (configure(), 400),  # after 3200 images: in the third epoch
        (SR, 3),
        (configure(task="sr", degradation="realesrgan"), 3),
    ],
)
def test_resumed_batches_are_identical(config, start):
    straight = take(start + 2, config, batch_size=8, seed=3)[start:]
    for x, y in zip(straight, take(2, config, batch_size=8, seed=3, start=start), strict=True):
        assert_same(x, y)


def test_batches_do_not_depend_on_the_number_of_hosts():
    whole = take(3, SR, batch_size=8, seed=0)
    halves = [take(3, SR, batch_size=8, seed=0, rows=slice(4 * host, 4 * host + 4)) for host in range(2)]
    for step, batch in enumerate(whole):
        assert_same(batch, join([half[step] for half in halves]))


def test_every_epoch_is_a_new_permutation():
    class Numbers:
        def __len__(self):
            return 23

        def item(self, i, rng):
            return i, int(rng.integers(10**9))

    stream = loader.shuffled(Numbers(), seed=5)
    epochs = [[stream[23 * epoch + k] for k in range(23)] for epoch in range(4)]
    orders = [[i for i, _ in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(23))]}) == 5
    assert len({number for epoch in epochs for _, number in epoch}) == 4 * 23  # random numbers do not repeat either
    other = [loader.shuffled(Numbers(), seed=6)[k] for k in range(23)]
    assert [i for i, _ in other] not in orders
    assert not {number for _, number in other} & {number for epoch in epochs for _, number in epoch}


def test_a_hash_tells_orders_apart():
    same, again, other, smaller = (order_digest(configure(), split, seed=s) for split, s in (
        ("train", 1), ("train", 1), ("train", 2), ("test", 1)))  # fmt: skip
    assert same == again
    assert len({same, other, smaller}) == 3


def test_examples_are_deterministic():
    config = configure(task="sr", degradation="realesrgan")
    a, b = examples(config, "test", 5), examples(config, "test", 5)
    assert a.pop("caption") == b.pop("caption")
    assert_same(a, b)
    np.testing.assert_array_equal(a["cond"][:3], examples(config, "test", 3)["cond"])
    assert not np.array_equal(a["cond"], examples(config, "test", 5, seed=1)["cond"])
    assert len(examples(configure(), "test")["caption"]) == 192


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"source": "emojis"},
            "data.source='emojis' must be one of emoji, icons, icon_edits, scenes, mixture, folder, "
            "webdataset, parquet, array_record, tfds, arrays",
        ),
        ({"task": "blur"}, "data.task='blur' must be one of none, sr, inpaint, edit, depth, canny"),
        ({"size": 0}, "data.size=0 must be at least 1"),
        ({"task": "sr", "scale": 5}, "data.size 32 must be divisible by data.scale 5"),
    ],
)
def test_invalid_configs_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        configure(**changes)


def test_a_source_and_a_task_may_be_given_by_name():
    assert DataConfig(source="emoji", task="sr") == configure(source="emoji", task="sr")
    with pytest.raises(ValueError, match="data.source='emojis' must be one of emoji, "):
        DataConfig(source="emojis")


def test_wrong_split_or_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, validation, test, not 'val'"):
        load(configure(), "val")
    with pytest.raises(ValueError, match="scenes has 24 labels; data.num_classes is 9"):
        load(configure(source="scenes"))


# --- scenes


def test_scenes_are_deterministic_and_splits_differ():
    a, b = scenes.scene.__wrapped__((0, 7), 16), scenes.scene.__wrapped__((0, 7), 16)
    assert a.pop("caption") == b.pop("caption")
    assert_same({k: np.asarray(v) for k, v in a.items()}, {k: np.asarray(v) for k, v in b.items()})
    config = configure(source="scenes", size=16, num_classes=24)
    train, test = examples(config, "train", 12), examples(config, "test", 12)
    assert train["x0"].shape == train["edited"].shape == (12, 16, 16, 3)
    assert not set(train["caption"]) & set(test["caption"])
    assert not (train["x0"] == (train["edited"] / 127.5 - 1).astype(np.float32)).all((1, 2, 3)).any()
    assert train["depth"].min() > 1
    assert train["depth"].max() == scenes.FAR
    assert train["label"].max() < 24


def test_depth_is_the_distance_along_the_ray():
    """A ball in the centre of the image and the floor behind it, by elementary geometry."""
    forward = np.array([0, -0.34, 1]) / np.hypot(0.34, 1)
    floor = scenes.EYE[1] / -forward[1]
    world = scenes.random_world(np.random.default_rng(0))
    centre = scenes.render(world, [], 65)[1][32, 32]  # the mean over 2 x 2 rays around the axis
    assert centre == pytest.approx(floor, rel=1e-3)
    radius = scenes.SIZES["big"]
    rays = forward[None]
    above = scenes.EYE + floor * forward + [0, radius, 0]
    ball = scenes.Solid("ball", "big", "red", np.zeros(3), 0.0, above[0], above[2])
    _, distance, normal = scenes.intersect(ball, scenes.EYE, rays)
    point = scenes.EYE + distance[0] * forward
    assert np.linalg.norm(point - above) == pytest.approx(radius)
    np.testing.assert_allclose(normal[0], (point - above) / radius, atol=1e-9)
    assert distance[0] < floor
    behind = ball._replace(z=ball.z + 2, colour="blue")
    for solids in ([ball, behind], [behind, ball]):
        image, depth, mask = scenes.render(world, solids, 65)
        assert depth[32, 32] == pytest.approx(distance[0], rel=5e-3)  # the mean of four rays
        assert image[32, 32].argmax() == 0  # red
        assert solids[mask[32, 32] - 1] is ball


def test_flip_also_mirrors_depth_and_edited_image():
    config = configure(source="scenes", size=16, num_classes=24)
    plain, dataset = examples(config, "train", 1), load(config, "train")
    items = [dataset.item(0, np.random.default_rng(k)) for k in range(8)]
    flipped = next(item for item in items if not np.array_equal(item["x0"], plain["x0"][0]))
    for name in ("x0", "depth", "edited"):
        np.testing.assert_array_equal(flipped[name], plain[name][0][:, ::-1])


# --- precomputed arrays


@pytest.fixture
def arrays(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x0.npy", rng.normal(size=(40, 8, 8, 4)).astype(np.float16))
    np.save(tmp_path / "text.npy", rng.normal(size=(40, 5, 6)).astype(np.float16))
    np.save(tmp_path / "null.npy", np.zeros((5, 6), np.float32))
    (tmp_path / "captions.json").write_text(json.dumps([f"row {i}" for i in range(40)]))
    return tmp_path


def latents(path, **changes):
    return configure(source="arrays", path=str(path), **changes)


def test_arrays_are_split_and_batched(arrays):
    x0, text = np.load(arrays / "x0.npy"), np.load(arrays / "text.npy")
    seen = []
    for split in splits.SPLITS:
        data = examples(latents(arrays), split)
        rows = [int(caption.split()[1]) for caption in data["caption"]]
        seen += rows
        assert data["x0"].dtype == data["text"]["encoder_hidden_states"].dtype == np.float32
        np.testing.assert_array_equal(data["x0"], x0[rows])
        np.testing.assert_array_equal(data["text"]["encoder_hidden_states"], text[rows])
        np.testing.assert_array_equal(data["null"]["encoder_hidden_states"], np.zeros((len(rows), 5, 6)))
    assert sorted(seen) == list(range(40))
    batch = next(batches(latents(arrays), batch_size=4, seed=0))
    assert batch["x0"].shape == (4, 8, 8, 4)
    assert batch.keys() == {"x0", "text", "null", "index"}


def test_arrays_for_sdxl_and_with_cond(arrays):
    np.save(arrays / "text_embeds.npy", np.ones((40, 7)))
    np.save(arrays / "null_text_embeds.npy", np.zeros(7))
    np.save(arrays / "time_ids.npy", np.full((40, 6), 64))
    np.save(arrays / "cond.npy", np.ones((40, 64, 64, 3), np.float16))
    batch = next(batches(latents(arrays, task="sr"), batch_size=4, seed=0))
    assert batch["cond"].shape == (4, 64, 64, 3)
    added, null = batch["text"]["added_cond_kwargs"], batch["null"]["added_cond_kwargs"]
    assert added["text_embeds"].shape == (4, 7)
    assert null["text_embeds"].max() == 0 < added["text_embeds"].min()
    np.testing.assert_array_equal(added["time_ids"], null["time_ids"])


def test_arrays_with_labels_and_their_own_splits(tmp_path):
    for split in splits.SPLITS:
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "x0.npy", np.zeros((3, 8, 8, 4), np.float32))
        np.save(tmp_path / split / "class_labels.npy", np.arange(3))
    data = examples(latents(tmp_path), "validation")
    assert data["text"]["class_labels"].tolist() == data["label"].tolist() == [0, 1, 2]
    assert data["null"]["class_labels"].tolist() == [9] * 3


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("x0.npy", np.zeros((40, 8, 8)), "x0.npy in .* is .* expected 4 axes"),
        ("text.npy", np.zeros((39, 5, 6)), "text.npy in .* expected 3 axes, the first of length 40 as in x0.npy"),
        ("null.npy", np.zeros((5, 7)), r"null.npy is \(5, 7\); expected \(5, 6\)"),
        ("null.npy", None, "text.npy needs .*null.npy, the embedding of the empty prompt"),
        ("x0.npy", None, "there is no x0.npy in"),
        ("class_labels.npy", np.arange(40), "class_labels.npy in .* must be in 0 .. 9, the null label"),
        ("text_embeds.npy", np.zeros((40, 7)), "text_embeds.npy and time_ids.npy belong together"),
    ],
)
def test_inconsistent_arrays_are_refused(arrays, name, array, sentence):
    (arrays / name).unlink(missing_ok=True)
    if array is not None:
        np.save(arrays / name, array)
    with pytest.raises(ValueError, match=sentence):
        load(latents(arrays))


@pytest.mark.parametrize("source", ["folder", "arrays"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{}/gone", "data.path '{}/gone' does not exist; set it to a folder of"),
        ("gone/too", "data.path 'gone/too' does not exist in {}; set it to a folder of"),
        ("~/gone", "data.path '~/gone' does not exist; set it to a folder of"),
        ("{}/link", "data.path '{}/link' does not exist; set it to a folder of"),
        ("{}/x0.npy", "data.path '{}/x0.npy' is not a folder; set it to a folder of"),
        ("", "data.path '' is not a folder; set it to a folder of"),
    ],
)
def test_a_path_without_data_says_whether_it_exists(tmp_path, monkeypatch, source, path, said):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x0.npy").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"^{said.format(tmp_path)}"):
        load(configure(source=source, path=path.format(tmp_path)))


def noise(*shape, scale=1.0, shift=0.0, dtype=np.float32):
    return (np.random.default_rng(1).normal(size=shape) * scale + shift).astype(dtype)


def with_nan(at):
    x = noise(40, 8, 8, 4)
    x[at, 3, 2, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("x0.npy", np.full((40, 8, 8, 3), 200, np.uint8), "x0.npy in .* holds uint8; .*: divide pixels by 127.5"),
        ("x0.npy", np.zeros((40, 8, 8, 4), np.int64), "x0.npy in .* holds int64; expected float16 or float32"),
        ("x0.npy", np.zeros((40, 8, 8, 4), "V2"), r"x0.npy in .* holds \|V2; expected float16 or float32"),
        ("x0.npy", with_nan(0), "row 0 of .*x0.npy has values that are not finite"),
        ("x0.npy", with_nan(39), "row 39 of .*x0.npy has values that are not finite"),
        ("x0.npy", np.full((40, 8, 8, 4), np.inf, "f2"), r"row \d+ of .*x0.npy has values that are not finite"),
        (
            "x0.npy",
            noise(40, 8, 8, 4, scale=5.5),
            r"standard deviation 5\.\d+ \(in \d+ rows\).*multiply by its",
        ),
        ("x0.npy", noise(40, 8, 8, 4, scale=0.02), r"standard deviation 0\.0\d+ .*scaling_factor \(once\)"),
        ("x0.npy", np.full((40, 8, 8, 3), 200.0, "f4"), "mean 200 .* pixels in 0 .. 255, divide by 127.5"),
        ("cond.npy", np.full((40, 8, 8, 3), 9, np.uint8), "cond.npy in .* holds uint8; .*divide pixels by 255"),
        ("cond.npy", np.full((40, 8, 8, 3), -0.5), r"cond.npy in .* from -0.5 to -0.5, and conditions lie in \[0, 1\]"),
        ("cond.npy", np.full((40, 8, 8, 3), 255.0), r"cond.npy in .* from 255 to 255"),
        ("text.npy", np.full((40, 5, 6), np.nan), r"row \d+ of .*text.npy has values that are not finite"),
        ("null.npy", np.full((5, 6), np.inf), "null.npy has values that are not finite numbers"),
        ("class_labels.npy", np.full(40, 1.5), "class_labels.npy in .* holds float64; expected integers"),
        ("class_labels.npy", np.full(40, -1), "class_labels.npy in .* must be in 0 .. 9"),
        ("input_ids.npy", np.zeros((40, 5)), "input_ids.npy in .* holds float64; expected integers"),
        ("x0.npy", b"cut off", r"x0.npy is damaged, or no array of numbers \("),
        ("captions.json", b"[1]", "captions.json is not a list of texts"),
        ("captions.json", b'["caf\xe9"]', "captions.json is not a list of texts, as JSON in UTF-8"),
    ],
)
def test_arrays_of_another_type_or_scale_are_refused(arrays, name, array, sentence):
    if isinstance(array, bytes):
        (arrays / name).write_bytes(array)
    else:
        np.save(arrays / name, array)
    with pytest.raises(ValueError, match=sentence):
        load(latents(arrays))


@pytest.mark.parametrize(
    ("array", "note"),
    [
        (noise(40, 8, 8, 4, dtype=np.float64), "x0.npy in .* is float64: it is used as float32"),
        (noise(40, 8, 8, 4, scale=0.15), "standard deviation 0.1.*and that of what teachers generate is about 1"),
        (np.random.default_rng(0).random((40, 8, 8, 3), np.float32), r"lies in \[0, 1\]: teachers take pixels in"),
        (noise(40, 8, 8, 4), ""),
    ],
)
def test_arrays_that_are_odd_are_used_with_a_warning(arrays, array, note, caplog):
    np.save(arrays / "x0.npy", array)
    data = load(latents(arrays))
    np.testing.assert_array_equal(data.item(3, None)["x0"], np.float32(array[data.rows[3]]))
    assert bool(caplog.text) == bool(note)
    assert re.search(note, caplog.text)


def test_only_some_rows_of_large_arrays_are_read(arrays, monkeypatch):
    """Evenly spaced, the first and the last among them."""
    read, rows = sources.Rows.__getitem__, []
    monkeypatch.setattr(sources, "ROWS_CHECKED", 5)
    monkeypatch.setattr(sources.Rows, "__getitem__", lambda self, i: rows.append(i) or read(self, i))
    data = load(latents(arrays))
    assert len(rows) == 2 * 5  # x0 and text
    assert {data.rows[0], data.rows[-1]} <= {*rows} <= {*data.rows}


def test_what_encoding_wrote_may_have_any_scale(arrays):
    """It is the teacher's own."""
    np.save(arrays / "x0.npy", noise(40, 8, 8, 4, scale=9.0))
    (arrays / "manifest.json").write_text('{"rows": 40, "total": 40}')
    assert len(load(latents(arrays))) > 0


def test_task_on_arrays_needs_cond(arrays):
    with pytest.raises(ValueError, match=r"task sr on precomputed arrays needs .*cond.npy"):
        load(latents(arrays, task="sr"))


# --- tensorflow-datasets


def test_tfds_datasets_load():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=6):
        data = examples(configure(source="tfds", path="mnist", num_classes=10), "test", 3)
        batch = next(batches(configure(source="tfds", path="mnist", num_classes=10, size=16), batch_size=2, seed=0))
        faces = examples(configure(source="tfds", path="celeb_a"), "validation", 2)
    assert data["x0"].shape == (3, 32, 32, 3)
    assert data["label"].max() < 10
    assert batch["x0"].shape == (2, 16, 16, 3)
    assert faces["label"].tolist() == [9, 9]  # it has no labels
    with pytest.raises(ValueError, match="tensorflow-datasets has no dataset 'no_such_set'"):
        load(configure(source="tfds", path="no_such_set"))


def test_tfds_splits():
    from cddistill.data.sources.tfds import slices

    assert slices(["train"]) == {"test": "train[90%:100%]", "validation": "train[80%:90%]", "train": "train[:80%]"}
    assert slices(["train", "test"]) == {"test": "test", "validation": "train[90%:100%]", "train": "train[:90%]"}
    assert slices(["train", "validation", "test"])["train"] == "train[:100%]"


def test_missing_tfds_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"needs tensorflow-datasets: pip install cddistill\[tfds\]"):
        load(configure(source="tfds", path="mnist"))

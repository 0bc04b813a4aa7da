"""Rows encoded with data.buckets: those of each bucket in a folder of shards, and trained on as their images are."""

import copy
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_encode
from PIL import Image
from test_crops import noise

from cddistill import build, checks, commands, config, data, encoders, io, pipeline, train
from cddistill.data import buckets, configure, loader, shards
from cddistill.precompute import encode, writing

pytestmark = pytest.mark.usefixtures("one_device")
SHAPES = ((16, 16), (12, 24))  # "16x16,24x12": squares and wide ones; latents are half as high and wide
SIDES = [(20, 20)] * 3 + [(48, 24)] * 3 + [(60, 32)] * 2  # width, height: 3 squares, 5 wide ones


@pytest.fixture(scope="module")
def made(one_device, tmp_path_factory):
    """A latent teacher, pictures that are captioned by their numbers, and what was encoded of them."""
    root = tmp_path_factory.mktemp("made")
    test_encode.make_teacher(root / "teacher")
    (root / "pictures").mkdir()
    for i, shape in enumerate(SIDES):
        Image.fromarray(noise(i, *shape)).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text(str(i))
    commands.encode_data(settings(root), root / "out")
    return root


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "out")


def settings(root, pictures=None, teacher=None, **changes):
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher or root / "teacher"), batch_size=4, encode_shard=2, seed=3)
    c.update(steps=4, log_every=1, checkpoint_every=2, eval_every=9, report=False)
    c.data.update(source="folder", path=str(pictures or root / "pictures"), split="all", size=16, num_classes=9)
    c.data.update(flip=False, buckets="16x16,24x12")
    c.update({name: x for name, x in changes.items() if name in c})
    c.data.update({name: x for name, x in changes.items() if name not in c})
    return c


def on_rows(root, out, **changes):
    """The settings of a run on encoded rows."""
    return settings(root, out, **{"source": "arrays", "buckets": "", "batch_size": 8} | changes)


def arrays(out, **changes):
    return configure(source="arrays", path=str(out), num_classes=9, **changes)


def taken(n, config, **options):
    return [*itertools.islice(data.batches(config, **{"batch_size": 4, "seed": 3, "prepare": dict} | options), n)]


def stored(out):
    """{file: its bytes} below a folder."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def reload():
    """Forget what was opened, as another process would not know it."""
    for cached in (loader.open_source, loader.parts_of, checks.first_rows):
        cached.cache_clear()


# --- what is written


def test_each_bucket_is_a_folder_of_shards_and_squares_are_as_before(made):
    train = made / "out" / "train"
    assert io.read_json(train / "manifest.json") == {"format": 2, "buckets": {"16x16": 3, "24x12": 5}}
    names = [*stored(train)]
    assert [name for name in names if name.startswith("16x16/0")] == [f"16x16/{k:08}.safetensors" for k in range(2)]
    assert [name for name in names if name.startswith("24x12/0")] == [f"24x12/{k:08}.safetensors" for k in range(3)]
    found = [io.read_json(train / name / "manifest.json") for name in ("16x16", "24x12")]
    assert [(x["bucket"], x["first"], x["rows"]) for x in found] == [("16x16", 0, 3), ("24x12", 3, 5)]
    assert data.examples(arrays(made / "out"), "test")["x0"].shape == (8, 8, 8, 4)


def test_latents_are_those_of_encoding_in_the_step(made):
    """In the same batches: eight of them, in which each image is used four times, have the rows that those of images
    have, in their order."""
    experiment = config.resolve(settings(made))
    teacher = pipeline.of_run(experiment.run)
    made_of = encoders.make(experiment, teacher)
    nets, at_step = encoders.networks(teacher), jax.jit(made_of.at_step)
    shapes = set()
    for step, (pixels, rows) in enumerate(zip(taken(8, experiment.data), taken(8, arrays(made / "out")), strict=True)):
        assert rows["caption"] == pixels["caption"]
        expected = at_step(nets, encoders.inputs(made_of.tokenized(pixels)), step)["x0"]
        np.testing.assert_allclose(rows["x0"], expected, rtol=2e-3, atol=2e-3)  # they are stored in float16
        jax.tree.map(np.testing.assert_array_equal, rows["text"], pixels["text"])
        shapes.add(rows["x0"].shape)
    assert shapes == {(4, 8, 8, 4), (4, 6, 12, 4)}


def test_batches_depend_on_the_step_alone(made):
    """Not on where a run starts or on the number of hosts; with a window, too."""
    for changes in ({}, {"window": 3}):
        of = arrays(made / "out", **changes)
        expected = taken(9, of)[6:]
        parts = [taken(9, of, rows=slice(i, i + 2))[6:] for i in (0, 2)]
        for step, batch in enumerate(taken(3, of, start=6)):
            np.testing.assert_array_equal(batch["x0"], expected[step]["x0"])
            np.testing.assert_array_equal(np.concatenate([part[step]["x0"] for part in parts]), batch["x0"])
    windowed = [taken(9, arrays(made / "out", window=w)) for w in (0, 3)]
    assert [x["caption"] for x in windowed[0]] != [x["caption"] for x in windowed[1]]
    orders = {data.order_digest(arrays(made / "out", **x), seed=3) for x in ({}, {"window": 3})}
    assert len(orders) == 2
    assert data.order_digest(config.resolve(settings(made)).data, seed=3) not in orders  # of names, not of numbers


def test_random_choices_differ_from_row_to_row_of_the_split(made, tmp_path, monkeypatch):
    """A sample of the posterior and a crop depend on the row's number in the split, of which a bucket's are a part."""
    draws, firsts, usable, program_of = [], [], loader.Pixels.usable, encode.program_of

    def drawn(self, i, rng):
        if isinstance(self.source, buckets.Part):
            draws.append(copy.deepcopy(rng).random())
        return usable(self, i, rng)

    def counted(*args):
        program = program_of(*args)
        return lambda items, first: firsts.append(first) or program(items, first)

    monkeypatch.setattr(loader.Pixels, "usable", drawn)
    monkeypatch.setattr(encode, "program_of", counted)
    c = settings(made, encode_sample=True, encode_epochs=2, crop="random")
    commands.encode_data(c, tmp_path / "out")
    parts = data.parts_of(arrays(tmp_path / "out"))
    assert {shape: len(part) for shape, part in parts.items()} == {(16, 16): 6, (12, 24): 10}
    assert [part.manifest["first"] for part in parts.values()] == [0, 6]
    assert len(draws) == len({*draws}) == 16
    assert firsts[:8] == [*range(0, 16, 2)]


# --- continuing


def test_the_same_command_continues_and_gives_the_same_bytes(made, out, monkeypatch):
    """Whole shards are kept; only rows of those that are missing are decoded."""
    expected = stored(out)
    for name in ("train/24x12/00000002.safetensors", "train/16x16/00000000.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "test")
    seen, usable = [], loader.Pixels.usable
    monkeypatch.setattr(loader.Pixels, "usable", lambda self, i, rng: seen.append(i) or usable(self, i, rng))
    commands.encode_data(settings(made), out)
    assert stored(out) == expected
    assert len(seen) == 2 + 1 + 8
    commands.encode_data(settings(made), out)
    assert len(seen) == 2 + 1 + 8


def test_it_continues_where_it_was_killed(made, out):
    """Before the first row of the second bucket: the list of buckets comes first."""
    expected = stored(out)
    for path in [path for path in out.rglob("*") if path.is_file() and path.parent.name != "16x16"]:
        path.unlink() if path != out / "train" / "manifest.json" else None
    with pytest.raises(ValueError, match="there is no manifest.json in .*24x12"):
        data.load(arrays(out))
    commands.encode_data(settings(made), out)
    assert stored(out) == expected


def test_other_buckets_are_another_command(made, out):
    before = stored(out)
    for changes, said in (
        ({"buckets": "16x16,12x24"}, r"train/16x16 was made .* \(data.buckets: 16x16,24x12 there, 16x16,12x24 now"),
        ({"buckets": "32x16"}, r"was made by another command \(data.buckets: 16x16,24x12 there, 32x16 now"),
        ({"buckets": ""}, r"train was made by another command .* 16x16 3, 24x12 5 there, none now"),
        ({"encode_epochs": 2}, "rows: 3 there, 6 now"),
    ):
        with pytest.raises(ValueError, match=said):
            commands.encode_data(settings(made, **changes), out)
    assert stored(out) == before
    (out / "train").rename(out.with_name("buckets"))
    shutil.copytree(out / "test", out / "train")  # as of squares
    with pytest.raises(ValueError, match="train was made by another command .* none there, 16x16 3, 24x12 5 now"):
        commands.encode_data(settings(made), out)


# --- what is read


def test_a_bucket_of_another_command_is_named(out):
    file = out / "train" / "24x12" / "manifest.json"
    io.write_json(file, io.read_json(file) | {"seed": 4})
    for shard in file.parent.glob("0*"):  # as if they had been written with it
        arrays_of, header = safetensors.numpy.load_file(shard), {"first": 2 * int(shard.stem)}
        header |= {"manifest": shards.identity(io.read_json(file)), "rows": len(arrays_of["x0"])}
        writing.save(shard, arrays_of, header)
    with pytest.raises(ValueError, match=r"train/16x16 and .*train/24x12 were not encoded by one command: encode"):
        data.load(arrays(out))
    shutil.rmtree(out / "train" / "24x12")
    shutil.copytree(out / "train" / "16x16", out / "train" / "24x12")
    with pytest.raises(ValueError, match=r"24x12 has not the 5 rows of .*train/manifest.json: encode again"):
        data.load(arrays(out))


@pytest.mark.parametrize("numbers", [{"../16x16": 5}, {"16x16": "5"}, {"16x16": 0}, [1]])
def test_lists_of_buckets_that_cannot_be_read_are_refused(out, numbers):
    io.write_json(out / "train" / "manifest.json", {"format": 2, "buckets": numbers})
    with pytest.raises(ValueError, match=r"train/manifest.json (lists the buckets|has buckets) .*: encode again"):
        data.load(arrays(out))


def test_damage_is_named_and_shards_are_skipped(made, out):
    test_encode.flip(out / "train" / "24x12" / "00000000.safetensors")
    with pytest.raises(ValueError, match=r"/train/24x12/00000000\.safetensors is damaged"):
        data.load(arrays(out))
    assert loader.numbers_of(arrays(out, skip_bad=True)) == {(16, 16): 3, (12, 24): 3}


def test_what_rows_of_several_shapes_cannot_go_with(made, out):
    for changes, said in (
        ({"buckets": "16x16"}, r"data.buckets cannot go with data.source=arrays, whose folder has the shapes of its"),
        ({"pairs": "x"}, "data.pairs have one shape, and the rows in .* several: leave one of them out"),
    ):
        with pytest.raises(ValueError, match=said):
            data.load(arrays(out, **changes))
    with pytest.raises(ValueError, match="the train rows of .* have several shapes: take those of validation or test"):
        data.examples(arrays(out), "train", 1)
    c = on_rows(made, out, teacher_steps=(2,), num_pairs=2)
    with pytest.raises(ValueError, match="--mode=pairs makes x0 of one shape, and .* has rows of several: make pairs"):
        commands.make_pairs(c, out.with_name("pairs"))
    shutil.rmtree(out / "validation")
    reload()
    with pytest.raises(ValueError, match=r"out \(data.path\) has no folder validation, as it has of other splits: enc"):
        build.build(config.resolve(on_rows(made, out)))


def test_rows_are_of_the_pictures_that_they_were_made_of(made, out):
    """Their fingerprint is of the files of all buckets."""
    seen = [data.fingerprint(arrays(out))]
    (out / "train" / "24x12" / "00000002.safetensors").touch()
    reload()
    seen.append(data.fingerprint(arrays(out)))
    assert seen[0]["arrays"].startswith("10 files (")  # the list, five shards, and two more for each bucket
    assert seen[0] != seen[1]


# --- runs


def test_a_run_is_built_for_squares_and_every_bucket_is_checked(made, out, monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "check_bucket", lambda shape, frozen, batch: seen.append((shape, batch["x0"].shape)))
    c = on_rows(made, out, report=True, eval_every=2)
    parts = build.build(config.resolve(c), checks.training_splits(config.resolve(c).run))
    assert parts.batch["x0"].shape == (8, 8, 8, 4)
    assert seen == [((16, 16), (8, 8, 8, 4)), ((12, 24), (8, 6, 12, 4))]
    assert "training images in 2 buckets, for each of which a program is compiled: 16x16 3, 24x12 5" in (
        train.overview(parts)
    )


def test_rows_that_differ_from_squares_in_more_than_their_sides_are_refused(made, out):
    of = arrays(out)
    found, squares = (checks.shapes_of(x) for x in (data.first_of_each(of)[12, 24], checks.first_rows(of)))
    assert (found["x0"], squares["x0"]) == ((6, 12, 4), (8, 8, 4))
    checks.check_like_squares(of, (12, 24), found, squares)
    for other in (squares | {"x0": (8, 8, 3)}, squares | {"cond": (16, 16, 3)}, squares | {"text.class_labels": (2,)}):
        with pytest.raises(ValueError, match="the bucket 24x12 of .* has .*, and its validation split .*: encode both"):
            checks.check_like_squares(of, (12, 24), found, other)


@pytest.mark.slow
def test_a_run_on_encoded_rows_resumes_and_loses_as_one_on_images(made, out, tmp_path, capsys):
    """A run in two parts has the losses of one, and those of a run on the images to the rounding of float16."""
    losses = {}
    for name, c, parts in (
        ("images", settings(made, batch_size=8), (4,)),
        ("whole", on_rows(made, out), (4,)),
        ("parts", on_rows(made, out), (2, 4)),
    ):
        for steps in parts:
            c.steps = steps
            assert train.train(c, tmp_path / name) == 0
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = {r["step"]: r["student/loss"] for r in records if "student/loss" in r}
    assert losses["parts"] == losses["whole"]
    assert {*losses["whole"]} == {1, 2, 3, 4}
    np.testing.assert_allclose([*losses["whole"].values()], [*losses["images"].values()], rtol=2e-3)
    with np.load(tmp_path / "whole" / "example.npz") as example:
        assert example["x0"].shape == (1, 8, 8, 4)

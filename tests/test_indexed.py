"""Images in shards: WebDataset tars, parquet and ArrayRecord, their index, damaged samples, and orders of reading."""

import dataclasses
import io
import json
import os
import tarfile

import msgpack
import numpy as np
import pytest
from PIL import Image

from cddistill.data import SOURCES, batches, configure, examples, fingerprint, load, order_digest, splits
from cddistill.data import index as index_file
from cddistill.data.indexed import divide
from cddistill.data.sources import array_record

N = 24
SHARDS = {
    f"{split}-0000{k}": range(12 * i + 6 * k, 12 * i + 6 * k + 6)
    for i, split in enumerate(("train", "test"))
    for k in (0, 1)
}
FORMATS = ("webdataset", "parquet", "array_record")


def picture(i):
    """An image file, all of whose pixels differ from those of the others: two high ones, two wide ones, and so on."""
    shape = (10, 20 if i // 2 % 2 else 8, 3)
    Image.fromarray(np.random.default_rng(i).integers(0, 255, shape, np.uint8)).save(file := io.BytesIO(), "png")
    return file.getvalue()


PICTURES = [picture(i) for i in range(N)]


def tar(path, members):
    """Write {name: content} as a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def webdataset(root, shard, numbers):
    samples = (
        {f"{i:04}.png": PICTURES[i], f"{i:04}.txt": f"picture {i}".encode(), f"{i:04}.cls": b"%d" % (i % 9)}
        for i in numbers
    )
    tar(root / f"{shard}.tar", {name: x for sample in samples for name, x in sample.items()})


def parquet(root, shard, numbers):
    columns = {"jpg": [PICTURES[i] for i in numbers], "caption": [f"picture {i}" for i in numbers]}
    columns |= {"label": [i % 9 for i in numbers], "url": ["http://..."] * len(numbers)}
    write_table(root / f"{shard}.parquet", columns, row_group_size=4)


def write_table(path, columns, **options):
    """Write {name: values} as a parquet file."""
    table = pytest.importorskip("pyarrow").table(columns)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **options)


def array_records(root, shard, numbers):
    rows = [{"image": PICTURES[i], "caption": f"picture {i}", "label": i % 9} for i in numbers]
    records(root / f"{shard}.array_record", rows)


def records(path, rows):
    """Write rows as an ArrayRecord file, every second as an Example."""
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for i, row in enumerate(rows):
        writer.write(example(row) if i % 2 else msgpack.packb(row))
    writer.close()


def example(row):
    """A serialised tf.train.Example."""
    message = array_record.example()()
    for key, value in row.items():
        entry = message.features.feature.add(key=key)
        if isinstance(value, int):
            entry.value.int64_list.value.append(value)
        else:
            entry.value.bytes_list.value.append(value if isinstance(value, bytes) else value.encode())
    return message.SerializeToString()


WRITERS = {"webdataset": webdataset, "parquet": parquet, "array_record": array_records}


def write(root, source="webdataset", shards=SHARDS):
    for shard, numbers in shards.items():
        WRITERS[source](root, shard, numbers)
    return root


def of(root, source="webdataset", **changes):
    return configure(source=source, path=str(root), **({"size": 8} | changes))


def by_caption(config, split):
    """{caption: (x0, label)} of a split."""
    data = examples(config, split)
    return {caption: (x0, label) for caption, x0, label in zip(data["caption"], data["x0"], data["label"], strict=True)}


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """The cache of indices is no user's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same pictures as a folder, as Hugging Face's imagefolder."""
    root = tmp_path_factory.mktemp("folder")
    rows = ["file_name,text,label"]
    for shard, numbers in SHARDS.items():
        for i in numbers:
            (root / shard.split("-")[0]).mkdir(exist_ok=True)
            (root / (name := f"{shard.split('-')[0]}/{i}.png")).write_bytes(PICTURES[i])
            rows.append(f"{name},picture {i},{i % 9}")
    (root / "metadata.csv").write_text("\n".join(rows))
    return root


# --- formats


@pytest.mark.parametrize("source", FORMATS)
def test_each_format_gives_what_a_folder_of_the_same_images_gives(source, folder, tmp_path, capsys):
    config = of(write(tmp_path, source), source)
    assert len(load(config, "train")) == 12
    assert f"{tmp_path}: 4 shards, 24 images; train 12, validation 0, test 12, by shard\n" in capsys.readouterr().out
    for split in ("train", "test"):
        found, expected = by_caption(config, split), by_caption(of(folder, "folder"), split)
        assert {*found} == {*expected}
        for caption, (x0, label) in expected.items():
            np.testing.assert_array_equal(found[caption][0], x0)
            assert found[caption][1] == label


def test_members_beside_the_image_are_read(tmp_path):
    depth = io.BytesIO()
    np.save(depth, np.arange(80.0).reshape(10, 8))
    members = {
        "a/1.jpg": PICTURES[0],  # by its content a PNG
        "a/1.json": json.dumps({"caption": "from json", "label": 3, "url": "x", "width": 8}).encode(),
        "a/1.edited.png": PICTURES[1],
        "a/1.depth.npy": depth.getvalue(),
        "../../x.png": PICTURES[2],  # only a name: nothing is unpacked
        "../../x.txt": "café\n".encode(),
        "plain": b"of no sample",
        f"{'long/' * 40}y.jpg": PICTURES[3],  # two headers
    }
    tar(tmp_path / "a.tar", members)
    source = load(of(tmp_path, split="all"), "train").source
    element, *others = sorted(
        (source.element(i, None) for i in range(3)), key=lambda x: (x["label"], -len(x["caption"]))
    )
    assert [(x["caption"], x["label"]) for x in (element, *others)] == [("from json", 3), ("café", 9), ("", 9)]
    assert element["edited"].shape == (8, 8, 3)
    assert element["depth_map"].shape == (8, 8)
    assert not [*tmp_path.parent.glob("x*")]


def test_rows_of_hugging_face_and_edits_are_read(tmp_path):
    images = [{"bytes": PICTURES[i], "path": f"{i}.png"} for i in range(3)]
    row = {"original_image": images[:1], "edited_image": images[1:2], "edit_prompt": ["make it red"]}
    write_table(tmp_path / "a.parquet", row)
    element = load(of(tmp_path, "parquet", split="all"), "train").source.element(0, None)
    assert element["instruction"] == "make it red"
    assert (element["image"] != element["edited"]).any()


# --- splits


@pytest.mark.parametrize("rule", splits.RULES)
@pytest.mark.parametrize("places", [("a", "b", "c"), ("train", "val", "b"), ("train", "test", "validation")])
def test_rows_are_split_and_ordered_as_names(rule, places):
    names = [f"{place}/{k}/{i}" for k, place in enumerate(places) for i in range(40)]
    rows = np.zeros(120, index_file.ROW)
    rows["digest"] = [splits.digest(name) for name in names]
    shards = [{"name": f"{place}/{k}", "rows": 40} for k, place in enumerate(places)]
    folders = {} if rule == "hash" else splits.split_folders(names)
    expected = splits.RULES[rule](names, folders)
    found = divide(
        index_file.Index(None, shards, rows), [folders.get(place) for place in places] if folders else None, rule
    )
    assert {split: [names[i] for i in part] for split, part in found.items()} == expected


# --- the index


def scans(monkeypatch):
    """The shards that are read from now on."""
    seen, scan = [], SOURCES["webdataset"].format.scan
    monkeypatch.setattr(
        type(SOURCES["webdataset"].format), "scan", lambda self, path, shard: seen.append(shard) or scan(path, shard)
    )
    return seen


def fresh(root, **changes):
    """The training split, as another process opens it."""
    from cddistill.data import indexed, loader

    indexed.scan.cache_clear()
    loader.open_source.cache_clear()
    return load(of(root, **changes), "train")


def test_an_index_is_built_once_and_a_changed_shard_is_read_again_and_named(tmp_path, monkeypatch, caplog):
    root, seen = write(tmp_path), scans(monkeypatch)
    fresh(root)
    before = fingerprint(of(root))
    assert sorted(seen) == sorted(f"{shard}.tar" for shard in SHARDS)
    assert fresh(root).source.index.rows.filename.parent == root / ".cddistill"
    assert len(seen) == 4
    webdataset(root, "train-00001", range(7, 12))
    os.utime(root / "train-00001.tar", (1, 1))
    (root / "test-00000.tar").unlink()
    assert len(fresh(root)) == 11
    assert seen[4:] == ["train-00001.tar"]
    assert "train-00001.tar: changed since it was indexed: read again" in caplog.text
    assert "test-00000.tar: gone" in caplog.text
    assert {*by_caption(of(root), "train")} == {f"picture {i}" for i in range(12) if i != 6}
    assert fingerprint(of(root)) != before
    assert len([*(root / ".cddistill").iterdir()]) > 2
    fresh(root)
    assert len([*(root / ".cddistill").iterdir()]) == 2  # what was replaced is gone


def test_an_interrupted_index_goes_on_where_it_was(tmp_path, monkeypatch):
    root, seen, write_index = write(tmp_path), scans(monkeypatch), index_file.write
    with monkeypatch.context() as patch:
        patch.setattr(index_file, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fresh(root)
    lost = next((root / ".cddistill").glob("shard.*"))
    lost.unlink()
    assert index_file.write is write_index
    assert len(fresh(root)) == 12
    assert len(seen) == 5


def test_the_index_of_a_folder_that_cannot_be_written_lies_in_the_cache(tmp_path, monkeypatch, caplog):
    root, seen = write(tmp_path), scans(monkeypatch)
    (root / ".cddistill").write_text("in the way")
    assert len(fresh(root)) == len(fresh(root)) == 12
    assert len(seen) == 4
    assert "the index of the shards goes to" in caplog.text


def test_a_damaged_index_is_named(tmp_path):
    root = write(tmp_path)
    fresh(root)
    next((root / ".cddistill").glob("rows.*")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"the index .*index.tar.json is damaged .*: delete its folder"):
        fresh(root)


# --- what is damaged or missing


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: (root / "a.tar").write_bytes(b"no tar"), r"1 of 5 shards .* a.tar is no whole tar file"),
        (lambda root: (root / "a.tar").write_bytes(b""), "a.tar is no whole tar file"),
        (lambda root: [path.unlink() for path in root.glob("*.tar")], "there is no shard in .*: expected a folder of"),
        (lambda root: [path.unlink() for path in root.glob("train*")], "the train split of .* is empty .*name shards"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_used_are_named(tmp_path, change, sentence):
    change(write(tmp_path))
    with pytest.raises(ValueError, match=sentence) as error:
        load(of(tmp_path), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("source", "suffix"), [("parquet", "parquet"), ("array_record", "array_record")])
def test_a_file_of_another_format_is_named(tmp_path, source, suffix):
    write(tmp_path, source)
    (tmp_path / f"train-00000.{suffix}").write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"train-00000.{suffix} is no whole") as error:
        load(of(tmp_path, source), "train")
    assert "\n" not in str(error.value)
    assert len(load(of(tmp_path, source, skip_bad=True), "train")) == 6


def test_columns_without_an_image_are_named(tmp_path):
    write_table(tmp_path / "a.parquet", {"url": ["x"], "caption": ["y"]})
    with pytest.raises(
        ValueError, match="a.parquet has the columns caption, url, and images are expected under image or"
    ):
        load(of(tmp_path, "parquet"), "train")


@pytest.mark.parametrize("kind", ["cut off", "cut off in a header", "header overwritten"])
def test_of_a_damaged_tar_the_whole_samples_before_are_used(tmp_path, kind):
    root = write(tmp_path, shards={"train-0": range(6)})
    path = root / "train-0.tar"
    content = path.read_bytes()
    at = content.index(b"0002.png")
    lengths = {"cut off": 600, "cut off in a header": 100}
    rest = b"damage" + content[at + 6 :] if kind == "header overwritten" else content[at : at + lengths[kind]]
    path.write_bytes(content[:at] + rest)
    with pytest.raises(ValueError, match="train-0.tar is no whole tar file .*skip_bad=True"):
        load(of(root), "train")
    found = {*by_caption(of(root, skip_bad=True), "train")}
    assert found == {"picture 0"} | ({"picture 1"} if kind == "cut off" else set())  # the rest may belong to it


def test_samples_without_an_image_or_a_caption_are_counted(tmp_path, capsys):
    tar(tmp_path / "a.tar", {"1.png": PICTURES[1], "2.txt": b"alone", "3.png": PICTURES[3], "3.txt": b"three"})
    assert {*by_caption(of(tmp_path, split="all"), "train")} == {"", "three"}
    said = capsys.readouterr().out
    assert "1 shards, 2 images, 1 without a caption, 1 samples without an image left out (2 in a.tar);" in said


BAD = {
    "image": ({"0003.png": PICTURES[3][:60]}, "0003 in train-00000.tar cannot be read"),
    "label": ({"0003.cls": b"cat"}, "0003 in train-00000.tar: its label 'cat' is the name of a class"),
    "caption": ({"0003.txt": b"\xe9"}, "0003 in train-00000.tar: .* is not text in UTF-8"),
    "twice": ({"0003.jpg": PICTURES[4]}, "0003 in train-00000.tar has two members for its image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_named_or_replaced_by_the_next_on_every_host(tmp_path, kind, caplog):
    change, sentence = BAD[kind]
    root = write(tmp_path)
    members = {}
    for i in range(6):
        members |= {f"{i:04}.png": PICTURES[i], f"{i:04}.txt": f"picture {i}".encode(), f"{i:04}.cls": b"1"}
        members |= change if i == 3 else {}
    tar(root / "train-00000.tar", members)
    with pytest.raises(ValueError, match=f"1 of 12 images in .*: {sentence}"):
        load(of(root), "train")
    config = of(root, skip_bad=True)
    dataset = load(config, "train", augment=False)
    captions = [dataset.item(i, np.random.default_rng(0))["caption"] for i in range(12)]
    assert len(dataset) == 12
    assert len({*captions}) == 11
    again = next(k for k in range(12) if captions[k] == captions[(k + 1) % 12])
    assert captions[again] != "picture 3"
    assert "replaced by the next (1 so far)" in caplog.text


def test_a_shard_that_was_mended_is_read_by_the_next_attempt(tmp_path):
    root = write(tmp_path)
    tar(root / "train-00000.tar", {"1.png": b"nothing"})
    with pytest.raises(ValueError, match="1 in train-00000.tar cannot be read"):
        load(of(root), "train")
    webdataset(root, "train-00000", range(3))
    assert len(load(of(root), "train")) == 9


def test_if_all_images_are_bad_the_run_stops(tmp_path):
    tar(tmp_path / "a.tar", {f"{i}.png": b"nothing" for i in range(3)})
    with pytest.raises(ValueError, match="none of the 3 checked images .* can be used"):
        load(of(tmp_path, split="all", skip_bad=True), "train")


def test_what_the_disk_fails_to_read_is_read_again_and_not_replaced(tmp_path, monkeypatch, caplog):
    from cddistill.data import listing
    from cddistill.data.sources import webdataset as source

    monkeypatch.setattr(listing, "WAITS", (0,))
    dataset, pread, left = load(of(write(tmp_path), skip_bad=True), "train", augment=False), os.pread, [1]

    def failing(*args):
        if left and left.pop():
            raise OSError(5, "Input/output error")
        return pread(*args)

    rng, clean = np.random.default_rng(0), dataset.item(0, np.random.default_rng(0))
    monkeypatch.setattr(source.os, "pread", failing)
    assert dataset.item(0, rng)["caption"] == clean["caption"]
    assert "reading again" in caplog.text
    monkeypatch.setattr(source.os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        dataset.item(0, rng)


def test_only_some_images_are_read_when_a_split_is_opened(tmp_path, monkeypatch):
    from cddistill.data import listing

    monkeypatch.setattr(listing, "CHECKED", 4)
    images, read = type(SOURCES["webdataset"].format), []
    sample = images.sample
    monkeypatch.setattr(images, "sample", lambda *args: read.append(args) or sample(*args))
    assert len(load(of(write(tmp_path)), "train")) == 12
    assert len(read) == 4


# --- order


def captions(config, start, steps, rows=slice(None), batch_size=4):
    stream = batches(config, batch_size=batch_size, seed=1, start=start, rows=rows, prepare=dict)
    return [caption for _ in range(steps) for caption in next(stream)["caption"]]


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("source", FORMATS)
def test_order_depends_on_the_seed_and_the_position_alone(tmp_path, source, window):
    config = of(write(tmp_path, source), source, window=window)
    whole = captions(config, 0, 9)
    assert {*whole[:12]} == {*whole[12:24]} == {f"picture {i}" for i in range(12)}
    assert whole[:12] != whole[12:24]
    assert captions(dataclasses.replace(config, threads=1), 4, 5) == whole[16:]
    halves = [captions(config, 0, 9, rows) for rows in (slice(0, 2), slice(2, 4))]
    assert [x for k in range(9) for half in halves for x in half[2 * k : 2 * k + 2]] == whole
    first, again, other = (order_digest(config, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_with_a_window_shards_are_read_one_after_another(tmp_path):
    shards = {f"train-{k}": range(4 * k, 4 * k + 4) for k in range(6)}
    found = captions(of(write(tmp_path, shards=shards), window=8), 0, 12)
    numbers = [int(caption.split()[1]) // 4 for caption in found]
    for epoch in (numbers[:24], numbers[24:]):
        pairs = [{*epoch[k : k + 8]} for k in (0, 8, 16)]
        assert [len(pair) for pair in pairs] == [2, 2, 2]  # shards in each window
        assert set.union(*pairs) == {*range(6)}
    assert numbers[:24] != numbers[24:]
    assert sorted(numbers[:8]) != numbers[:8]  # shuffled inside


def test_a_window_needs_shards(folder):
    with pytest.raises(ValueError, match="data.window=9 needs data in shards"):
        batches(of(folder, "folder", window=9), batch_size=2, seed=0)


# --- size


def test_an_index_of_many_rows_opens_without_a_python_object_for_each(tmp_path, monkeypatch):
    """benchmarks/index.py measures the same with 12 million rows."""
    import tracemalloc

    n, shards = 60_000, 6
    for k in range(shards):
        tar(tmp_path / f"{k:03}.tar", {"0.png": PICTURES[0]})
    size = (tmp_path / "000.tar").stat().st_size
    rows = np.zeros(n // shards, index_file.ROW)
    rows["size"] = size
    counter = iter(range(shards))

    def scan(self, path, shard):
        return index_file.Found(rows=stamped(rows, next(counter)))

    def stamped(rows, k):
        rows = rows.copy()
        rows["digest"] = np.random.default_rng(k).integers(0, 2**63, len(rows))
        return rows

    monkeypatch.setattr(type(SOURCES["webdataset"].format), "scan", scan)
    fresh(tmp_path)
    tracemalloc.start()
    dataset = fresh(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == pytest.approx(0.8 * n, rel=0.01)
    assert kept < 8 * n  # a number of 4 bytes of each row; a Python object takes 28 or more
    assert peak < 40 * n

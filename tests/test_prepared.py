"""Data sets as other programs leave them: a prepared folder of tensorflow-datasets, and metadata.parquet."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from test_indexed import PICTURES, example, write_table

from cddistill.data import configure, examples, load

INFO = {
    "name": "mine", "version": "1.0.0", "fileFormat": "array_record", "splits": [{
        "name": "train", "numBytes": "100", "shardLengths": ["10"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}],
}  # fmt: skip


@pytest.fixture
def prepared(tmp_path):
    """A folder as `download_and_prepare` leaves it, of ten pictures."""
    tfds = pytest.importorskip("tensorflow_datasets")
    module = pytest.importorskip("array_record.python.array_record_module")
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=9)}
    tfds.features.FeaturesDict(features | {"caption": tfds.features.Text()}).save_config(folder)
    writer = module.ArrayRecordWriter(str(folder / "mine-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(10):
        writer.write(example({"image": PICTURES[i], "caption": f"picture {i}", "label": i % 9}))
    writer.close()
    (folder / "dataset_info.json").write_text(json.dumps(INFO))
    return folder


def of(folder, **changes):
    return configure(source="tfds", path=str(folder), **({"size": 8} | changes))


def test_a_prepared_folder_is_read_as_it_lies_there(prepared):
    train, test = examples(of(prepared), "train"), examples(of(prepared), "test")
    assert [train["caption"], test["caption"]] == [[f"picture {i}" for i in range(8)], ["picture 9"]]
    assert train["label"].tolist() == [*range(8)]
    assert "tensorflow" not in sys.modules


def test_its_sizes_are_known(prepared):
    """The pictures are 10 px high and 8 px wide."""
    item = load(of(prepared, size_conditions="own", flip=False)).item(0, np.random.default_rng(0))
    assert item["time_ids"].tolist() == [10, 8, 1, 0, 8, 8]


def test_other_folders_are_refused(prepared):
    info = prepared / "dataset_info.json"
    with pytest.raises(ValueError, match=r"folder .* has no dataset_info.json: set it to one of mine/1.0.0 in it"):
        load(of(prepared.parents[1]))
    info.write_text(json.dumps(INFO | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="has tfrecord files, and only ArrayRecord can be read at random: prepare it"):
        load(of(prepared))
    info.write_text("{")
    with pytest.raises(ValueError, match=r"dataset in .* cannot be opened .*: prepare it again"):
        load(of(prepared))
    info.unlink()
    with pytest.raises(ValueError, match="has no dataset_info.json: set it to one that tensorflow-datasets prepared"):
        load(of(prepared))


# --- metadata.parquet


def pictures(root):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(root / f"{name}.png")
    return configure(source="folder", path=str(root), split="all", size=8)


def test_metadata_may_be_parquet(tmp_path, capsys):
    columns = {"file_name": ["a.png", "b.png"], "Text": ["one", "two"], "label": [1, None], "pixels": [b"0", b"1"]}
    write_table(tmp_path / "metadata.parquet", columns)
    found = examples(pictures(tmp_path), "train")
    assert dict(zip(found["caption"], found["label"], strict=True)) == {"one": 1, "two": 9}
    assert "metadata keys not used: pixels" in capsys.readouterr().out


def test_rows_that_cannot_be_used_are_named(tmp_path):
    write_table(
        tmp_path / "metadata.parquet", {"file_name": ["a.png", "b.png"], "text": ["one", "two"], "label": [1, -1]}
    )
    with pytest.raises(ValueError, match="row 2 of .*metadata.parquet .* a label must not be negative"):
        load(pictures(tmp_path))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "metadata.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"needs pyarrow: pip install cddistill\[data\], or write it as metadata.jsonl"
    ):
        load(pictures(tmp_path))

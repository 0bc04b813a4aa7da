"""Folders of images as people have them: which files are read, their captions and labels, splits, and clear errors."""

import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cddistill import sharding
from cddistill.data import DataConfig, batches, configure, examples, load, splits
from cddistill.data.sources import folder

RED = Image.new("RGB", (8, 8), (255, 0, 0))


def write(root, files):
    """Write {path: PIL image, text or bytes} below a folder, and return it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def of(path, **changes):
    return configure(source="folder", path=str(path), **({"size": 8} | changes))


def names(root, part="train", **changes):
    """The images of a split; [] if it is empty."""
    config = of(root, **changes)
    if not folder.scan(config.source, config.path, config.skip_bad).parts[part]:
        with pytest.raises(ValueError, match=f"the {part} split of folder .* is empty"):
            load(config, part)
        return []
    return sorted(load(config, part).source.names)


def captions_of(root, part="train", **changes):
    """{image: caption} of a split."""
    dataset = load(of(root, **changes), part, augment=False)
    rng = np.random.default_rng(0)
    return {name: dataset.item(i, rng)["caption"] for i, name in enumerate(dataset.source.names)}


def labels_of(root, part="train", **changes):
    """{image: label} of a split."""
    dataset = load(of(root, **changes), part, augment=False)
    return {name: dataset.source.element(i, None)["label"] for i, name in enumerate(dataset.source.names)}


def lines(*records, end="\n"):
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


def grey(level=100, size=(40, 30)):
    return Image.new("RGB", size, (level,) * 3)


@pytest.fixture
def squares(tmp_path):
    return write(tmp_path, {f"sub/{i}.png": grey(8 * i) for i in range(30)})


# --- captions: where they are, and how files and keys are spelt


def test_folder_splits_captions_and_labels(squares):
    (squares / "sub/0.txt").write_text("a dark square\n")
    rows = [{"file_name": f"sub/{i}.png", "text": f"grey {8 * i}", "label": i % 3} for i in range(1, 30)]
    (squares / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, levels = [], []
    for split in splits.SPLITS:
        data = examples(of(squares), split)
        found += data["caption"]
        for caption, label, x0 in zip(data["caption"], data["label"], data["x0"], strict=True):
            level = round((x0.mean() + 1) * 127.5)
            levels.append(level)
            assert (caption, label) == (("a dark square", 9) if level == 0 else (f"grey {level}", level // 8 % 3))
    assert sorted(levels) == [8 * i for i in range(30)]
    assert sorted(found) == sorted(["a dark square", *(row["text"] for row in rows)])


WINDOWS = "\ufeff" + lines({"file": "a.png", "caption": "red"}, end="\r\n") + "\r\n \r\n"
METADATA = {
    "beside the split": {"train/metadata.jsonl": lines({"file_name": "a.png", "text": "red"})},
    "in the root, with the split": {"metadata.jsonl": lines({"file_name": "train/a.png", "text": "red"})},
    "beside the split, with the split": {"train/metadata.jsonl": lines({"file_name": "train/a.png", "text": "red"})},
    "csv": {"train/metadata.csv": "file_name,text\na.png,red\n"},
    "csv in the root": {"metadata.csv": 'id,file_name,text\n1,train/a.png,"red"\n'},
    "csv of a spreadsheet": {"train/metadata.csv": b"\xef\xbb\xbfFile_Name, Text\r\na.png, red\r\n\r\n,\r\n"},
    "csv in UTF-16": {"train/metadata.csv": "file_name,text\r\na.png,red\r\n".encode("utf-16")},
    "blank lines first": {"train/metadata.csv": "\n\nfile_name,text\n\na.png,red\n"},
    "mark and line ends of Windows": {"train/metadata.jsonl": WINDOWS},
    "file and caption": {"train/metadata.jsonl": lines({"file": "a.png", "caption": "red"})},
    "image and prompt": {"train/metadata.jsonl": lines({"image": "a.png", "prompt": "red"})},
    "path and additional_feature": {"train/metadata.csv": "filepath,additional_feature\na.png,red\n"},
    "first key without a value": {"train/metadata.jsonl": lines({"file_name": "a.png", "text": None, "prompt": "red"})},
    "NaN of a table": {"train/metadata.jsonl": '{"file_name": "a.png", "text": NaN, "description": "red"}'},
    "the nearest file": {
        "metadata.jsonl": lines({"file_name": "train/a.png", "text": "far"}),
        "train/metadata.csv": "file_name,text\na.png,red\n",
    },
    "the same line twice": {"train/metadata.jsonl": lines(*[{"file_name": "a.png", "text": "red"}] * 2)},
    "text file": {"train/a.txt": "red\n"},
    "caption file": {"train/a.caption": "red\n"},
    "suffix in capitals": {"train/a.TXT": "red\n"},
    "text file before caption file": {"train/a.caption": "dark red", "train/a.txt": "red"},
    "metadata before text file": {"train/metadata.csv": "file_name,text\na.png,red\n", "train/a.txt": "other"},
    "text file where the metadata has none": {"train/metadata.csv": "file_name,text\na.png,\n", "train/a.txt": "red"},
    "text file with a mark": {"train/a.txt": b"\xef\xbb\xbfred\r\n"},
    "text file in UTF-16, little end": {"train/a.txt": b"\xff\xfe" + "red\r\n".encode("utf-16-le")},
    "text file in UTF-16, big end": {"train/a.txt": b"\xfe\xff" + "red".encode("utf-16-be")},
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_a_caption_is_found(tmp_path, case):
    assert captions_of(write(tmp_path, {"train/a.png": RED} | METADATA[case])) == {"train/a.png": "red"}


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", 'café — 猫, "x"', "a\x1cb", " two\nlines "])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_caption_is_read_as_it_was_written(tmp_path, text, kind):
    quoted = '"' + text.replace('"', '""') + '"'
    table = {"jsonl": lines({"file_name": "a.png", "text": text}), "csv": f"file_name,text\na.png,{quoted}\n"}
    root = write(tmp_path, {"train/a.png": RED, f"train/metadata.{kind}": table[kind]})
    assert captions_of(root) == {"train/a.png": text}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.png", "./a.png"),
        ("cats/a.png", "cats\\a.png"),
        ("a.PNG", "a.png"),
        ("a.JPG", "a.Jpg"),
        ("a.png", "../train/a.png"),
        ("a.png", "{root}/train/a.png"),
        ("a b.c.png", " a b.c.png "),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
        (unicodedata.normalize("NFC", "ü/é.png"), unicodedata.normalize("NFD", "ü/é.png")),
    ],
)
def test_a_name_in_metadata_may_be_spelt_otherwise(tmp_path, file, name):
    row = {"file_name": name.format(root=tmp_path), "text": "red"}
    root = write(tmp_path, {f"train/{file}": RED, "train/metadata.jsonl": lines(row)})
    assert captions_of(root) == {f"train/{file}": "red"}


def test_the_exact_spelling_goes_first(tmp_path):
    rows = [{"file_name": name, "text": name} for name in ("a.png", "a.PNG")]
    root = write(tmp_path, {"train/a.png": RED, "train/a.PNG": RED, "train/metadata.jsonl": lines(*rows)})
    assert captions_of(root) == {"train/a.png": "a.png", "train/a.PNG": "a.PNG"}


def test_a_spelling_of_two_images_is_refused(tmp_path):
    row = {"file_name": "a.Png", "text": "red"}
    root = write(tmp_path, {"train/a.png": RED, "train/a.PNG": RED, "train/metadata.jsonl": lines(row)})
    with pytest.raises(ValueError, match=r"line 1 of .*a.Png may be train/a.PNG or train/a.png: spell it as one"):
        load(of(root))


def test_two_images_share_a_text_file(tmp_path):
    root = write(tmp_path, {"train/a.jpg": RED, "train/a.png": RED, "train/a.txt": "red"})
    assert captions_of(root) == {"train/a.jpg": "red", "train/a.png": "red"}


# --- captions: errors, in a sentence that names file and line

JSONL, CSV = "train/metadata.jsonl", "train/metadata.csv"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"train/a.txt": b"caf\xe9"}, r"1 of 1 captions in .*a\.txt: 'caf\\udce9' is not text in UTF-8: save"),
        ({"test/b.png": RED, "test/b.txt": b"\xa9"}, r"1 of 1 captions in .*b\.txt"),  # whichever split is opened
        ({"train/a.txt": "red".encode("utf-16-le")}, r"a\.txt: 'r\\x00e\\x00d\\x00' is not text in UTF-8"),
        ({"train/a.txt": b"\xff\xfer"}, r"a\.txt is not text in UTF-16, as its first bytes say"),
        ({JSONL: b'\n{"file_name": "a.png", "text": "caf\xe9"}'}, "line 2 of .*jsonl is not like .*UTF-8"),
        ({CSV: b"file_name,text\na.png,caf\xe9\n"}, "line 2 of .*csv is not like a.jpg,a cat: .*UTF-8"),
        ({CSV: b"file_name,text\ncaf\xe9.png,x\n"}, "line 2 of .*csv .*UTF-8"),
        ({CSV: b"\xff\xfer"}, "metadata.csv is not text in UTF-16"),
        ({JSONL: '{"file_name": "a.png", "text": "\\ud800"}'}, "line 1 of .* is not text in UTF-8"),
        ({CSV: "file_name,text\na.png,a red, round ball\n"}, "line 2 of .* 3 cells for 2 columns; quote"),
        ({CSV: 'file_name,text\na.png,"red\nb.png,blue\n'}, "line 3 of .*csv is not CSV"),
        ({CSV: "file_name;text\na.png;red\n"}, "line 2 of .*csv .*it has no file name under file_name"),
        ({JSONL: '{"file_name": "a.png", "blip": "red"}'}, "has the keys blip, and captions are expected under"),
        ({CSV: "file_name,tags,width\na.png,red,8\n"}, "csv has the keys tags, width, and .*: rename"),
        ({JSONL: '{"file_name": "a.png", "text": ["red", "dark"]}'}, r"text is \['red', 'dark'\]; write one text"),
        ({CSV: "file_name,text\na.png,red\na.png,blue\n"}, "line 3 of .*train/a.png has another text|caption"),
        ({"metadata.csv": "file_name,text\na.png,red"}, "none of the 1 names in .*, such as 'a.png', is an image"),
        ({"train/metadata.parquet": b"PAR1"}, r"metadata.parquet cannot be read \(.*\): write it again"),
        ({JSONL: '{"file_name": "a.png", "label": 1.5}'}, "a label must be a whole number or a name, not 1.5"),
        ({CSV: "file_name,label\na.png,-1\n"}, "line 2 of .* a label must not be negative"),
        ({"train/b.png": RED, CSV: "file_name,label\na.png,1\nb.png,cat\n"}, r"both numbers \(1\) and names \(cat\)"),
        ({JSONL: "[]"}, "line 1 of .*metadata.jsonl is not like .*: it is a list"),
        ({JSONL: '{"image": {"bytes": null}, "text": "red"}'}, "line 1 of .* no file name under"),
    ],
)  # fmt: skip
def test_captions_that_cannot_be_used_are_refused(tmp_path, files, sentence):
    root = write(tmp_path, {"train/a.png": RED} | files)
    with pytest.raises(ValueError, match=sentence) as error:
        load(of(root))
    assert "\n" not in str(error.value)


def test_skip_bad_leaves_out_images_with_unreadable_captions_and_lines_of_metadata(tmp_path, caplog, capsys):
    rows = '{"file_name": "c.png", "text": "blue"}\n{"file_name":\n'
    files = {"train/a.png": RED, "train/b.png": RED, "train/c.png": RED, "train/a.txt": b"\xe9", "train/b.txt": "red"}
    root = write(tmp_path, files | {"train/metadata.jsonl": rows})
    assert captions_of(root, skip_bad=True) == {"train/b.png": "red", "train/c.png": "blue"}
    assert "1 lines of metadata.jsonl cannot be used: line 2 of" in caplog.text
    assert "1 of 2 captions in" in caplog.text
    assert "left out" not in capsys.readouterr().out


def test_a_text_file_is_read_once(tmp_path, monkeypatch):
    root = write(
        tmp_path,
        {
            f"{split}/{i}.{s}": RED if s == "png" else "red"
            for split in splits.SPLITS
            for i in range(3)
            for s in ("png", "txt")
        },
    )
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    for split in splits.SPLITS * 2:
        assert {*captions_of(root, split).values()} == {"red"}
    assert len(read) == 9


# --- labels


def test_names_of_classes_become_labels_in_sorted_order(tmp_path, capsys):
    rows = [
        {"file_name": f"{split}/{i}.png", "label": name}
        for split in ("train", "test")
        for i, name in enumerate(("dog", "ant"))
    ]
    root = write(tmp_path, {row["file_name"]: RED for row in rows} | {"metadata.jsonl": lines(*rows)})
    assert labels_of(root) == {"train/0.png": 1, "train/1.png": 0}
    assert labels_of(root, "test") == {"test/0.png": 1, "test/1.png": 0}
    assert "4 labels (ant, dog)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="folder has 2 labels; data.num_classes is 1"):
        load(of(root, num_classes=1))


def test_labels_of_a_table_are_whole_numbers(tmp_path):
    table = {"train/metadata.csv": "file_name,label\na.png,3\nb.png,\nc.png,0\n"}
    more = {"train/metadata.jsonl": lines({"file_name": "d.png", "label": 2.0}, {"file_name": "e.png", "label": "7"})}
    root = write(tmp_path, {f"train/{name}.png": RED for name in "abcde"} | table | more)
    assert labels_of(root) == {f"train/{name}.png": label for name, label in zip("abcde", (3, 9, 0, 2, 7), strict=True)}


def test_class_folders_are_labels_on_demand(tmp_path, capsys):
    root = write(
        tmp_path, {f"{split}/{name}/1.png": RED for split in ("train", "val") for name in ("dog", "cat", "ant")}
    )
    assert {*labels_of(root).values()} == {9}
    assert "data.folder_labels=True makes labels of the folders (ant, cat, dog)" in capsys.readouterr().out
    expected = {"val/ant/1.png": 0, "val/cat/1.png": 1, "val/dog/1.png": 2}
    assert labels_of(root, "validation", folder_labels=True) == expected
    assert "6 labels (ant, cat, dog)" in capsys.readouterr().out


def test_labels_come_from_the_folders_or_the_metadata(tmp_path):
    table = {"train/metadata.csv": "file_name,label\ndog/1.png,0\n"}
    root = write(tmp_path, {"train/dog/1.png": RED, "train/cat/1.png": RED} | table)
    assert labels_of(root) == {"train/dog/1.png": 0, "train/cat/1.png": 9}
    with pytest.raises(ValueError, match="data.folder_labels=True, and the metadata in .* has labels too"):
        load(of(root, folder_labels=True))


def test_class_folders_without_splits_are_labels(tmp_path):
    root = write(tmp_path, {f"{name}/{i}.png": RED for name in ("train", "plane") for i in range(20)})
    assert len(names(root)) == 20  # train/ alone is a split
    labels = labels_of(root, folder_labels=True, split="hash")
    assert {*labels.values()} == {0, 1}
    assert all(label == name.startswith("train/") for name, label in labels.items())


@pytest.mark.parametrize("extra", ["train/a.png", "train/dog/old/b.png"])
def test_labels_by_folder_need_each_image_in_one(tmp_path, extra):
    root = write(tmp_path, {"train/dog/a.png": RED, "train/cat/a.png": RED, extra: RED})
    with pytest.raises(
        ValueError, match="data.folder_labels=True needs each image of .* in one folder, as in cat/1.png"
    ):
        load(of(root, folder_labels=True))


# --- the set of files


def test_hidden_files_are_left_out_and_linked_folders_are_read_once(tmp_path):
    hidden = (".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", "._a.png", ".b.png", "sub/.cache/c.png")
    root = write(tmp_path / "root", {"a.png": RED, "sub/b.png": RED} | dict.fromkeys(hidden, RED))
    far = write(tmp_path / "far", {"c.png": RED, "deep/d.png": RED})
    (root / "more").symlink_to(far)
    (root / "again").symlink_to(root / "sub")
    (far / "loop").symlink_to(root)
    (far / "self").symlink_to(far)
    (root / "e.png").symlink_to(far / "c.png")
    assert names(root, split="all") == ["a.png", "e.png", "more/c.png", "more/deep/d.png", "sub/b.png"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("train val test", {"train": "train", "validation": "val", "test": "test"}),
        ("train valid", {"train": "train", "validation": "valid"}),
        ("Train Dev Testing", {"train": "Train", "validation": "Dev", "test": "Testing"}),
        ("training validation", {"train": "training", "validation": "validation"}),
        ("TRAIN TEST", {"train": "TRAIN", "test": "TEST"}),
        ("train other", {"train": "train"}),
    ],
)
def test_folders_of_splits_have_several_names(tmp_path, found, expected):
    root = write(tmp_path, {f"{name}/{i}.png": RED for name in found.split() for i in range(2)})
    for split in splits.SPLITS:
        assert names(root, split) == [f"{expected[split]}/{i}.png" for i in range(2) if split in expected]


@pytest.mark.parametrize("found", ["val", "Train", "dev val", "training cats"])
def test_other_names_of_one_split_alone_are_no_split(tmp_path, found):
    root = write(tmp_path, {f"{name}/{i}.png": RED for name in found.split() for i in range(40)})
    everything = [f"{name}/{i}.png" for name in found.split() for i in range(40)]
    assert names(root) == sorted(splits.members(everything, "train"))


@pytest.mark.parametrize("both", [("val", "validation"), ("test", "Test"), ("dev", "valid")])
def test_two_folders_of_one_split_are_refused(tmp_path, both):
    root = write(tmp_path, {f"{name}/a.png": RED for name in ("train", *both)})
    with pytest.raises(
        ValueError, match=rf"{min(both)}/ and {max(both)}/ are both the \w+ split: rename or remove one"
    ):
        load(of(root))


def test_a_split_that_is_missing_says_what_to_do(tmp_path):
    root = write(tmp_path, {f"{split}/{i}.png": RED for split in ("train", "test") for i in range(5)})
    with pytest.raises(
        ValueError, match=r"is empty \(train 5, validation 0, test 5\): add images, or set data.split to 'fill'"
    ):
        load(of(root), "validation")
    parts = [names(root, split, split="fill") for split in splits.SPLITS]
    assert [len(part) for part in parts] == [4, 1, 5]
    assert sorted(sum(parts[:2], [])) == [f"train/{i}.png" for i in range(5)]


@pytest.mark.parametrize(("n", "expected"), [(3, [1, 1, 1]), (5, [3, 1, 1]), (10, [8, 1, 1]), (200, [162, 18, 20])])
def test_few_images_fill_every_split(tmp_path, n, expected):
    root = write(tmp_path, {f"{i}.png": RED for i in range(n)})
    parts = [names(root, split, split="fill") for split in splits.SPLITS]
    assert [len(part) for part in parts] == expected
    assert len({*sum(parts, [])}) == n
    assert [names(root, split, split="all") for split in splits.SPLITS] == [sorted(sum(parts, []))] * 3


def test_by_hash_the_folders_do_not_matter(tmp_path):
    everything = [f"{split}/{i}.png" for split in splits.SPLITS for i in range(20)]
    root = write(tmp_path, dict.fromkeys(everything, RED))
    for split in splits.SPLITS:
        assert names(root, split, split="hash") == sorted(splits.members(everything, split))


def test_the_line_names_the_rule_and_the_splits_in_order(tmp_path, capsys):
    load(of(write(tmp_path, {f"{i}.bmp": RED for i in range(5)}), split="fill"))
    assert "5 images, no captions; train 3, validation 1, test 1, by data.split='fill'\n" in capsys.readouterr().out


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="data.split='folders' must be one of auto, hash, fill, all"):
        configure(source="folder", split="folders")


def test_a_file_whose_name_is_not_utf8_is_an_image_like_others(tmp_path):
    root = write(tmp_path, {"train/a\udce9.png": RED, "train/a\udce9.txt": "red"})
    assert captions_of(root) == {"train/a\udce9.png": "red"}


def test_a_mended_folder_is_read_anew(tmp_path):
    root = write(tmp_path, {"train/a.png": RED, "train/b.png": b"no image"})
    with pytest.raises(ValueError, match=r"1 of 2 images in .* cannot be used: train/b.png cannot be read"):
        load(of(root))
    (root / "train/b.png").unlink()
    assert names(root) == ["train/a.png"]


def test_a_source_may_be_given_by_its_name(tmp_path):
    write(tmp_path, {"train/a.png": RED})
    assert DataConfig(source="folder", task="sr", path=str(tmp_path), size=8) == of(tmp_path, task="sr")
    with pytest.raises(ValueError, match="data.source='folders' must be one of "):
        DataConfig(source="folders")


# --- what was found, in a line


def test_one_line_says_what_was_found(tmp_path, capsys):
    files = {f"{i}.{suffix}": RED if suffix == "png" else "red" for i in range(36) for suffix in ("png", "txt")}
    root = write(tmp_path, files | dict.fromkeys(("a.heic", "b.heic", "c.HEIC"), b""))
    for split in splits.SPLITS:
        load(of(root), split)
    assert capsys.readouterr().out == (
        f"{root}: 36 images, 36 captions, 3 left out (.heic); train 29, validation 4, test 3, by hash of the name\n"
    )


def test_other_hosts_say_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sharding, "is_host0", lambda: False)
    load(of(write(tmp_path, {"train/a.png": RED})))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("files", "phrase"),
    [
        ({"train/a.txt": "red"}, "2 images, 1 caption, 1 image without one (train/b.png)"),
        ({"train/a.txt": " \n", "train/b.txt": "red"}, "1 caption, 1 image without one (train/a.png)"),
        ({"train/c.png": RED}, "no captions; train 3, validation 0, test 0, by folder; data.split='fill' takes"),
        (
            {"metadata.jsonl": lines(*({"file_name": f"train/{x}.png", "text": "x"} for x in "abc"))},
            "2 captions, 1 name in the metadata without an image (train/c.png)",
        ),
        ({"train/a.txt": "x", "train/c.txt": "x"}, "1 image without one (train/b.png), 1 left out (.txt)"),
        (
            {"train/a.txt": "x", "train/a.caption": "x", "b.svg": "", "LICENSE": ""},
            "3 left out (1 without a suffix, 1 .svg, 1 .caption)",
        ),
        ({"extra/c.png": RED, "d.png": RED}, "2 left out (1 outside the folders of the splits, 1 in extra/)"),
        ({"train/metadata.csv": "file_name,text,tags\na.png,x,y\nb.png,x,y"}, "metadata keys not used: tags;"),
    ],
)  # fmt: skip
def test_what_is_not_used_is_counted_in_words(tmp_path, capsys, files, phrase):
    root = write(tmp_path, {"train/a.png": RED, "train/b.png": RED} | files)
    load(of(root))
    assert phrase in capsys.readouterr().out


def test_splits_one_level_too_deep_are_pointed_out(tmp_path, capsys):
    root = write(tmp_path, {f"archive/{split}/{i}.png": RED for split in splits.SPLITS for i in range(9)})
    load(of(root))
    said = capsys.readouterr().out
    assert any(f"archive/{split}/ is no split: it does not lie in data.path itself" in said for split in splits.SPLITS)


def test_folder_with_its_own_splits(tmp_path):
    write(tmp_path, {f"{split}/{i}.jpg": grey(v) for split, v in (("train", 10), ("test", 200)) for i in range(3)})
    assert len(load(of(tmp_path), "train")) == 3
    assert examples(of(tmp_path), "test")["x0"].mean() == pytest.approx(200 / 127.5 - 1, abs=0.01)
    with pytest.raises(ValueError, match="the validation split of folder .* is empty"):
        load(of(tmp_path), "validation")


@pytest.mark.parametrize("kind", ["not an image", "cut off", "floating point", "too many pixels"])
def test_bad_image_is_named_before_the_first_step_or_skipped(squares, kind, caplog, monkeypatch):
    suffix = {"floating point": "tif", "too many pixels": "png"}.get(kind, "jpg")
    name = next(f"sub/{i}.{suffix}" for i in itertools.count(100) if splits.split_of(f"sub/{i}.{suffix}") == "train")
    bad = squares / name
    if kind == "not an image":
        bad.write_bytes(b"hello")
    elif kind == "floating point":
        Image.new("F", (8, 8)).save(bad)
    elif kind == "too many pixels":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # twice that is an error
        Image.new("L", (101, 100)).save(bad)
    else:
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(bad)
        bad.write_bytes(bad.read_bytes()[:-500])
    with pytest.raises(ValueError, match=rf"1 of \d+ images .* cannot be used: {name}") as error:
        batches(of(squares), batch_size=2, seed=0)
    assert kind != "floating point" or "1 channel(s) of mode F; convert it" in str(error.value)
    good = load(of(squares, skip_bad=True), "train", augment=False)
    assert f"{name}" in caplog.text
    at, rng = good.source.names.index(name), np.random.default_rng(0)
    np.testing.assert_array_equal(good.item(at, rng)["x0"], good.item((at + 1) % len(good), rng)["x0"])
    assert "replaced by the next (1 so far)" in caplog.text
    examples(of(squares, skip_bad=True), "train")


def test_missing_folder_empty_folder_and_bad_metadata_are_refused(tmp_path, squares):
    with pytest.raises(ValueError, match="data.path '' is not a folder"):
        load(configure(source="folder"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in"):
        load(of(tmp_path / "empty"))
    for line in ("{", '{"text": "no name"}', "[]", '{"file_name": "a.png", "label": -1}'):
        (squares / "metadata.jsonl").write_text(line)
        with pytest.raises(ValueError, match="line 1 of .*metadata.jsonl is not like"):
            load(of(squares))
    (squares / "metadata.jsonl").write_text('{"file_name": "sub/1.png", "label": 9}')
    with pytest.raises(ValueError, match="folder has 10 labels; data.num_classes is 9"):
        load(of(squares))

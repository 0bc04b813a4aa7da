"""Captions, labels, edits and depth maps of the images in a folder, from metadata files and from files beside each."""

import codecs
import csv
import functools
import io
import json
import posixpath
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from cddistill.data.images import SUFFIXES
from cddistill.data.listing import read_all, report_bad

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")  # the first that exists is read
NAMES = ("file_name", "filename", "file", "image", "image_path", "filepath", "file_path", "path", "original_image",
         "original", "original_file_name", "input_image")  # fmt: skip
CAPTIONS = ("text", "caption", "prompt", "description", "additional_feature")
"""Keys of metadata, in any case of the letters; the first one with a value is taken. A label has the key "label"."""
FURTHER = {
    "edited": ("edited_image", "edited", "edited_file_name", "output_image"),
    "instruction": ("edit_prompt", "instruction", "edit"),
    "depth": ("depth", "depth_map", "depth_image", "depth_file_name"),
}
"""Keys for editing (those of InstructPix2Pix's data first) and for depth maps. Edited images and maps are files."""
FILES = {"edited", "depth"}  # of these, which are no images of the data set themselves
MAPS = (".npy", *SUFFIXES)
DEPTH_SUFFIX = "_depth"  # photo_depth.png or photo_depth.npy is the depth map of photo.jpg
EXAMPLES = {
    ".jsonl": '{"file_name": "a.jpg", "text": "a cat"}', ".csv": "a.jpg,a cat",
    ".parquet": 'the columns file_name and text, "a.jpg" and "a cat"',
}  # fmt: skip
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""By the byte order mark that a file starts with; without one it is UTF-8."""


class Captions(NamedTuple):
    """What the metadata and text files of a folder say."""

    records: dict[str, dict[str, Any]]  # by image: "caption", "label" and those of FURTHER, as far as they are known
    files: set[str]  # that were read
    classes: list[str]  # names of the labels, if they have names
    unmatched: list[str]  # names in the metadata that are no image
    unused: list[str]  # keys of the metadata that are neither name nor caption nor label
    unread: set[str]  # images whose text file cannot be read


class Spellings:
    """Find a path by another spelling: "./a.png", "a\\b.png", "a.PNG", composed or decomposed accents, full paths."""

    def __init__(self, root: Path, paths):
        self.paths, self.by_spelling = set(paths), defaultdict(list)
        for path in paths:
            self.by_spelling[plain(path)].append(path)
        self.roots = f"{root.as_posix()}/", f"{root.absolute().as_posix()}/"

    def find(self, name: str, folder: str = "") -> str | None:
        """The path that a name in a file of this folder means: relative to it, else to the root. None if it is none.

        Raises ValueError if two paths differ only in spelling and the name is neither.
        """
        inside = (name.removeprefix(root) for root in self.roots)
        for candidate in (posixpath.join(folder, name), posixpath.join(folder, name.strip()), name, *inside):
            same = [candidate] if candidate in self.paths else self.by_spelling.get(plain(candidate), [])
            if len(same) > 1:
                raise ValueError(f"{name} may be {' or '.join(sorted(same))}: spell it as one of them")
            if same:
                return same[0]
        return None


def plain(path: str) -> str:
    """A path in one spelling: slashes, no "." or "..", composed accents (NFC), the suffix in lower case."""
    path = unicodedata.normalize("NFC", path.strip().replace("\\", "/"))
    stem, suffix = posixpath.splitext(posixpath.normpath(path))
    return stem + suffix.lower()


def decode(path: Path) -> str:
    """The text of a file in UTF-8, or UTF-16 with a byte order mark; bytes that are not UTF-8 become surrogates."""
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
        return content.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise ValueError(f"{path} is not text in UTF-16, as its first bytes say: save it as UTF-8") from error


def check_text(text: str) -> str:
    """The text. Raises ValueError if it has zeros or surrogates, which are signs of another encoding than UTF-8."""
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{text[:40]!a} is not text in UTF-8: save the file as UTF-8")
    return text


def read_captions(root: Path, images, files, skip_bad: bool) -> Captions:
    """Captions and labels of these images from the files below root; metadata goes before an image's text file.

    Raises ValueError, naming file and line, for what is not understood; with skip_bad it is left out with a warning.
    """
    known = read_metadata(root, images, files, skip_bad)
    for image, path in depth_beside(images, files).items():
        known.records.setdefault(image, {}).setdefault("depth", path)
    known.files.update(record[key] for record in known.records.values() for key in FILES & record.keys())
    beside = {k: v for k, v in sidecars(images, files).items() if "caption" not in known.records.get(k, {})}
    paths = dict.fromkeys(beside.values())  # each once
    texts = read_all(lambda path: read_sidecar(root / path), paths, f"captions in {root}", skip_bad)
    for image, path in beside.items():
        if path in texts:
            known.records.setdefault(image, {})["caption"] = texts[path]
        else:
            known.unread.add(image)
    known.files.update(paths)
    return known


# ---- a text file beside each image


def sidecars(images, files) -> dict[str, str]:
    """{image: path of its text file}, for images that have one. Two images may share one."""
    known = {plain(path): path for path in sorted(files) if path.lower().endswith(SIDECARS)}
    found = {}
    for image in images if known else ():
        stem = posixpath.splitext(image)[0]
        if path := next((known[p] for s in SIDECARS if (p := plain(stem + s)) in known), None):
            found[image] = path
    return found


def read_sidecar(path: Path) -> str:
    """The caption in a text file. Raises ValueError, naming it, for a file that is not text in UTF-8 or UTF-16."""
    text = decode(path)
    try:
        return check_text(text).replace("\r\n", "\n").replace("\r", "\n").strip()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---- metadata files


def read_metadata(root: Path, images, files, skip_bad: bool) -> Captions:
    """What all metadata files below root say of these images; a file in a sub-folder overrides those above it."""
    paths = sorted((p for p in files if posixpath.basename(p) in METADATA), key=lambda p: (p.count("/"), p))
    spellings = [Spellings(root, names) for names in (images, files)] if paths else None
    by_folder, records, unmatched, unused = defaultdict(dict), {}, [], set()
    for path in paths:
        folder = posixpath.dirname(path)
        unused |= read_file(root / path, folder, spellings, by_folder[folder], unmatched, skip_bad)
    for known in by_folder.values():
        for image, record in known.items():
            records[image] = records.get(image, {}) | record
    if unmatched and not records:
        what = f"none of the {len(unmatched)} names in {root / paths[0]}, such as {unmatched[0]!r}, is an image there"
        raise ValueError(f"{what}: write names relative to the folder of the metadata")
    return Captions(records, {*paths}, number_labels(records, root), unmatched, sorted(unused), set())


def read_file(path: Path, folder: str, spellings, records, unmatched, skip_bad: bool) -> set[str]:
    """Add what one metadata file says to `records` by image, and names that are no image to `unmatched`.

    Returns the keys that are not used.
    """
    unused, useful, bad = set(), False, []
    for number, parse in READERS[path.suffix](path):
        try:
            name, record, has_keys, others = entry(parse())
            image = spellings[0].find(name, folder)
            record |= {key: existing(spellings[1], key, record[key], folder) for key in FILES & record.keys()}
            if image is None:
                unmatched.append(check_text(name))
            else:
                add(records, image, record)
        except (ValueError, TypeError, RecursionError) as error:
            unit = "row" if path.suffix == ".parquet" else "line"
            bad.append(f"{unit} {number} of {path} is not like {EXAMPLES[path.suffix]}: {error}")
            continue
        unused |= others
        useful |= has_keys
    report_bad(bad, f"{len(bad)} lines of {path.name} cannot be used", skip_bad)
    if unused and not useful:
        keys = f"{', '.join(sorted(unused))}, and captions are expected under {' or '.join(CAPTIONS)}"
        raise ValueError(f"{path} has the keys {keys}: rename the key that holds them")
    return unused


def jsonl_lines(path: Path):
    """(line number, function that returns the object) of each line that is not blank. Only "\\n" ends a line."""
    for number, line in enumerate(decode(path).split("\n"), 1):
        if line.strip():
            yield number, functools.partial(json.loads, line)


def csv_lines(path: Path):
    """(line number, function that returns {column: cell}) of each row that is not blank. ValueError for bad quotes."""
    rows = csv.reader(io.StringIO(decode(path), newline=""), strict=True, skipinitialspace=True)
    try:
        filled = (cells for cells in rows if any(cell.strip() for cell in cells))
        header = next(filled, [])
        for cells in filled:
            yield rows.line_num, functools.partial(named, header, cells)
    except csv.Error as error:
        raise ValueError(f'line {rows.line_num} of {path} is not CSV ({error}): quote cells as in "a, b"') from error


def named(header, cells) -> dict[str, str]:
    """A row as {column: cell}. Raises ValueError if it is longer or shorter than the header."""
    while len(cells) > len(header) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) != len(header):
        raise ValueError(f'{len(cells)} cells for {len(header)} columns; quote what has commas, as in "a, b"')
    return dict(zip(header, cells, strict=True))


def parquet_rows(path: Path):
    """(row number from 1, function that returns {column: value}) of each row. Columns of other names are not read."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} needs pyarrow: pip install cddistill[data], or write it as {' or '.join(METADATA[:2])}"
        ) from error
    known = {*NAMES, *CAPTIONS, "label"}.union(*FURTHER.values())
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            others = dict.fromkeys(name for name in names if name.strip().lower() not in known)
            table = file.read([name for name in names if name not in others])
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): write it again") from error
    for number, row in enumerate(rows, 1):
        yield number, functools.partial(dict, others | row)


READERS = {".jsonl": jsonl_lines, ".csv": csv_lines, ".parquet": parquet_rows}


def entry(row) -> tuple[str, dict[str, Any], bool, set[str]]:
    """(name, {"caption", "label"} as far as it has them, whether it has keys for these, its other keys) of a line."""
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}")
    row = {key.strip().lower(): value for key, value in row.items()}
    key = chosen(row, NAMES)
    if not isinstance(name := row.get(key), str):
        raise ValueError(f"it has no file name under {' or '.join(NAMES)}")
    record, keys = facts(row)
    return name, record, bool(keys), {*row} - {key, *keys}


def facts(row: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """({"caption", "label" and those of FURTHER that have a value}, the keys for these) of a row with lower-case keys.

    Raises ValueError for a value of another type, and text that is not UTF-8.
    """
    keys = [chosen(row, known) for known in (CAPTIONS, ("label",), *FURTHER.values())]
    caption, label, *further = (row.get(key) for key in keys)
    record = {}
    if not blank(caption):
        if isinstance(caption, bool) or not isinstance(caption, str | int | float):
            raise ValueError(f"{keys[0]} is {caption!r}; write one text")
        record["caption"] = check_text(str(caption))
    if not blank(label):
        record["label"] = label_of(label)
    for key, value in zip(FURTHER, further, strict=True):
        if not blank(value):
            if not isinstance(value, str):
                raise ValueError(f"{key} is {value!r}; write a text")
            record[key] = check_text(value)
    return record, {key for key in keys if key}


def existing(spellings: Spellings, key: str, name: str, folder: str) -> str:
    """The path of a file that a line names. Raises ValueError if there is none."""
    if path := spellings.find(name, folder):
        return path
    raise ValueError(f"its {key} file {name} does not exist")


def depth_beside(images, files) -> dict[str, str]:
    """{image: its depth map} for files like photo_depth.png beside photo.jpg."""
    maps = {posixpath.splitext(path)[0]: path for path in sorted(files) if path.lower().endswith(MAPS)}
    found = ((image, maps.get(posixpath.splitext(image)[0] + DEPTH_SUFFIX)) for image in images)
    return {image: path for image, path in found if path}


def chosen(row, known) -> str | None:
    """The first of the known keys with a value, or else the first that is there, or None."""
    present = [key for key in known if key in row]
    return next((key for key in present if not blank(row[key])), next(iter(present), None))


def blank(value) -> bool:
    """Whether a value is missing: null, an empty cell, or NaN, which tables have for one."""
    return value is None or value == "" or value != value


def label_of(value) -> int | str:
    """A label as a number or the name of a class."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"a label must be a whole number or a name, not {value!r}")
    number = value.strip() if isinstance(value, str) else value
    if isinstance(number, str) and not number.removeprefix("-").isdecimal():
        return check_text(number)
    if isinstance(number, float) and not number.is_integer():
        raise ValueError(f"a label must be a whole number or a name, not {value!r}")
    if int(number) < 0:
        raise ValueError("a label must not be negative")
    return int(number)


def add(records, image: str, record) -> None:
    """Add a record of an image. Raises ValueError if another line of the same folder says something else."""
    known = records.setdefault(image, {})
    for key, value in record.items():
        if known.get(key, value) != value:
            raise ValueError(f"{image} has another {key} on an earlier line; keep one of them")
    known |= record


def number_labels(records, root: Path) -> list[str]:
    """Replace names of classes by their numbers in sorted order, and return the names; [] if there are none."""
    labels = {record["label"] for record in records.values() if "label" in record}
    classes = sorted(label for label in labels if isinstance(label, str))
    if classes and len(classes) < len(labels):
        number = next(label for label in labels if not isinstance(label, str))
        both = f"both numbers ({number}) and names ({classes[0]})"
        raise ValueError(f"labels in the metadata of {root} are {both}: use one kind")
    numbers = {name: i for i, name in enumerate(classes)}
    for record in records.values():
        if record.get("label") in numbers:
            record["label"] = numbers[record["label"]]
    return classes

"""Precomputed arrays, such as latents and text embeddings: shards of --mode=encode, or .npy files of any origin."""

import dataclasses
import itertools
import json
import logging
import re
from typing import Annotated

import numpy as np

from cddistill import io
from cddistill.checksums import crc32_file, crc32_rows
from cddistill.data.captions import check_text
from cddistill.data.contracts import NULL_FILES, Source
from cddistill.data.digests import of_files, of_values, rows_file
from cddistill.data.encoded import EncodedBuckets, EncodedItems, is_encoded, open_encoded
from cddistill.data.listing import data_path
from cddistill.data.splits import SPLITS, members
from cddistill.typed import Count, Limit

AXES = {
    "x0": 4,
    "cond": 4,
    "cond_latent": 4,
    "class_labels": 1,
    "input_ids": 2,
    "text": 3,
    "text_embeds": 2,
    "time_ids": 2,
}
AGAIN = "encode again with the same --mode=encode"
INTEGERS = ("class_labels", "input_ids")
MAX_ID = 2**24 - 1  # token ids are exact in float32
ROWS_CHECKED = 2048  # of each array and split, evenly spaced: reading all rows of a large file takes too long
POSSIBLE, LIKELY = (0.05, 3.0), (0.2, 2.0)  # standard deviation of what diffusion models generate; nominally 1

SHAPE = Limit("height, width and channels, or ()", lambda x: len(x) in (0, 3))


class Rows:
    """Memory-mapped arrays, concatenated along the first axis. Only the rows that are indexed are read.

    sums has the checksums of the rows of each array, or None; a row that is read is compared with its own.
    """

    def __init__(self, arrays, path, sums):
        if len(shapes := {a.shape[1:] for a in arrays}) != 1:
            raise ValueError(f"the parts of {path} have rows of different shapes: {sorted(shapes)}")
        self.path, self.arrays, self.sums, self.ends = path, arrays, sums, np.cumsum([len(a) for a in arrays])
        self.shape, self.ndim = (int(self.ends[-1]), *arrays[0].shape[1:]), arrays[0].ndim

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        part = int(np.searchsorted(self.ends, i, "right"))
        at = i - (self.ends[part] - len(self.arrays[part]))
        row, sums = self.arrays[part][at], self.sums[part]
        if sums is not None and crc32_rows(self.arrays[part][at : at + 1])[0] != sums[at]:
            file = self.arrays[part].filename
            raise ValueError(f"row {at} of {file} is damaged (its checksum is wrong): delete its folder and {AGAIN}")
        return row

    def statistics(self, rows) -> tuple[float, float, float, float]:
        """(lowest, highest, mean, standard deviation) of some rows. ValueError naming the first that is not finite."""
        low, high, total, squares, size = np.inf, -np.inf, 0.0, 0.0, 0
        for i in rows:
            with np.errstate(over="ignore"):
                x = self[i].astype(np.float32).astype(np.float64)  # as it is used; sums are exact
            if not np.isfinite(x).all():
                raise ValueError(f"row {i} of {self.path} has values that are not finite (NaN or infinity): remove it")
            low, high = min(low, x.min()), max(high, x.max())
            total, squares, size = total + x.sum(), squares + (x**2).sum(), size + x.size
        mean = total / size
        return float(low), float(high), float(mean), float(max(squares / size - mean**2, 0.0) ** 0.5)


@dataclasses.dataclass(frozen=True)
class Arrays(Source):
    """Precomputed arrays in the folder data.path."""

    x0_shape: Annotated[tuple[Count, ...], SHAPE] = ()  # for text only (prompts without images, no x0.npy)

    precomputed = True

    def open(self, config, split):
        root = data_path(config.path, "a folder of arrays, such as --mode=encode writes")
        if is_encoded(root / split):
            return open_encoded(root / split, config)
        return ArrayItems(root, config, split, self.x0_shape)

    def fingerprint(self, opened):
        if isinstance(opened, EncodedItems | EncodedBuckets):
            return {"arrays": of_files(opened.folder, opened.names())}
        paths = (part / f"{name}.npy" for part in opened.parts for name in opened.arrays)
        names = (path.relative_to(opened.root).as_posix() for path in paths)
        return {"arrays": of_files(opened.root, names), "captions": of_values(opened.captions)}


class ArrayItems:
    """Rows of .npy files in the sub-folders train, validation and test. Without these, rows are split by hash.

    x0.npy is float16 or float32 [n,h,w,c], as the teacher takes it: pixels in [-1, 1], or latents of unit variance.
    Optional: cond.npy [n,h,w,c] in [0, 1], captions.json (a list of str), and class_labels.npy int [n] or text.npy
    [n,l,d] with null.npy [l,d], the embedding of the empty prompt, or input_ids.npy [n,l] with null_input_ids.npy [l],
    for methods that train the text encoder; for SDXL also text_embeds.npy [n,e], null_text_embeds.npy [e] and
    time_ids.npy [n,6]. With data.x0_shape, x0.npy is not needed: for methods that train on text only. Rows are not
    augmented: latents cannot be mirrored. The files may be split into folders 00000-of-00002 and so on, as
    --mode=encode wrote them before it wrote shards.

    Shapes, types and labels are checked in whole; that values are finite and in range, in ROWS_CHECKED rows a split.
    """

    def __init__(self, root, config, split, x0_shape=()):
        divided = any((root / name).is_dir() for name in SPLITS)
        self.root = root / split if divided else root
        if not self.root.is_dir():
            raise ValueError(f"{root} (data.path) has no folder {split}, as it has of other splits: encode or copy it")
        self.parts = complete_parts(self.root)
        check_small(self.parts)
        self.arrays = {name: self.join(f"{name}.npy") for name in AXES if (self.parts[0] / f"{name}.npy").exists()}
        if "x0" not in self.arrays and not (x0_shape and self.arrays):
            raise ValueError(
                f"there is no x0.npy in {self.root} (data.path); expected float16 or float32 [n,h,w,c], or text "
                "and data.x0_shape, as in (64, 64, 4)"
            )
        self.x0_shape, n = x0_shape, len(next(iter(self.arrays.values())))
        captions = [path for part in self.parts if (path := part / "captions.json").exists()]
        self.captions = list(itertools.chain(*map(read_captions, captions))) if captions else [""] * n
        self.null_label = np.int32(config.num_classes)
        self.encoded = read_manifest(self.parts[0])  # by --mode=encode, or None
        self.check(config)
        self.null = {name: self.read_null(name) for name in NULL_FILES if name in self.arrays}
        rows = map(str, range(n))
        self.rows = [int(row) for row in (rows if divided else members(rows, split))]
        if self.rows:
            self.check_values()

    def join(self, file):
        """The rows of one file, concatenated over all parts. Raises ValueError if a part lacks it."""
        if missing := [part for part in self.parts if not (part / file).exists()]:
            raise ValueError(f"{missing[0]} lacks {file}, which the other parts of {self.root} have")
        paths = [part / file for part in self.parts]
        return Rows([*map(read_array, paths)], self.root / file, [*map(read_sums, paths)])

    def check(self, config):
        """Raise ValueError if arrays have wrong shapes or values, or if one is missing."""
        first, n = next((name, len(array)) for name, array in self.arrays.items())
        for name, array in self.arrays.items():
            if array.ndim != AXES[name] or len(array) != n:
                expected = f"{AXES[name]} axes, the first of length {n} as in {first}.npy"
                raise ValueError(f"{name}.npy in {self.root} is {array.shape}; expected {expected}")
        if len(self.captions) != n:
            raise ValueError(
                f"captions.json in {self.root} has {len(self.captions)} captions for {n} rows of {first}.npy"
            )
        if config.task.conditional and "cond" not in self.arrays:
            needed = f"task {config.task_name} on precomputed arrays needs {self.root / 'cond.npy'}"
            raise ValueError(f"{needed}: --mode=encode with the same data.task writes it")
        if ("text_embeds" in self.arrays) != ("time_ids" in self.arrays):
            raise ValueError(f"text_embeds.npy and time_ids.npy belong together; {self.root} has only one of them")
        for name, array in self.arrays.items():
            self.check_types(name, {x.dtype for x in array.arrays})
        self.check_integers()
        rows = [(read_manifest(part) or {}).get("rows") for part in self.parts]
        if self.encoded and sum(rows) != n:
            raise ValueError(f"the manifest in {self.parts[0]} and others say {sum(rows)} rows, not {n}: encode again")

    def check_integers(self):
        """Raise ValueError for labels that are no classes, and for token ids that no vocabulary has."""
        if outside(self.arrays.get("class_labels"), int(self.null_label)):
            raise ValueError(
                f"class_labels.npy in {self.root} must be in 0 .. {self.null_label}, the null label: set "
                "data.num_classes to the number of classes"
            )
        if outside(self.arrays.get("input_ids"), MAX_ID):
            raise ValueError(f"input_ids.npy in {self.root} must be in 0 .. {MAX_ID}: tokenize the captions again")

    def check_types(self, name, dtypes):
        """Raise ValueError for an array that holds another kind of numbers than it should; a note for float64."""
        kinds = "iu" if name in INTEGERS else "iuf" if name == "time_ids" else "f"
        if wrong := [str(dtype) for dtype in dtypes if dtype.kind not in kinds]:
            expected = "integers" if name in INTEGERS else "float16 or float32"
            hint = {"x0": ": divide pixels by 127.5 and subtract 1, or encode the images with --mode=encode",
                    "cond": ": divide pixels by 255"}  # fmt: skip
            raise ValueError(f"{name}.npy in {self.root} holds {wrong[0]}; expected {expected}{hint.get(name, '')}")
        if np.dtype(np.float64) in dtypes and kinds == "f":
            logging.warning("%s.npy in %s is float64: it is used as float32, half as large", name, self.root)

    def check_values(self):
        """Raise ValueError for rows that are not finite, a condition outside of [0, 1] or an x0 of another scale."""
        some = np.unique(np.linspace(0, len(self.rows) - 1, ROWS_CHECKED).astype(int))
        some = sorted(self.rows[i] for i in some)
        found = {name: x.statistics(some) for name, x in self.arrays.items() if name not in INTEGERS}
        if "cond" in found and (found["cond"][0] < -1e-3 or found["cond"][1] > 1.001):
            low, high, *_ = found["cond"]
            raise ValueError(
                f"cond.npy in {self.root} has values from {low:.3g} to {high:.3g}, and conditions lie in [0, 1]: "
                "divide pixels in 0 .. 255 by 255, and take (x + 1) / 2 of those in [-1, 1]"
            )
        if "x0" in found and self.encoded is None:  # else the scale is the teacher's
            self.check_scale(*found["x0"], len(some))

    def check_scale(self, low, high, mean, std, count):
        """Raise ValueError for an x0 that no schedule fits, and warn of one that is odd."""
        said = f"x0.npy in {self.root} has mean {mean:.3g} and standard deviation {std:.3g} (in {count} rows)"
        if not (std == 0 or POSSIBLE[0] <= std <= POSSIBLE[1]) or abs(mean) > POSSIBLE[1]:
            remedy = "divide by 127.5 and subtract 1" if low >= 0 and high > 2 else "multiply by its scaling_factor"
            what = "pixels in 0 .. 255" if low >= 0 and high > 2 else "a VAE's latents"
            raise ValueError(
                f"{said}, and teachers take pixels in [-1, 1] or latents with about 1: if these are {what}, {remedy}"
                + (" (once)" if std < 1 else "")
            )
        if not LIKELY[0] <= std <= LIKELY[1]:
            logging.warning("%s, and that of what teachers generate is about 1", said)
        elif self.arrays["x0"].shape[-1] in (1, 3) and low >= 0 and high <= 1:
            logging.warning("%s and lies in [0, 1]: teachers take pixels in [-1, 1], 2 x - 1", said)

    def read_null(self, name):
        """The empty prompt's embedding or token ids, one of NULL_FILES, float32."""
        path = self.parts[0] / NULL_FILES[name]
        expected = self.arrays[name].shape[1:]
        if not path.exists():
            raise ValueError(f"{name}.npy needs {path}, the embedding of the empty prompt, of shape {expected}")
        null = read_array(path)
        if null.shape != expected:
            raise ValueError(f"{path} is {null.shape}; expected {expected} as a row of {name}.npy")
        kinds, highest = ("iu", MAX_ID) if name in INTEGERS else ("iuf", np.finfo(np.float32).max)
        if null.dtype.kind not in kinds or not (np.abs(null) <= highest).all() or (name in INTEGERS and null.min() < 0):
            what = "token ids" if name in INTEGERS else "finite numbers"
            raise ValueError(f"{path} has values that are not {what}: encode the empty prompt again")
        return np.asarray(null, np.float32)

    def __len__(self):
        return len(self.rows)

    def item(self, i, rng):
        """Item i, with the keys of `Pixels.item`. Without x0.npy, x0 is zero and "imageless" is True."""
        row = {name: np.asarray(array[self.rows[i]], np.float32) for name, array in self.arrays.items()}
        label = np.int32(row.get("class_labels", self.null_label))
        item = {"caption": self.captions[self.rows[i]], "label": label}
        item |= {name: row[name] for name in ("x0", "cond", "cond_latent") if name in row}
        if "x0" not in row:
            item |= {"x0": np.zeros(self.x0_shape, np.float32), "imageless": np.bool_(True)}
        if "input_ids" in row:
            ids = lambda row: {"input_ids": row["input_ids"].astype(np.int32)}
            return item | {"text": ids(row), "null": ids(row | self.null)}
        if "text" in row:
            return item | {"text": embeddings(row), "null": embeddings(row | self.null)}
        return item | {"text": {"class_labels": label}, "null": {"class_labels": self.null_label}}


def read_array(path):
    """An .npy file, mapped to memory. Raises ValueError naming a file that is damaged or holds no rows of numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many types for odd headers
        why = "it holds Python objects, or something else" if "pickle" in str(error) else error
        raise ValueError(f"{path} is damaged, or no array of numbers ({why}): write it again with np.save") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive (.npz), not one array: save the array in it with np.save")
    if not array.ndim or 0 in array.shape[1:]:
        raise ValueError(f"{path} is {array.shape}, and no array of rows: write it again with np.save")
    return array


def outside(rows: Rows | None, highest: int) -> bool:
    """Whether some of these integers are negative or above the highest that is allowed. All of them are read."""
    return rows is not None and any(len(x) and (x.min() < 0 or x.max() > highest) for x in rows.arrays)


def read_manifest(folder, remedy: str = "encode again") -> dict | None:
    """What --mode=encode recorded in a folder; None if there is nothing. ValueError, naming the file, for damage."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    known = io.read_json(path, remedy, rows=int, total=int, fingerprints=dict | None, crc32=dict | None)
    if not 0 <= known["rows"] <= known["total"]:
        raise ValueError(f"{path} has rows = {known['rows']} of total = {known['total']}: {remedy}")
    return known


def read_sums(path):
    """The checksums of an array's rows; None if there are none, as of arrays that --mode=encode has not written."""
    file = rows_file(path)
    return read_array(file) if file.is_file() else None


def check_small(parts):
    """Raise ValueError naming a file in one of these folders that differs from the checksum in its manifest."""
    for part in parts:
        for name, expected in ((read_manifest(part) or {}).get("crc32") or {}).items():
            if not (part / name).is_file() or crc32_file(part / name) != expected:
                raise ValueError(f"{part / name} is damaged (its checksum is wrong): delete its folder and {AGAIN}")


def read_captions(path):
    """The list of str in a captions.json. Raises ValueError naming a file that holds anything else."""
    try:
        captions = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"it is a {type(captions).__name__}, not a list of texts, one for each row")
        return [check_text(caption) for caption in captions]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a list of texts, as JSON in UTF-8 ({error}): write it again") from error


def embeddings(row):
    """The text arrays of a row, as the keyword arguments of a UNet."""
    text = {"encoder_hidden_states": row["text"]}
    if "text_embeds" in row:
        text["added_cond_kwargs"] = {name: row[name] for name in ("text_embeds", "time_ids")}
    return text


def complete_parts(root):
    """The folders 00000-of-00002, 00001-of-00002 ... in root, or root itself. ValueError for incomplete parts."""
    parts = sorted(p for p in root.iterdir() if re.fullmatch(r"\d+-of-\d+", p.name) and p.is_dir())
    if not parts:
        return [root]
    expected = parts[0].name.partition("-of-")[2]
    if [p.name for p in parts] != [f"{i:05}-of-{expected}" for i in range(len(parts))] or int(expected) != len(parts):
        raise ValueError(f"{root} holds {len(parts)} of {int(expected)} parts: encode or copy the missing ones")
    for part in parts:
        known = read_manifest(part) or {"rows": 0, "total": "its"}
        if known["rows"] != known["total"]:
            raise ValueError(f"{part} has {known['rows']} of {known['total']} rows: resume with the same --mode=encode")
    return parts

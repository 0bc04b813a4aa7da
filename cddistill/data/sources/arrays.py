"""Precomputed arrays, such as latents and text embeddings, memory-mapped from disk."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np

from cddistill.data.contracts import NULL_FILES, Source
from cddistill.data.splits import SPLITS, members

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


class Rows:
    """Memory-mapped arrays, concatenated along the first axis. Only the rows that are indexed are read."""

    def __init__(self, arrays, path):
        if len(shapes := {a.shape[1:] for a in arrays}) != 1:
            raise ValueError(f"the parts of {path} have rows of different shapes: {sorted(shapes)}")
        self.arrays, self.ends = arrays, np.cumsum([len(a) for a in arrays])
        self.shape, self.ndim = (int(self.ends[-1]), *arrays[0].shape[1:]), arrays[0].ndim

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        part = int(np.searchsorted(self.ends, i, "right"))
        return self.arrays[part][i - (self.ends[part] - len(self.arrays[part]))]


@dataclasses.dataclass(frozen=True)
class Arrays(Source):
    """Precomputed arrays in the folder data.path."""

    x0_shape: tuple[int, ...] = ()  # height, width, channels; for text only (prompts without images, no x0.npy)

    precomputed = True

    def open(self, config, split):
        return ArrayItems(config, split, self.x0_shape)


class ArrayItems:
    """Rows of .npy files in the sub-folders train, validation and test. Without these, rows are split by hash.

    x0.npy is float16 or float32 [n,h,w,c], as the teacher takes it. Optional: cond.npy [n,h,w,c] in [0, 1],
    captions.json (a list of str), and class_labels.npy int [n] or text.npy [n,l,d] with null.npy [l,d], the embedding
    of the empty prompt, or input_ids.npy [n,l] with null_input_ids.npy [l], for methods that train the text encoder;
    for SDXL also text_embeds.npy [n,e], null_text_embeds.npy [e] and time_ids.npy [n,6]. With
    data.x0_shape, x0.npy is not needed: for methods that train on text only. Rows are not augmented: latents cannot be
    mirrored. The files may be split into folders 00000-of-00002 and so on, as --mode=encode writes them.
    """

    def __init__(self, config, split, x0_shape=()):
        root = Path(config.path)
        divided = any((root / name).is_dir() for name in SPLITS)
        self.root = root / split if divided else root
        self.parts = complete_parts(self.root)
        self.arrays = {name: self.join(f"{name}.npy") for name in AXES if (self.parts[0] / f"{name}.npy").exists()}
        if "x0" not in self.arrays and not (x0_shape and self.arrays):
            raise ValueError(
                f"there is no x0.npy in {self.root} (data.path); expected float16 or float32 [n,h,w,c], or text "
                "and data.x0_shape, as in (64, 64, 4)"
            )
        self.x0_shape, n = x0_shape, len(next(iter(self.arrays.values())))
        captions = [path for part in self.parts if (path := part / "captions.json").exists()]
        read = (json.loads(path.read_text("utf-8")) for path in captions)
        self.captions = list(itertools.chain(*read)) if captions else [""] * n
        self.null_label = np.int32(config.num_classes)
        self.check(config)
        self.null = {name: self.read_null(name) for name in NULL_FILES if name in self.arrays}
        rows = map(str, range(n))
        self.rows = [int(row) for row in (rows if divided else members(rows, split))]

    def join(self, file):
        """The rows of one file, concatenated over all parts. Raises ValueError if a part lacks it."""
        if missing := [part for part in self.parts if not (part / file).exists()]:
            raise ValueError(f"{missing[0]} lacks {file}, which the other parts of {self.root} have")
        return Rows([np.load(part / file, mmap_mode="r") for part in self.parts], self.root / file)

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
        labels = self.arrays["class_labels"].arrays if "class_labels" in self.arrays else ()
        if any(x.min() < 0 or x.max() > self.null_label for x in labels):
            raise ValueError(f"class_labels.npy in {self.root} must be in 0 .. {self.null_label}, the null label")

    def read_null(self, name):
        """The empty prompt's embedding or token ids, one of NULL_FILES, float32."""
        path = self.parts[0] / NULL_FILES[name]
        expected = self.arrays[name].shape[1:]
        if not path.exists():
            raise ValueError(f"{name}.npy needs {path}, the embedding of the empty prompt, of shape {expected}")
        null = np.load(path).astype(np.float32)
        if null.shape != expected:
            raise ValueError(f"{path} is {null.shape}; expected {expected} as a row of {name}.npy")
        return null

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
            ids = lambda row: {"input_ids": row["input_ids"].astype(np.int32)}  # below 2^24, exact in float32
            return item | {"text": ids(row), "null": ids(row | self.null)}
        if "text" in row:
            return item | {"text": embeddings(row), "null": embeddings(row | self.null)}
        return item | {"text": {"class_labels": label}, "null": {"class_labels": self.null_label}}


def embeddings(row):
    """The text arrays of a row, as the keyword arguments of a UNet."""
    text = {"encoder_hidden_states": row["text"]}
    if "text_embeds" in row:
        text["added_cond_kwargs"] = {name: row[name] for name in ("text_embeds", "time_ids")}
    return text


def complete_parts(root):
    """The folders 00000-of-00002, 00001-of-00002 ... in root, or root itself. ValueError for incomplete parts."""
    parts = sorted(p for p in root.glob("*-of-*") if p.is_dir())
    if not parts:
        return [root]
    expected = int(parts[0].name.partition("-of-")[2])
    if [p.name for p in parts] != [f"{i:05}-of-{expected:05}" for i in range(expected)]:
        raise ValueError(f"{root} holds {len(parts)} of {expected} parts: encode or copy the missing ones")
    for part in parts:
        manifest = part / "manifest.json"
        known = json.loads(manifest.read_text()) if manifest.is_file() else {"rows": 0, "total": "its"}
        if known["rows"] != known["total"]:
            raise ValueError(f"{part} has {known['rows']} of {known['total']} rows: resume with the same --mode=encode")
    return parts

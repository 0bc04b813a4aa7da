"""Precomputed arrays, such as an autoencoder's latents and a text encoder's embeddings, mapped from disk."""

import json
from pathlib import Path

import numpy as np

from cddistill.data.splits import SPLITS, members

AXES = {"x0": 4, "cond": 4, "class_labels": 1, "text": 3, "text_embeds": 2, "time_ids": 2}


class Arrays:
    """Rows of .npy files, in sub-folders train, validation and test or else split by row.

    x0.npy float16|32 [n,h,w,c], as the teacher takes it; optional cond.npy [n,h,w,c] in [0, 1], captions.json (a list
    of str), and class_labels.npy int [n] or text.npy [n,l,d] with null.npy [l,d], the empty prompt's; for SDXL also
    text_embeds.npy [n,e], null_text_embeds.npy [e], time_ids.npy [n,6]. Not augmented: latents cannot be mirrored.
    """

    def __init__(self, config, split):
        root = Path(config.path)
        divided = any((root / name).is_dir() for name in SPLITS)
        self.root = root / split if divided else root
        if not (self.root / "x0.npy").exists():
            raise ValueError(f"there is no x0.npy in {self.root} (data.path); expected float16 or float32 [n,h,w,c]")
        paths = {name: self.root / f"{name}.npy" for name in AXES}
        self.arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items() if path.exists()}
        n = len(self.arrays["x0"])
        captions = self.root / "captions.json"
        self.captions = json.loads(captions.read_text("utf-8")) if captions.exists() else [""] * n
        self.null_label = np.int32(config.num_classes)
        self.check(config.task)
        self.null = {name: self.read_null(name) for name in ("text", "text_embeds") if name in self.arrays}
        rows = map(str, range(n))
        self.rows = [int(row) for row in (rows if divided else members(rows, split))]

    def check(self, task):
        """ValueError for arrays that do not belong together."""
        n = len(self.arrays["x0"])
        for name, array in self.arrays.items():
            if array.ndim != AXES[name] or len(array) != n:
                expected = f"{AXES[name]} axes, the first of length {n} as in x0.npy"
                raise ValueError(f"{name}.npy in {self.root} is {array.shape}; expected {expected}")
        if len(self.captions) != n:
            raise ValueError(f"captions.json in {self.root} has {len(self.captions)} captions for {n} rows of x0.npy")
        if task != "none" and "cond" not in self.arrays:
            raise ValueError(f"task {task} on precomputed arrays needs {self.root / 'cond.npy'}, made beforehand")
        if ("text_embeds" in self.arrays) != ("time_ids" in self.arrays):
            raise ValueError(f"text_embeds.npy and time_ids.npy belong together; {self.root} has only one of them")
        labels = self.arrays.get("class_labels", np.zeros(1, np.int32))
        if labels.min() < 0 or labels.max() > self.null_label:
            raise ValueError(f"class_labels.npy in {self.root} must be in 0 .. {self.null_label}, the null label")

    def read_null(self, name):
        """The empty prompt's embedding that belongs to text or text_embeds."""
        path = self.root / {"text": "null.npy", "text_embeds": "null_text_embeds.npy"}[name]
        expected = self.arrays[name].shape[1:]
        if not path.exists():
            raise ValueError(f"{name}.npy needs {path} beside it, {expected}, made from the empty prompt")
        null = np.load(path).astype(np.float32)
        if null.shape != expected:
            raise ValueError(f"{path} is {null.shape}; expected {expected} as a row of {name}.npy")
        return null

    def __len__(self):
        return len(self.rows)

    def item(self, i, rng):
        """Item i, with the keys of Pixels.item."""
        row = {name: np.asarray(array[self.rows[i]], np.float32) for name, array in self.arrays.items()}
        label = np.int32(row.get("class_labels", self.null_label))
        item = {"caption": self.captions[self.rows[i]], "label": label}
        item |= {name: row[name] for name in ("x0", "cond") if name in row}
        if "text" in row:
            return item | {"text": embeddings(row), "null": embeddings(row | self.null)}
        return item | {"text": {"class_labels": label}, "null": {"class_labels": self.null_label}}


def embeddings(row):
    """A row's text arrays as the keyword arguments of a teacher."""
    text = {"encoder_hidden_states": row["text"]}
    if "text_embeds" in row:
        text["added_cond_kwargs"] = {name: row[name] for name in ("text_embeds", "time_ids")}
    return text

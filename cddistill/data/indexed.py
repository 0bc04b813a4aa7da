"""Images in shards, such as tar files: what all sources that read through an index have in common."""

import dataclasses
import functools
import importlib.util
import io
import re
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from cddistill import sharding
from cddistill.data.captions import CAPTIONS, FURTHER, chosen, facts
from cddistill.data.contracts import Element, Source
from cddistill.data.crops import CROPS, Crop, decoded
from cddistill.data.digests import of_values
from cddistill.data.index import Format, Index, open_index, stamp_of
from cddistill.data.listing import check_some, report_bad
from cddistill.data.sides import sides_below
from cddistill.data.splits import RULES, SPELLINGS, SPLITS, split_folders, top

PICTURES = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image/encoded", "original_image",
              "original", "input_image"),
    **{key: FURTHER[key] for key in ("edited", "depth")},
}  # fmt: skip
"""Fields that are images, by their names in rows and records, in any case of the letters."""
WORDS = {word for spellings in SPELLINGS.values() for word in spellings}


@dataclasses.dataclass(frozen=True)
class Indexed(Source):
    """Images in the shards below the folder data.path."""

    split: Literal[*RULES] = "auto"  # as of a folder; a shard is also in a split by its name, train-00000-of-00002
    crop: Literal[*CROPS] = "resize"  # as of a folder

    format: ClassVar[Format]
    needs: ClassVar[str] = ""  # a module of the extra `data`
    sized = bucketed = True

    def open(self, config, split):
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise ValueError(f"data.source {config.source_name} needs {self.needs}: pip install cddistill[data]")
        try:
            contents = scan(self, config.path, config.skip_bad)
            return IndexedImages(contents, config, split, CROPS[self.crop], self.format)
        except ValueError:
            scan.cache_clear()  # the shards may be mended before the next attempt
            raise

    def fingerprint(self, opened):
        return {"shards": of_values(stamp_of(shard) for shard in opened.index.shards)}


class Contents(NamedTuple):
    """What the shards hold."""

    index: Index
    parts: dict[str, np.ndarray]  # by split: numbers of rows, uint32, in a fixed pseudo-random order


@functools.lru_cache(maxsize=4)  # so that all splits share one look at the shards
def scan(source: Indexed, path: str, skip_bad: bool) -> Contents:
    """Open the index of a folder and divide its rows into splits. Says in a line what was found."""
    index = open_index(path, source.format)
    damaged = [shard["damaged"] for shard in index.shards if shard["damaged"]]
    report_bad(damaged, f"{len(damaged)} of {len(index.shards)} shards in {index.root} cannot be read whole", skip_bad)
    names = [shard["name"] for shard in index.shards]
    places = [placed(name) for name in names]
    folders = {} if source.split == "hash" else split_folders(places)
    parts = divide(index, [folders.get(top(place)) for place in places] if folders else None, source.split)
    if sharding.is_host0():
        total = {key: sum(shard[key] for shard in index.shards) for key in ("bare", "left")}
        said = [f"{len(names)} shards", f"{len(index.rows)} images"]
        said += [f"{total['bare']} without a caption"] if total["bare"] else []
        some = [name for shard in index.shards for name in shard["some"]][:3]
        said += [f"{total['left']} samples without an image left out ({', '.join(some)})"] if total["left"] else []
        by = {"auto": "shard" if folders else "hash of the name"}.get(source.split, f"data.split={source.split!r}")
        print(f"{index.root}: {', '.join(said)}; {sizes(parts)}, by {by}", flush=True)
    return Contents(index, parts)


def placed(shard: str) -> str:
    """A shard's path, below its split if its name has one, as train/ for data/cats-train-00000.tar."""
    words = {word for word in re.split("[-_.]", shard.rpartition("/")[2]) if word.lower() in WORDS}
    return f"{words.pop()}/{shard}" if len(words) == 1 else shard


def divide(index: Index, places: list[str | None] | None, rule: str) -> dict[str, np.ndarray]:
    """The numbers of an index's rows by split, each in the order of their digests: `splits.RULES` for arrays.

    places are the splits of the shards, None without such shards.
    """
    digests = np.ascontiguousarray(index.rows["digest"])
    order = np.argsort(digests, kind="stable").astype(np.uint32)
    if rule == "all":
        return dict.fromkeys(SPLITS, order)
    if places is None and rule != "fill":
        number = np.minimum(digests[order] % np.uint64(10), 2)
        return {split: order[number == k] for k, split in ((2, "train"), (1, "validation"), (0, "test"))}
    places = places or ["train"] * len(index.shards)
    codes = np.array([SPLITS.index(place) if place else len(SPLITS) for place in places], np.uint8)
    number = np.repeat(codes, [shard["rows"] for shard in index.shards])[order]
    parts = {split: order[number == k] for k, split in enumerate(SPLITS)}
    for split in ("test", "validation") if rule == "fill" else ():
        if not len(parts[split]):
            train = parts["train"]
            n = max(len(train) // 10, min(1, len(train) - 1))
            parts |= {split: train[:n], "train": train[n:]}
    return parts


def sizes(parts) -> str:
    """Splits and their numbers of images."""
    return ", ".join(f"{split} {len(rows)}" for split, rows in parts.items())


def fields_of(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sample from a row or record: images as bytes, "caption", "label" and "instruction" as known.

    Hugging Face's {"bytes": ..., "path": ...} serves as an image. Raises ValueError, with this name, for other types.
    """
    row, fields = {key.strip().lower(): x for key, x in row.items()}, {}
    for field, known in PICTURES.items():
        value = row.get(key := chosen(row, known))
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, bytes):
            raise ValueError(f"{name} has {key} of type {type(value).__name__}: store the bytes of an image file")
        fields |= {} if value is None else {field: value}
        row = {key: x for key, x in row.items() if key not in known}
    if not any(row.get(key) for key in CAPTIONS):
        row["caption"] = row.get("txt")
    row = {key: x.decode("utf-8", "surrogateescape") if isinstance(x, bytes) else x for key, x in row.items()}
    try:
        return fields | facts({"label": row.get("cls")} | row)[0]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class IndexedImages:
    """The images of a split. Captions and labels are read with the image; images without a label get the null label.

    Labels are numbers in 0 .. data.num_classes - 1, which the loader checks when it reads one.
    """

    num_labels = 0

    def __init__(self, contents: Contents, config, split: str, crop: Crop, format: Format):
        self.index, self.rows, self.format, self.crop = contents.index, contents.parts[split], format, crop
        self.size, self.null, self.ends = config.size, config.num_classes, contents.index.ends
        self.skip = config.skip_bad
        if not len(self.rows):
            raise ValueError(
                f"the {split} split of {self.index.root} is empty ({sizes(contents.parts)}): name shards like "
                f"{split}-00000, or set data.split to 'fill', which takes it from train, or to 'all'"
            )
        check_some(lambda i: self.element(i, None), len(self), f"images in {self.index.root}", config.skip_bad)

    def __len__(self):
        return len(self.rows)

    def name(self, i: int) -> str:
        """What identifies image i."""
        return f"{self.index.rows[self.rows[i]]['digest']:016x}"

    def layout(self) -> tuple[np.ndarray, np.ndarray]:
        """(the positions in the order in which they lie in the shards, the number of them up to and with each)."""
        order = np.argsort(self.rows)
        return order.astype(np.uint32), np.searchsorted(self.rows[order], self.ends)

    def sides(self):
        """The width and height of each image, uint32 [n, 2], upright."""
        found = sides_below(self.index, self.format, self.skip)[self.rows]
        return np.stack([found["width"], found["height"]], 1)

    def element(self, i, rng, shape=None):
        """Image i, of data.size or of a shape (height, width)."""
        row = int(self.rows[i])
        shard = self.index.shards[int(np.searchsorted(self.ends, row, "right"))]["name"]
        at, size, _ = self.index.rows[row].tolist()
        name, fields = self.format.sample(self.index.root / shard, shard, at, size)
        try:
            element = self.opened(name, fields, shape or self.size)
        except ValueError as error:
            said = str(error)
            raise ValueError(said if said.startswith(name) else f"{name}: {said}") from error
        return self.crop.cut(element, shape or self.size, rng)

    def opened(self, name: str, fields: dict[str, Any], size) -> Element:
        """The images of a sample, decoded, and what is known of them."""
        if fields.get("image") is None:
            raise ValueError("it has no image: leave it out")
        if isinstance(label := fields.get("label", self.null), str):
            raise ValueError(f"its label {label!r} is the name of a class: store numbers from 0")
        others = {
            key: (f"{name}'s {key} image", io.BytesIO(fields[key]))
            for key in ("edited", "depth")
            if fields.get(key) is not None
        }
        element = decoded(self.crop, size, name, io.BytesIO(fields["image"]), others)
        further = {"instruction": fields["instruction"]} if "instruction" in fields else {}
        return element | {"label": label, "caption": fields.get("caption", "")} | further

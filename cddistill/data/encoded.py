"""Rows that --mode=encode wrote: latents, text embeddings, conditions and captions.

A split is a folder of shards or, where its images are in buckets, one with such a folder for each bucket, and a
manifest.json that lists them: {"format": 2, "buckets": {"512x512": 31, "576x448": 7}}, widths x heights and rows.
"""

from collections.abc import Mapping

import numpy as np

from cddistill import io
from cddistill.data import shards
from cddistill.data.buckets import named, parse, readable

LISTED = 2  # format of a manifest that lists buckets
OWN = ("bucket", "first", "rows", "row", "made_by")  # keys of a bucket's manifest that others need not have alike


def is_encoded(folder) -> bool:
    """Whether a split's folder has shards; versions before these wrote .npy files, and other manifests."""
    path = folder / shards.MANIFEST
    return path.is_file() and "format" in io.read_json(path, "encode again")


class EncodedItems(shards.Shards):
    """The rows of a split that --mode=encode wrote: see `shards.Shards`. They are not augmented."""

    kind = shards.Kind(
        *("encode", "encoded rows", "data.path"),
        {"row": dict, "made_by": str, "seed": int, "fingerprints": dict, "imageless": list | None}
        | {"bucket": str | None, "first": int | None},  # of one bucket: its rows' first number in the split
    )

    def __init__(self, folder, config):
        super().__init__(folder, config.skip_bad)
        self.encoded, self.null_label = self.manifest, np.int32(config.num_classes)
        if config.task.conditional and "cond" not in self.manifest["row"]:
            raise ValueError(
                f"task {config.task_name} on precomputed arrays needs conditions, and {folder} has none: "
                "--mode=encode with the same data.task writes them"
            )

    def names(self) -> list[str]:
        """The names of the files in the folder that are read."""
        return [shards.MANIFEST, shards.NULL, *(shards.shard_file("", int(k)).name for k in self.numbers)]

    def item(self, i, rng=None):
        """Item i, with the keys of `Pixels.item`."""
        item = super().item(i)
        label = np.int32(item["text"].get("class_labels", self.null_label))
        if not 0 <= label <= self.null_label:
            raise ValueError(
                f"row {i} of {self.folder} has the label {label}, and labels are in 0 .. {self.null_label}, the null "
                "label: set data.num_classes to the number of classes"
            )
        item |= {"null": {"class_labels": self.null_label}} if "class_labels" in item["text"] else {}
        if shape := self.manifest.get("imageless"):  # of prompts only
            item |= {"x0": np.zeros(shape, np.float32), "imageless": np.bool_(True)}
        return item | {"label": label}


def listed(folder) -> dict[str, int]:
    """{"576x448": its number of rows} of a split whose rows are in buckets; {} of another, or if there is none.

    Raises ValueError for a damaged list.
    """
    path = io.path(folder) / shards.MANIFEST
    known = io.read_json(path, "encode again", buckets=dict | None) if path.is_file() else {}
    numbers = known.get("buckets") or {}
    rows = all(type(n) is int and n > 0 for n in numbers.values())
    if numbers and not (known.get("format") == LISTED and rows and readable(",".join(numbers))):
        raise ValueError(f"{path} lists the buckets {numbers}, which this version cannot read: encode again")
    return numbers


class EncodedBuckets:
    """The rows of a split in buckets: `buckets` has those of each, by the height and width of its images.

    Raises ValueError for buckets that are missing, or that are not of one command.
    """

    def __init__(self, folder, config):
        if config.pairs:
            raise ValueError(f"data.pairs have one shape, and the rows in {folder} several: leave one of them out")
        self.folder, self.buckets = folder, {}
        for name, rows in listed(folder).items():
            self.buckets[parse(name)[0]] = part = EncodedItems(folder / name, config)
            if (part.manifest.get("bucket"), part.manifest["rows"]) != (name, rows):
                raise ValueError(f"{folder / name} has not the {rows} rows of {folder / shards.MANIFEST}: encode again")
        self.encoded, *others = (part.manifest for part in self.buckets.values())
        for other in others:
            if any(other.get(key) != self.encoded.get(key) for key in {*other, *self.encoded} - {*OWN}):
                where = f"{folder / self.encoded['bucket']} and {folder / other['bucket']}"
                raise ValueError(f"{where} were not encoded by one command: encode again")

    def names(self) -> list[str]:
        """The names of the files in the folder that are read."""
        parts = (f"{named(shape)}/{name}" for shape, part in self.buckets.items() for name in part.names())
        return [shards.MANIFEST, *parts]

    def __len__(self):
        return sum(map(len, self.buckets.values()))

    def item(self, i, rng=None):
        """Item i, bucket after bucket, with the keys of `Pixels.item`."""
        for part in self.buckets.values():
            if i < len(part):
                return part.item(i)
            i -= len(part)
        raise IndexError(i)


def open_encoded(folder, config) -> EncodedItems | EncodedBuckets:
    """The rows of a split that --mode=encode wrote."""
    return (EncodedBuckets if listed(folder) else EncodedItems)(folder, config)


def check_listed(folder, numbers: Mapping[str, int]) -> None:
    """ValueError if there are rows in a split's folder, and they are not in these buckets; {}: in none."""
    path = folder / shards.MANIFEST
    if path.is_file() and (there := listed(folder)) != numbers:
        old, new = (", ".join(f"{name} {n}" for name, n in x.items()) or "none" for x in (there, numbers))
        said = f"buckets and their rows: {old} there, {new} now"
        raise ValueError(f"{folder} was made by another command ({said}): undo that, or choose another --output")

"""Rows that were computed once, in files of a fixed number of rows: the format of --mode=encode and --mode=pairs.

A folder holds manifest.json, null.safetensors (the text of the empty prompt) and 00000000.safetensors,
00000001.safetensors ..., each with a block of rows: x0, text, and perhaps conditions and captions. A shard's header has
a checksum of each array and of each row.
"""

import concurrent.futures
import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np
import safetensors

from cddistill import io
from cddistill.checksums import crc32
from cddistill.models import files

MANIFEST, NULL, FORMAT = "manifest.json", "null.safetensors", 1
HEADER = "pairs"  # the key of a file's metadata; pairs were the first to be stored like this
CHECKED = 64  # shards, evenly spaced, whose headers are read when a folder is opened; of others, when they are used
GIVEN = ("x0", "cond", "cond_latent")  # arrays of a row that are no text


class Kind(NamedTuple):
    """What the rows are, for messages, and what their manifest must have."""

    mode: str  # that writes them
    noun: str
    option: str  # that names their folder
    keys: dict[str, Any]  # types of keys of the manifest, as `io.read_json` takes them

    @property
    def remedy(self) -> str:
        return f"delete it and make it again with the same --mode={self.mode}"


class Opened(NamedTuple):
    """A shard whose header was read."""

    tensors: dict[str, files.Tensor]
    sums: np.ndarray | None  # CRC-32 of each row, uint32 [n]; None where an older version wrote none


# ---- what is where


def shard_file(folder, k: int) -> Path:
    """The path of shard k."""
    return Path(folder) / f"{k:08}.safetensors"


def num_shards(manifest: dict) -> int:
    """The number of shards for all rows."""
    return -(-manifest["rows"] // manifest["shard"])


def shard_rows(manifest: dict, k: int) -> range:
    """The rows of shard k."""
    size = manifest["shard"]
    return range(k * size, min((k + 1) * size, manifest["rows"]))


def identity(manifest: dict) -> str:
    """A checksum of everything that the rows depend on."""
    return f"{zlib.crc32(json.dumps(manifest | {'made_by': ''}, sort_keys=True).encode()):08x}"


def describe(manifest: dict, k: int) -> dict:
    """What the header of shard k says besides checksums."""
    rows = shard_rows(manifest, k)
    return {"manifest": identity(manifest), "first": rows.start, "rows": len(rows)}


def row_sums(arrays: dict[str, np.ndarray]) -> list[int]:
    """CRC-32 of each row of some arrays [n, ...]: of their bytes in C order, array after array by name."""
    ordered = [np.ascontiguousarray(arrays[name]) for name in sorted(arrays)]
    sums = [0] * len(ordered[0])
    for x in ordered:
        sums = [zlib.crc32(row.reshape(-1).view(np.uint8), total) for row, total in zip(x, sums, strict=True)]
    return sums


# ---- reading


def read_manifest(folder, kind: Kind) -> dict:
    """The content of manifest.json. Raises ValueError if it is missing, damaged or of another format version."""
    path = io.path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"there is no {MANIFEST} in {folder}: {kind.option} must be a folder written by --mode={kind.mode}"
        )
    if (version := io.read_json(path, kind.remedy, format=int)["format"]) != FORMAT:
        raise ValueError(
            f"{folder} holds {kind.noun} of format {version}, not {FORMAT}: make them again with --mode={kind.mode}"
        )
    manifest = io.read_json(path, kind.remedy, **{"rows": int, "shard": int} | kind.keys)
    sizes = {name: manifest[name] for name in ("rows", "shard", "x0") if name in manifest}
    numbers = [sizes["rows"], sizes["shard"], *sizes.get("x0", (1, 1, 1))]
    seed = manifest.get("seed", 0)
    if len(numbers) != 5 or not all(type(x) is int and 1 <= x < 2**31 for x in numbers) or seed < 0:
        raise ValueError(f"{path} has {sizes} and seed = {seed}, which are no sizes and no seed: {kind.remedy}")
    return manifest


def read_header(file: Path, kind: Kind) -> tuple[dict[str, files.Tensor], dict]:
    """(tensors, not yet read; metadata) of a shard. Raises ValueError if the file is truncated or not a shard."""
    try:
        tensors = files.read_safetensors(file)
        with safetensors.safe_open(file, "numpy") as opened:
            header = json.loads(opened.metadata()[HEADER])
        if header["crc32"].keys() != tensors.keys():
            raise ValueError("its header names other tensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or not a file of {kind.noun}: {kind.remedy}") from error
    return tensors, header


def read_shard(folder, kind: Kind, manifest: dict, k: int) -> tuple[dict[str, files.Tensor], dict]:
    """`read_header` of shard k. Raises ValueError if the file is truncated or does not match the manifest."""
    file, rows = shard_file(folder, k), shard_rows(manifest, k)
    tensors, header = read_header(file, kind)
    if {name: header.get(name) for name in ("manifest", "first", "rows")} != describe(manifest, k):
        expected = f"rows {rows.start} to {rows.stop - 1}"
        raise ValueError(f"{file} does not hold {expected} of the {kind.noun} that {MANIFEST} describes: {kind.remedy}")
    shapes = {name: x.shape for name, x in tensors.items()}
    known = manifest.get("row") or {"x0": [None, manifest.get("x0")]}
    wrong = [name for name, (_, shape) in known.items() if shapes.get(name) != (len(rows), *shape)]
    if wrong or any(shape[:1] != (len(rows),) for shape in shapes.values()):
        raise ValueError(f"{file} has tensors of other shapes than {MANIFEST} says ({shapes}): {kind.remedy}")
    return tensors, header


def check_bytes(file: Path, kind: Kind, tensors, sums: dict[str, str]) -> None:
    """Raise ValueError if the checksum of a tensor is wrong. Reads the whole file."""
    for name, x in tensors.items():
        stored = np.memmap(file, np.uint8, "r", x.start, (math.prod(x.shape) * x.dtype.itemsize,))
        if crc32(stored) != sums[name]:
            raise ValueError(f"{file} is damaged (the checksum of its {name} is wrong): {kind.remedy}")


class Shards:
    """The rows of a folder. They are read from disk on access, and compared with their checksums; no file stays open.

    Opening looks for all files, reads the headers of CHECKED shards and three of these whole. A shard of a version that
    wrote no checksums of rows is compared in whole when one of its rows is first read. Raises ValueError, naming the
    file and the remedy, for what is missing or damaged. With skip_bad all bytes are read when the folder is opened, so
    that hosts agree, and bad shards are left out with a message. Several threads may read.
    """

    kind: Kind

    def __init__(self, folder, skip_bad: bool = False):
        self.folder = io.local(folder)
        self.manifest, self.skip_bad = read_manifest(self.folder, self.kind), skip_bad
        self.check_presence()
        null, header = read_header(self.folder / NULL, self.kind)
        check_bytes(self.folder / NULL, self.kind, null, header["crc32"])
        self.null = {name: as_used(read_row(x, 0)) for name, x in null.items()}
        self.opened: dict[int, Opened] = {}
        self.numbers = np.array([k for k, good in self.look() if good], np.int64)
        if not len(self.numbers):
            raise ValueError(
                f"{folder} has no usable shard: make the {self.kind.noun} again with --mode={self.kind.mode}"
            )
        sizes = np.minimum(self.manifest["shard"], self.manifest["rows"] - self.numbers * self.manifest["shard"])
        self.ends = np.cumsum(sizes)

    def check_presence(self):
        """Raise ValueError, with the names of some missing files, if any is missing."""
        number, there = num_shards(self.manifest), {file.name for file in self.folder.iterdir() if file.is_file()}
        expected = itertools.chain([NULL], (shard_file("", k).name for k in range(number)))  # perhaps billions
        missing = [*itertools.islice((name for name in expected if name not in there), 3)]
        if missing and not (self.skip_bad and missing[0] != NULL):
            some = ", ".join(missing[:2]) + " and others" * (len(missing) > 2)
            again = f"resume with the same --mode={self.kind.mode}"
            raise ValueError(f"{self.folder} lacks {some} of {number + 1} files: {again}")

    def look(self):
        """(each shard, whether it may be used), after the checks of opening."""
        number = num_shards(self.manifest)
        some = np.unique(np.linspace(0, number - 1, CHECKED).astype(int)).tolist()
        whole = {0, some[len(some) // 2], number - 1}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            if self.skip_bad:
                return enumerate([*pool.map(self.usable, range(number))])
            [*pool.map(lambda k: self.open(k, k in whole), some)]
        return ((k, True) for k in range(number))

    def usable(self, k: int) -> bool:
        """Whether shard k is as it was written; says why if not."""
        try:
            self.open(k, whole=True)
        except ValueError as error:
            print(f"skipped: {error}", flush=True)
            return False
        return True

    def open(self, k: int, whole: bool = False) -> Opened:
        """Shard k after all checks of its header and, with `whole` or if its rows have no checksums, of its bytes."""
        if k not in self.opened:
            file = shard_file(self.folder, k)
            tensors, header = read_shard(self.folder, self.kind, self.manifest, k)
            self.check_shard(file, k, header)
            sums = header.get("row_crc32")
            if whole or sums is None:
                check_bytes(file, self.kind, tensors, header["crc32"])
            self.opened[k] = Opened(tensors, None if sums is None else np.array(sums, np.uint32))
        return self.opened[k]

    def check_shard(self, file: Path, k: int, header: dict) -> None:
        """Further checks of a shard that is opened."""

    def __len__(self):
        return int(self.ends[-1])

    def layout(self):
        """(positions in the order in which they lie in the shards, the number of them up to and with each)."""
        return np.arange(len(self), dtype=np.uint32), self.ends

    def number(self, i: int) -> int:
        """The number that usable row i has among all rows."""
        at = int(np.searchsorted(self.ends, i, "right"))
        return int(self.numbers[at] * self.manifest["shard"] + i - (self.ends[at - 1] if at else 0))

    def row(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of the row with this number, by their names in the shard; floats as float32."""
        k, at = divmod(number, self.manifest["shard"])
        tensors, sums = self.open(k)
        stored = {name: read_row(x, at) for name, x in tensors.items()}
        if sums is not None and row_sums({name: x[None] for name, x in stored.items()})[0] != sums[at]:
            file = shard_file(self.folder, k)
            raise ValueError(f"row {at} of {file} is damaged (its checksum is wrong): {self.kind.remedy}")
        return {name: as_used(x) for name, x in stored.items()}

    def item(self, i, rng=None) -> dict[str, Any]:
        """Usable row i: x0 and perhaps conditions float32 [h,w,c], text and null text as a UNet takes them, caption."""
        text = self.row(self.number(int(i)))
        given = {name: text.pop(name) for name in GIVEN if name in text}
        if "caption" in text:
            given["caption"] = text.pop("caption").tobytes().rstrip(b"\0").decode("utf-8", "surrogatepass")
        return given | {"text": unflatten_text(text), "null": unflatten_text(text | self.null)}


def read_row(x: files.Tensor, i: int) -> np.ndarray:
    """Row i as it is stored. Reads only the bytes of this row and closes the file: there may be 10,000 shards."""
    count = math.prod(x.shape[1:])
    return np.fromfile(x.file, x.dtype, count, offset=x.start + i * count * x.dtype.itemsize).reshape(x.shape[1:])


def as_used(x: np.ndarray) -> np.ndarray:
    """Floats as float32."""
    return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float32)


# ---- text and captions


def flatten_text(text: dict) -> dict:
    """A UNet's text inputs by their names in a shard: encoder_hidden_states, added_cond_kwargs.time_ids ..."""
    return flax.traverse_util.flatten_dict(text, sep=".")


def unflatten_text(arrays: dict) -> dict:
    """The inverse of `flatten_text`."""
    return flax.traverse_util.unflatten_dict(arrays, sep=".")


def caption_rows(captions: list[str]) -> np.ndarray:
    """Captions as they are stored: UTF-8, filled up with zeros, uint8 [n, bytes of the longest]."""
    texts = [caption.encode("utf-8", "surrogatepass") for caption in captions]
    width = max(1, *map(len, texts))
    return np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), np.uint8).reshape(len(texts), width)

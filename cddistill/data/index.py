"""Where each sample of a folder of shards lies: an index that is built once and mapped to memory.

It lies beside the data in the hidden folder .cddistill/, on an object store, too, or, where that cannot be written, in
the user's cache:

    index.tar.json             each shard's size, time of change, number of samples, and what else was found in it
    rows.tar.0f1e2d3c.npy      ROW [n], shard after shard
    shard.tar.0f1e2d3c.npz     the rows of one shard while an index is built, so that an interrupted build continues
"""

import concurrent.futures
import contextlib
import hashlib
import io as memory
import json
import logging
import secrets
import time
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from cddistill import io
from cddistill.data.listing import PROGRESS_EVERY, data_path, files_below, objects_below

VERSION = 1  # of what is written here
ROW = np.dtype([("at", "<u8"), ("size", "<u4"), ("digest", "<u8")])
"""A sample: where it is in its shard, as the format counts (bytes, or a row group and a row), `splits.digest` of its
name."""
THREADS = 8  # that read shards: most of the time they wait for the disk or the network
REBUILD = "delete its folder, and it is built again"


class Found(NamedTuple):
    """What a shard holds."""

    rows: np.ndarray  # ROW [n]
    bare: int = 0  # of these without a caption, as far as it can be told without reading them
    left: tuple[str, ...] = ()  # names of samples without an image, which are no rows
    damaged: str = ""  # a sentence, for a shard that cannot be read to its end


@runtime_checkable
class Scan(Protocol):
    """What an index is made by."""

    suffix: str  # names the index

    def scan(self, path: PurePath, shard: str) -> Found:
        """What a shard holds. `shard` is its path in data.path, for names and messages; a sentence if it is damaged."""


@runtime_checkable
class Format(Scan, Protocol):
    """A kind of shards, on a disk or on an object store. Samples are read by several threads."""

    shards: str  # what data.path should be: "a folder of tar files"

    def is_shard(self, name: str) -> bool:
        """Whether a file has the name of a shard."""

    def sample(self, path: PurePath, shard: str, at: int, size: int) -> tuple[str, dict[str, Any]]:
        """A sample's name, and its fields: see `indexed.fields_of`. Raises ValueError for one that is damaged."""

    def sides(self, path: PurePath, shard: str, rows: np.ndarray) -> Found:
        """The sides of a shard's pictures, upright, as rows of `sides.SIDES`: zeros, and a sentence in `left`, for
        those that cannot be read."""


class Index(NamedTuple):
    """The samples of a folder."""

    root: PurePath
    shards: list[dict[str, Any]]  # name, bytes, changed, rows, bare, left, some, damaged; sorted by name
    rows: np.ndarray  # ROW [n], mapped to memory

    @property
    def ends(self) -> np.ndarray:
        """The number of rows up to and with each shard, int64 [shards]."""
        return np.cumsum([shard["rows"] for shard in self.shards], dtype=np.int64)


def open_index(path: str, format: Format) -> Index:
    """The index of the shards below a folder; those that are new or have changed are read first, and named.

    Raises ValueError, in one sentence, for a folder without shards and an index that cannot be written anywhere.
    """
    root, now = shards_below(path, format)
    if not now:
        raise ValueError(f"there is no shard in {root} (data.path): expected {format.shards}")
    return index_of(root, now, format, ROW)


def index_of(root: PurePath, now: list[dict[str, Any]], format: Scan, row: np.dtype) -> Index:
    """The index of these shards, with the rows that `scan` finds, of this type. Raises ValueError as `open_index`."""
    own = Path.home() / ".cache" / "cddistill" / "index" / named(str(root if io.is_remote(root) else root.resolve()))
    places = [root / ".cddistill", own]
    known = [(place, old) for place in places if (old := read(place, root, format.suffix, row))]
    for place, index in known:
        if [stamp_of(shard) for shard in index.shards] == [stamp_of(shard) for shard in now]:
            tidy(place, format.suffix, index)
            return index
    old = known[0][1] if known else None
    say_changes(root, now, old)
    return build(writable(places), root, format, now, old)


def shards_below(path: str, format: Format) -> tuple[PurePath, list[dict[str, Any]]]:
    """(the folder data.path, its shards in order of names with what tells whether they have changed)."""
    if io.is_remote(path):
        root = io.path(path)
        there = objects_below(root)
    else:
        root = data_path(path, format.shards)
        there = dict.fromkeys(files_below(root))
    names = sorted(name for name in there if format.is_shard(name))
    stamps = (there[name] or stamp(root / name) for name in names)
    return root, [{"name": name, "bytes": n, "changed": x} for name, (n, x) in zip(names, stamps, strict=True)]


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change of a local file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def stamp_of(shard: dict[str, Any]) -> tuple[str, int, int | str]:
    """What tells whether a shard has changed, and which it is."""
    return shard["name"], shard["bytes"], shard["changed"]


def named(content: str) -> str:
    """A part of a file's name that depends on a text."""
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def writable(places: list[PurePath]) -> PurePath:
    """The first folder that can be written. Raises ValueError with the reason for the last."""
    for place in places[:-1]:
        try:
            io.ensure_writable(place)
            return place
        except ValueError:
            logging.warning("%s cannot be written: the index of the shards goes to %s", place, places[-1])
    io.ensure_writable(places[-1], "the variable HOME")
    return places[-1]


def say_changes(root: PurePath, now, old: Index | None) -> None:
    """Name the shards that differ from those of an older index."""
    if old is None:
        return
    before, after = ({shard["name"]: (shard["bytes"], shard["changed"]) for shard in x} for x in (old.shards, now))
    for what, names in (
        ("changed since it was indexed: read again", [x for x in after if before.get(x, after[x]) != after[x]]),
        ("new: read", [x for x in after if x not in before]),
        ("gone: its samples are left out", [x for x in before if x not in after]),
    ):
        if names:
            others = f" and {len(names) - 1} others" if len(names) > 1 else ""
            logging.warning("%s%s: %s", root / names[0], others, what)


# ---- reading


def read(place: PurePath, root: PurePath, suffix: str, row: np.dtype) -> Index | None:
    """The index in a folder; None without one of this version. ValueError, naming it, for one that is damaged."""
    path = place / f"index.{suffix}.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            return None
        rows = mapped(place / content["rows"])
        index = Index(root, content["shards"], rows)
        if rows.dtype != row or len(rows) != index.ends[-1]:
            raise ValueError(f"{content['rows']} has {len(rows)} rows of another number or type")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the index {path} is damaged ({error}): {REBUILD}") from error
    return index


def mapped(file: PurePath) -> np.ndarray:
    """The array in a file, mapped to memory; of one on an object store, a copy in scratch is."""
    return np.load(io.local(file), mmap_mode="r", allow_pickle=False)


def tidy(place: PurePath, suffix: str, index: Index) -> None:
    """Remove what a finished index replaces; not when it is written, for other hosts may still be at it."""
    used = Path(index.rows.filename).name
    for file in [*place.glob(f"shard.{suffix}.*.npz"), *place.glob(f"rows.{suffix}.*.npy")]:
        if file.name != used:
            with contextlib.suppress(OSError):
                file.unlink()


# ---- building


def build(place: PurePath, root: PurePath, format: Scan, now, old: Index | None) -> Index:
    """Index the shards `now`, and write the index. Those that an older index has are not read again."""
    known = {} if old is None else {stamp_of(shard): k for k, shard in enumerate(old.shards)}
    ends = None if old is None else old.ends

    def found(shard) -> tuple[dict[str, Any], np.ndarray]:
        if (k := known.get(stamp_of(shard))) is None:
            return indexed(place, root, format, shard)
        return old.shards[k], old.rows[ends[k] - old.shards[k]["rows"] : ends[k]]

    first = secrets.randbelow(len(now))  # hosts that share the folder index different shards, and find each other's
    parts, last = [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(found, now[first:] + now[:first]):
            parts.append(part)
            if time.monotonic() - last > PROGRESS_EVERY:
                logging.warning("indexed %d of %d shards in %s", len(parts), len(now), root)
                last = time.monotonic()
    parts = parts[len(now) - first :] + parts[: len(now) - first]
    return write(place, root, format.suffix, [shard for shard, _ in parts], [rows for _, rows in parts])


def indexed(place: PurePath, root: PurePath, format: Scan, shard: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """(a shard as the index has it, its rows), written to a file at once, or read from that of an earlier start."""
    file = place / f"shard.{format.suffix}.{named(json.dumps([VERSION, *stamp_of(shard)]))}.npz"
    with (
        contextlib.suppress(FileNotFoundError),
        np.load(memory.BytesIO(file.read_bytes()), allow_pickle=False) as part,
    ):
        return json.loads(str(part["shard"])), part["rows"]
    found = format.scan(root / shard["name"], shard["name"])
    said = {"rows": len(found.rows), "bare": found.bare, "left": len(found.left), "some": [*found.left[:3]]}
    shard = shard | said | {"damaged": found.damaged}
    np.savez(buffer := memory.BytesIO(), shard=json.dumps(shard), rows=found.rows)
    io.write_atomic(file, buffer.getvalue())
    return shard, found.rows


def write(place: PurePath, root: PurePath, suffix: str, shards: list[dict[str, Any]], rows: list[np.ndarray]) -> Index:
    """Write an index: its rows, and then what names them."""
    name = f"rows.{suffix}.{named(json.dumps(shards))}.npy"
    np.save(buffer := memory.BytesIO(), np.concatenate(rows))
    rows.clear()
    io.write_atomic(place / name, buffer.getvalue())
    io.write_json(place / f"index.{suffix}.json", {"version": VERSION, "rows": name, "shards": shards})
    return Index(root, shards, mapped(place / name))

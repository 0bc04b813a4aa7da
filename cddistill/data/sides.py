"""The sides of the pictures in shards, which data.buckets needs: read once, and kept in an index of their own.

It lies beside that of the samples, and is built, continued, shared by hosts and brought up to date as that is:

    index.sides-tar.json, rows.sides-tar.0f1e2d3c.npy    as in index.py, with SIDES [n]
"""

import dataclasses
import functools
from collections.abc import Callable
from io import BytesIO
from pathlib import PurePath
from typing import Any

import numpy as np

from cddistill.data.images import sides_of
from cddistill.data.index import REBUILD, Format, Found, Index, index_of
from cddistill.data.listing import patiently, report_bad

SIDES = np.dtype([("width", "<u4"), ("height", "<u4")])  # px, of the upright picture


def sides_below(index: Index, format: Format, skip_bad: bool) -> np.ndarray:
    """SIDES [n] of an index's rows, mapped to memory; zeros for pictures whose header cannot be read.

    Raises ValueError, naming the first of these, unless skip_bad.
    """
    found = index_of(index.root, index.shards, Headers(format, index), SIDES)
    if [shard["rows"] for shard in found.shards] != [shard["rows"] for shard in index.shards]:
        raise ValueError(f"the index of sides in {index.root} is not that of its samples: {REBUILD}")
    left = sum(shard["left"] for shard in found.shards)
    some = [sentence for shard in found.shards for sentence in shard["some"]]
    report_bad(some, f"{left} of {len(found.rows)} pictures in {index.root} have no header that can be read", skip_bad)
    return found.rows


@dataclasses.dataclass(frozen=True)
class Headers:
    """`index.Scan` for SIDES of the shards of an index."""

    format: Format
    index: Index

    @property
    def suffix(self) -> str:
        return f"sides-{self.format.suffix}"

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Where in the index each shard is, by its name."""
        return {shard["name"]: k for k, shard in enumerate(self.index.shards)}

    def scan(self, path: PurePath, shard: str) -> Found:
        """The sides of a shard's pictures. One without samples, such as a damaged one, is not opened."""
        k = self.places[shard]
        n, end = self.index.shards[k]["rows"], self.index.ends[k]
        return self.format.sides(path, shard, self.index.rows[end - n : end]) if n else Found(np.empty(0, SIDES))


def of_headers(rows: np.ndarray, read: Callable[[int, int], tuple[Any, str]]) -> Found:
    """SIDES of samples; read(at, size) of an `index.ROW` gives a picture's file, opened, and its name."""
    found, left = np.zeros(len(rows), SIDES), []
    for i, (at, size, _) in enumerate(rows.tolist()):
        try:
            found[i] = patiently(lambda *where: sides_of(*read(*where)), at, size)
        except ValueError as error:
            left.append(str(error))
    return Found(found, left=tuple(left))


def picture(name: str, fields: dict[str, Any]) -> tuple[BytesIO, str]:
    """The file of a sample's picture, opened, and its name. ValueError if it has none."""
    if fields.get("image") is None:
        raise ValueError(f"{name} has no image: leave it out")
    return BytesIO(fields["image"]), name

"""Images in parquet files, as img2dataset and Hugging Face write them: the bytes of an image file in each row."""

import collections
import dataclasses
import functools
import threading
from pathlib import PurePath
from typing import Any

import numpy as np

from cddistill import io
from cddistill.data.captions import CAPTIONS, FURTHER
from cddistill.data.index import ROW, Found
from cddistill.data.indexed import PICTURES, Indexed, fields_of
from cddistill.data.sides import SIDES, of_headers, picture
from cddistill.data.splits import digest

CACHE_BYTES = 2**28  # of row groups, which are read whole
OPEN_FILES = 256
COLUMNS = {*CAPTIONS, "txt", "label", "cls"}.union(*PICTURES.values(), *FURTHER.values())


class Groups:
    """The row groups that were read last, up to CACHE_BYTES. One thread reads at a time."""

    def __init__(self):
        self.kept, self.bytes, self.lock = collections.OrderedDict(), 0, threading.Lock()

    def clear(self):
        """Forget all."""
        with self.lock:
            self.kept.clear()
            self.bytes = 0

    def get(self, path: PurePath, group: int):
        """A row group as a table of the columns that are used."""
        with self.lock:
            if (path, group) in self.kept:
                self.kept.move_to_end((path, group))
                return self.kept[path, group]
            file = opened(path)
            table = file.read_row_group(group, columns=used(file.schema_arrow))
            self.kept[path, group], self.bytes = table, self.bytes + table.nbytes
            while self.bytes > CACHE_BYTES and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes
            return table


class Parquet:
    """Parquet files with a column of image files; see `indexed.PICTURES` and `captions.CAPTIONS` for names."""

    suffix, shards = "parquet", "a folder of *.parquet with a column `image` or `jpg` that holds image files"

    def __init__(self):
        self.groups = Groups()

    def is_shard(self, name: str) -> bool:
        return name.lower().endswith(".parquet")

    def scan(self, path: PurePath, shard: str) -> Found:
        """The rows of a file, from its footer. Raises ValueError for one without a column of images."""
        opened.cache_clear()
        self.groups.clear()  # of files as they were
        import pyarrow

        try:
            file = opened(path)
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        except pyarrow.ArrowException as error:
            return Found(np.empty(0, ROW), damaged=f"{shard} is no whole parquet file ({error}): download it again")
        names = {name.lower() for name in file.schema_arrow.names}
        if not names & {*PICTURES["image"]}:
            raise ValueError(
                f"{shard} has the columns {', '.join(sorted(names))}, and images are expected under "
                f"{' or '.join(PICTURES['image'])}: rename the column that holds them"
            )
        rows = np.empty(sum(sizes), ROW)
        rows["at"] = np.repeat(np.arange(len(sizes)), sizes)
        rows["size"] = np.concatenate([np.arange(n) for n in [0, *sizes]])
        rows["digest"] = [digest(f"{shard}/{i}") for i in range(len(rows))]
        return Found(rows, bare=0 if names & {*CAPTIONS, "txt"} else len(rows))

    def sides(self, path: PurePath, shard: str, rows: np.ndarray) -> Found:
        """Those that the columns `width` and `height` state, 0 where they are null; without them those of the pictures'
        headers, for which all pictures are read. Raises ValueError for other columns of these names."""
        import pyarrow

        file = opened(path)
        names = {name.lower(): name for name in file.schema_arrow.names}
        if not {*SIDES.names} <= {*names}:
            return of_headers(rows, lambda at, size: picture(*self.sample(path, shard, at, size)))
        try:
            table = file.read(columns=[names[side] for side in SIDES.names])
        except pyarrow.ArrowException as error:
            raise ValueError(f"{shard} is damaged ({error}): download it again") from error
        found = np.empty(len(rows), SIDES)
        for side in SIDES.names:
            found[side] = whole_numbers(table.column(names[side]), shard)
        return Found(found)

    def sample(self, path: PurePath, shard: str, at: int, size: int) -> tuple[str, dict[str, Any]]:
        """Row `size` of row group `at`."""
        import pyarrow

        name = f"row {size} of row group {at} in {shard}"
        try:
            table = self.groups.get(path, at)
            row = {column: table.column(column)[size].as_py() for column in table.column_names}
        except (pyarrow.ArrowException, IndexError) as error:
            raise ValueError(f"{name} is damaged ({error}): download {shard} again") from error
        return name, fields_of(name, row)


@functools.lru_cache(maxsize=OPEN_FILES)
def opened(path: PurePath):
    """A parquet file, of which the footer has been read."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(io.opened(path) if io.is_remote(path) else path)


def whole_numbers(column, shard: str) -> np.ndarray:
    """A column as uint32 [n], 0 where it is null. Raises ValueError for one that holds no whole numbers."""
    import pyarrow

    try:
        return column.cast(pyarrow.uint32()).fill_null(0).to_numpy()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shard} has sides of images that are no whole numbers of pixels: {error}") from error


def used(schema) -> list[str]:
    """Names of the columns that are read."""
    return [name for name in schema.names if name.lower() in COLUMNS]


@dataclasses.dataclass(frozen=True)
class ParquetFiles(Indexed):
    """Parquet files in the folder data.path."""

    format = Parquet()
    needs = "pyarrow"

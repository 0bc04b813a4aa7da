"""What is measured of many images, a file for every SHARD of them: no set of images is ever in memory.

All hosts compute together, each its rows of a batch, and host 0 writes the files. Files that are there are kept, so a
stopped evaluation continues, and one of more images starts from those of fewer. A row depends on its number alone.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import PurePath

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from cddistill import io, progress, sharding
from cddistill.data import digests
from cddistill.evals import frechet

SHARD = 512  # rows per file
MANIFEST = "manifest.json"
Measure = Callable[[np.ndarray], dict[str, np.ndarray]]  # numbers of rows -> what is measured of this host's part


def file_of(folder: PurePath, start: int) -> PurePath:
    """The file of the rows from `start` on."""
    return folder / f"{start:08}.safetensors"


def starts(n: int) -> range:
    """The first row of each file."""
    return range(0, n, SHARD)


def mine(x: np.ndarray) -> np.ndarray:
    """This host's part of an array with a row for each row of a batch."""
    return np.split(x, jax.process_count())[jax.process_index()]


def batch_size(rows: int) -> int:
    """Rows at a time, at least `rows`, that all devices share equally."""
    return -(-rows // jax.device_count()) * jax.device_count()


def measure_all(folder: PurePath, identity: dict, n: int, batch: int, measure: Measure, what: str) -> None:
    """Write the files of n rows that are missing; `batch` rows are measured at a time, on all hosts together.

    identity is what rows depend on. Raises ValueError if the folder has rows of another one.
    """
    missing = agreed_missing(folder, identity, n)
    done = n - sum(min(SHARD, n - start) for start in missing)
    with progress.counting(what, n, done, sharding.is_host0()) as advance:
        for start in missing:
            stop, found = min(start + SHARD, n), []
            for first in range(start, stop, batch):
                numbers = np.minimum(np.arange(first, first + batch), stop - 1)  # repeats the last one
                parts = gathered(measure(numbers))
                found.append({name: x[: stop - first] for name, x in parts.items()})
                advance(min(batch, stop - first))
            if sharding.is_host0():
                arrays = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
                io.write_atomic(file_of(folder, start), safetensors.numpy.save(arrays))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{what} are measured")


def agreed_missing(folder: PurePath, identity: dict, n: int) -> list[int]:
    """The first rows of the files that are missing or shorter than n rows ask for, as host 0 sees them."""
    flags = np.zeros(len(starts(n)), bool)
    if sharding.is_host0():
        check_identity(folder, identity)
        flags = np.array([rows_in(file_of(folder, start)) < min(SHARD, n - start) for start in starts(n)])
    if jax.process_count() > 1:
        flags = multihost_utils.broadcast_one_to_all(flags)
    return [start for start, flag in zip(starts(n), flags, strict=True) if flag]


def check_identity(folder: PurePath, identity: dict) -> None:
    """Write what the rows of a folder depend on or, if it is there, compare: ValueError, saying what differs."""
    identity, path = json.loads(json.dumps(identity)), folder / MANIFEST
    if not path.is_file():
        io.write_json(path, identity)
    elif differing := digests.changes(io.read_json(path, f"delete {folder}"), identity):
        raise ValueError(f"{folder} is of something else ({'; '.join(differing)}): undo that, or delete the folder")


def rows_in(file: PurePath) -> int:
    """The rows of a file; 0 if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, safetensors.SafetensorError, ValueError):
        return min(len(x) for x in read(file).values())
    return 0


def read(file: PurePath) -> dict[str, np.ndarray]:
    """The arrays of a file."""
    return safetensors.numpy.load(file.read_bytes())


def gathered(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of all hosts, in order, float32, on every host."""
    parts = {name: np.asarray(x, np.float32) for name, x in parts.items()}
    if jax.process_count() == 1:
        return parts
    return {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in parts.items()}


# ---- reading


def rows(folder: PurePath, name: str, n: int, share: slice = slice(None)) -> Iterator[np.ndarray]:
    """An array's first n rows, file by file; of every k-th file with share = slice(i, None, k)."""
    for start in starts(n)[share]:
        yield read(file_of(folder, start))[name][: n - start]


def array(folder: PurePath, name: str, n: int) -> np.ndarray:
    """An array's first n rows."""
    return np.concatenate([*rows(folder, name, n)])


def gaussian(folder: PurePath, name: str, n: int) -> frechet.Gaussian:
    """Mean and covariance of features, each host reading a share of the files; equal on all hosts."""
    share = slice(jax.process_index(), None, jax.process_count())
    total = None
    for x in rows(folder, name, n, share):
        part = frechet.moments(x)
        total = part if total is None else frechet.merged(total, part)
    if total is None:  # more hosts than files
        total = frechet.moments(next(rows(folder, name, n))[:0])
    return frechet.gaussian(frechet.over_hosts(total))

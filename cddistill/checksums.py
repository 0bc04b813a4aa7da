"""Checksums of what lies on disk: CRC-32 of rows and files; sums of arrays that are spread over devices and hosts."""

import concurrent.futures
import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

DIGESTS = "digests.json"  # {path relative to its folder: CRC-32}
SHIPPED = (".safetensors", ".json", ".txt", ".webp", ".csv")  # files of the package whose damage would go unnoticed
MIXERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of SplitMix64
GOLDEN = 0x9E3779B97F4A7C15

Block = tuple[tuple[int, ...], np.ndarray]  # where a part of an array starts, by axis; its values


def crc32(x: np.ndarray) -> str:
    """CRC-32 of an array's bytes in C order, as 8 hexadecimal digits."""
    return f"{zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1)):08x}"


def crc32_file(path: Path) -> str:
    """CRC-32 of a file's bytes, as 8 hexadecimal digits."""
    total = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            total = zlib.crc32(piece, total)
    return f"{total:08x}"


def crc32_rows(x: np.ndarray) -> np.ndarray:
    """CRC-32 of each row's bytes, uint32 [len(x)]."""
    return np.array([zlib.crc32(np.ascontiguousarray(row).view(np.uint8).reshape(-1)) for row in x], np.uint32)


# ---- arrays


def blocks(x) -> list[Block]:
    """The parts of an array that this host counts: each element of a sharded one is counted on one host only."""
    if isinstance(x, jax.Array):
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        return [(tuple(part.start or 0 for part in shard.index), np.asarray(shard.data)) for shard in shards]
    return [((0,) * np.ndim(x), np.asarray(x))] if jax.process_index() == 0 else []


def block_sum(start: tuple[int, ...], x: np.ndarray) -> int:
    """Sum modulo 2^64 of bits * weight over the elements of a block, the same however an array is divided.

    The weight of an element is a product of odd numbers, one for its index along each axis (in the whole array): a
    single element that changes always changes the sum, and others with a probability of at least 1 - 2^-32.
    """
    if x.dtype.itemsize > 4:  # as halves: the highest of 64 bits would have the same weight in all elements
        x, start = np.asarray(x, order="C")[..., None].view(np.uint32), (*start, 0)
    total = x.view(f"u{x.dtype.itemsize}")
    for first, n in zip(start[::-1], x.shape[::-1], strict=True):
        axis = total.ndim - 1
        total = np.einsum("...j,j->...", total, weights(axis, first, n), dtype=np.uint64, casting="unsafe")
    return int(total)


@functools.lru_cache(1024)
def weights(axis: int, first: int, n: int) -> np.ndarray:
    """An odd number for each of the indices first ... first + n - 1 along an axis, uint64 [n]."""
    return mixed(np.arange(first, first + n, dtype=np.uint64) + np.uint64((axis + 1) << 48)) | np.uint64(1)


def mixed(x: np.ndarray) -> np.ndarray:
    """Pseudo-random numbers that depend on each number alone, uint64; SplitMix64."""
    x = x * np.uint64(GOLDEN)
    for shift, mixer in zip((30, 27), MIXERS, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(mixer)
    return x ^ (x >> np.uint64(31))


def host_sums(arrays: Mapping[str, list[Block]]) -> dict[str, int]:
    """The sum of this host's `blocks` of each array."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = pool.map(lambda parts: total(block_sum(*block) for block in parts), arrays.values())
        return dict(zip(arrays, done, strict=True))


def total(sums: Iterable[int]) -> int:
    """Sums of the parts of an array, added modulo 2^64."""
    return sum(sums) % 2**64


# ---- files that come with the package


@functools.cache
def check_shipped(folder: Path, start: str = "") -> None:
    """Compare the files of a folder whose names start with `start` with its digests.json, if it has one.

    Raises ValueError naming the first that is damaged or missing.
    """
    index = folder / DIGESTS
    if not index.is_file():
        return
    try:
        digests = dict(json.loads(index.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{index} is part of this package and damaged ({error}): reinstall cddistill") from error
    for name, expected in digests.items():
        file = folder / name
        if name.startswith(start) and not (file.is_file() and crc32_file(file) == expected):
            what = "damaged (its checksum is wrong)" if file.is_file() else "missing"
            raise ValueError(f"{file} is part of this package and {what}: reinstall cddistill")


def write_shipped(folder: Path) -> None:
    """Write the digests.json of a folder, for `check_shipped`: to be called by hand when its files change."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in SHIPPED and p.name != DIGESTS)
    found = {p.relative_to(folder).as_posix(): crc32_file(p) for p in files}
    (folder / DIGESTS).write_text(json.dumps(found, indent=2) + "\n", "utf-8")

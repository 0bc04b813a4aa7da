"""What data was read from, in short: texts that change when files or values do, for the manifests of what is made."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from cddistill import io


def of_files(root: Path, names: Iterable[str], times: bool = True) -> str:
    """Files by name, size and, with `times`, time of change, in this order: "12 files (0f1e2d3c4b5a6978)".

    Contents are not read: a data set may be as large as a disk.
    """
    digest, n = hashlib.sha256(), 0
    for n, name in enumerate(names, 1):  # noqa: B007  (counted, in one pass)
        status = (root / name).stat()
        digest.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns if times else ''}\n"))
    return f"{n} file{'s' * (n != 1)} ({digest.hexdigest()[:16]})"


def of_path(path: str) -> str:
    """16 hexadecimal digits for a file, or a folder with all below it but what is hidden; other texts are themselves.

    From the names and sizes of the files, and the first 4 kB of the first 1,000 of them: data sets are large.
    """
    if not path or not (io.is_remote(path) or Path(path).exists()):
        return path
    hidden = lambda name: name != "." and any(part.startswith(".") for part in name.split("/"))
    files = {name: size for name, size in io.sizes(path).items() if not hidden(name)}
    starts = iter(io.heads(path, [*files][:1000], 4096))
    digest = hashlib.sha256()
    for name, size in files.items():
        digest.update(os.fsencode(f"{name} {size}\n"))
        digest.update(next(starts, b""))
    return digest.hexdigest()[:16]


def of_values(values: Iterable) -> str:
    """Texts, numbers, or dicts and lists of them, by content and in this order: "12 values (0f1e2d3c4b5a6978)"."""
    digest, n = hashlib.sha256(), 0
    for n, value in enumerate(values, 1):  # noqa: B007
        digest.update(json.dumps(value, sort_keys=True, default=str).encode("ascii") + b"\n")
    return f"{n} value{'s' * (n != 1)} ({digest.hexdigest()[:16]})"


def rows_file(path: Path) -> Path:
    """Where the CRC-32 of each row of an array lies, uint32 [n]: x0.crc32.npy for x0.npy."""
    return path.with_suffix(".crc32.npy")


def changes(old: dict, new: dict) -> list[str]:
    """The entries that differ, in words: "pictures: 12 files (0f...) there, 13 files (1e...) now"."""
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)} there, {new.get(name)} now" for name in differing]

"""Write shards, in the format of data/shards.py: shard k on host k modulo the number of hosts, when it is whole."""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import safetensors.numpy

from cddistill import data, io
from cddistill.checksums import crc32
from cddistill.data import digests, shards


def changed(there: dict, manifest: dict, apart: Iterable[str]) -> list[str]:
    """How a manifest differs from that of a new command, apart from these keys, such as "teacher" or "data.path"."""

    def values(m):
        compared = io.flatten({name: x for name, x in m.items() if name not in apart})
        return {name: x for name, x in compared.items() if name not in apart}

    return digests.changes(values(with_new_options(there, manifest)), values(manifest))


def with_new_options(there: dict, manifest: dict) -> dict:
    """A manifest as a new one of the same command is written: options of the data that are newer had their default."""
    if not isinstance(there.get("data"), dict):
        return there
    known = {name: x for name, x in data.defaults().items() if name in manifest["data"]}
    return there | {"data": json.loads(json.dumps(known)) | there["data"]}


def is_mine(k: int) -> bool:
    """Whether this host writes shard k."""
    return k % jax.process_count() == jax.process_index()


def missing(folder: pathlib.Path, kind: shards.Kind, manifest: dict, numbers: Iterable[int]) -> list[int]:
    """Those of some shards that do not exist with the right length and rows. Their bytes are compared when read."""

    def is_complete(k: int) -> bool:
        try:
            return bool(shards.read_shard(folder, kind, manifest, k))
        except ValueError:
            return False

    return [k for k in numbers if not is_complete(k)]


def prepare(folder: pathlib.Path, manifest: dict, null: dict) -> None:
    """Write the manifest and the null text, by name, unless they are there; delete this host's incomplete files."""
    if not (folder / shards.MANIFEST).is_file():
        io.write_json(folder / shards.MANIFEST, manifest)
    sizes = "added_cond_kwargs.time_ids"  # each row uses its own sizes with the null text
    if not (folder / shards.NULL).is_file():
        save(folder / shards.NULL, {name: np.asarray(x)[None] for name, x in null.items() if name != sizes}, {})
    for draft in folder.glob(".*.safetensors.*.tmp"):
        number = re.match(r"\.(\d+)\.", draft.name)
        if number and is_mine(int(number[1])):
            draft.unlink()


def save(file: pathlib.Path, arrays: dict, header: dict) -> None:
    """Write arrays [n, ...] as a safetensors file, atomically, with their checksums. Its bytes are reproducible."""
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    header = header | {"crc32": {name: crc32(x) for name, x in arrays.items()}, "row_crc32": shards.row_sums(arrays)}
    io.write_atomic(file, safetensors.numpy.save(arrays, {shards.HEADER: json.dumps(header, sort_keys=True)}))


def stored(name: str, x: np.ndarray, dtype, labels: Sequence[str]) -> np.ndarray:
    """Rows x of an array as they are stored: floats in dtype, but sizes in pixels (time_ids) in float32.

    Raises ValueError with the label of the first row that is not finite then.
    """
    if np.issubdtype(x.dtype, np.integer):
        return x
    with np.errstate(over="ignore"):
        kept = np.asarray(x, np.float32 if name.endswith("time_ids") else dtype)
    bad = np.flatnonzero(~np.isfinite(kept.reshape(len(kept), -1)).all(1))
    if len(bad):
        where = f"{name} of {labels[bad[0]]}"
        if not np.isfinite(x[bad[0]]).all():
            raise ValueError(f"{where} is not finite (NaN or infinity): check the weights, or set config.dtype=float32")
        raise ValueError(
            f"{where} has numbers up to {np.abs(x[bad[0]]).max():.3g}, too large for {kept.dtype}: set "
            "--config.encode_dtype=float32"
        )
    return kept

"""Noise and what a teacher's ODE makes of it, in shards on disk: the format of `data.pairs`, and how it is read.

A folder holds manifest.json, null.safetensors (the null text) and 00000000.safetensors, 00000001.safetensors ..., each
with x0 and the texts of a block of rows. Noise is not stored: it is a function of the seed and the row's number.
"""

import concurrent.futures
import json
import math
import zlib
from pathlib import Path

import flax.traverse_util
import numpy as np
import safetensors

from cddistill.models import files

MANIFEST, NULL, FORMAT = "manifest.json", "null.safetensors", 1
AGAIN = "delete it, and the same --mode=pairs makes it again"


def noise(seed: int, row: int, shape) -> np.ndarray:
    """The unit noise of a row, float32, whatever shard or batch it is in.

    Philox counts on from where it starts, so that rows need a high word of its counter to have noise of their own.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=row << 128)).standard_normal(shape, np.float32)


def checksum(x: np.ndarray) -> str:
    """CRC-32 of an array's bytes, in hexadecimal digits."""
    return f"{zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1)):08x}"


def shard_file(folder, k: int) -> Path:
    """Where shard k lies."""
    return Path(folder) / f"{k:08}.safetensors"


def num_shards(manifest: dict) -> int:
    """How many shards all rows take."""
    return -(-manifest["rows"] // manifest["shard"])


def shard_rows(manifest: dict, k: int) -> range:
    """The rows of shard k."""
    size = manifest["shard"]
    return range(k * size, min((k + 1) * size, manifest["rows"]))


def read_manifest(folder) -> dict:
    """What manifest.json says; ValueError if it is missing, broken or of another version of the format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"there is no {MANIFEST} in {folder}: data.pairs is a folder made by --mode=pairs")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        made = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {AGAIN}") from error
    if made != FORMAT:
        raise ValueError(f"{folder} holds pairs of format {made}, this version reads format {FORMAT}: make them anew")
    return manifest


def identity(manifest: dict) -> str:
    """A checksum of what the rows depend on."""
    return f"{zlib.crc32(json.dumps(manifest | {'made_by': ''}, sort_keys=True).encode()):08x}"


def describe(manifest: dict, k: int) -> dict:
    """What the header of shard k says beside shapes; the noise of the first row stands for that of all."""
    rows = shard_rows(manifest, k)
    first = checksum(noise(manifest["seed"], rows.start, manifest["x0"]))
    return {"manifest": identity(manifest), "first": rows.start, "rows": len(rows), "noise": first}


def read_header(file: Path) -> tuple[dict[str, files.Tensor], dict]:
    """(tensors still on disk, what else the header says) of a file that is as long as it should be."""
    try:
        tensors = files.read_safetensors(file)
        with safetensors.safe_open(file, "numpy") as opened:
            return tensors, json.loads(opened.metadata()["pairs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is truncated or not a file of pairs: {AGAIN}") from error


def read_shard(folder, manifest: dict, k: int) -> tuple[dict[str, files.Tensor], dict]:
    """`read_header` of shard k; ValueError if that is damaged or not what the manifest says."""
    file, rows = shard_file(folder, k), shard_rows(manifest, k)
    tensors, said = read_header(file)
    if (said.get("manifest"), said.get("first"), said.get("rows")) != (identity(manifest), rows.start, len(rows)):
        held = f"rows {rows.start} to {rows.stop - 1}"
        raise ValueError(f"{file} does not hold {held} of the pairs that {MANIFEST} describes: {AGAIN}")
    return tensors, said


def check_bytes(file: Path, tensors, said) -> None:
    """ValueError if a tensor is not what was written."""
    for name, x in tensors.items():
        stored = np.memmap(file, np.uint8, "r", x.start, (math.prod(x.shape) * x.dtype.itemsize,))
        if checksum(stored) != said["crc32"].get(name):
            raise ValueError(f"{file} is damaged (the checksum of its {name} is wrong): {AGAIN}")


def check_noise(file: Path, manifest: dict, k: int, said) -> None:
    """ValueError if this numpy does not draw the noise that shard k was made of."""
    if describe(manifest, k)["noise"] != said["noise"]:
        raise ValueError(
            f"numpy {np.__version__} does not draw the noise that {file} was made of ({manifest['made_by']}): "
            "install the version that does, or make the pairs anew"
        )


class OdePairs:
    """The rows of a folder that --mode=pairs has written. None are in memory, and threads may read them at once.

    Opening compares every checksum. Raises ValueError, naming the file and the remedy, for what is missing, damaged or
    of noise that cannot be reproduced; with skip_bad such shards are left out with a remark.
    """

    def __init__(self, folder, skip_bad: bool = False):
        self.folder, self.manifest, self.skip_bad = Path(folder), read_manifest(folder), skip_bad
        self.check_presence()
        null, said = read_header(self.folder / NULL)
        check_bytes(self.folder / NULL, null, said)
        self.null = {name: read_row(x, 0) for name, x in null.items()}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            shards = pool.map(self.check, range(num_shards(self.manifest)))
            self.shards = {k: tensors for k, tensors in enumerate(shards) if tensors}
        if not self.shards:
            raise ValueError(f"{folder} has no shard that can be used: make the pairs anew with --mode=pairs")
        usable = [shard_rows(self.manifest, k) for k in self.shards]
        self.rows = np.concatenate([np.arange(rows.start, rows.stop) for rows in usable])

    def check_presence(self):
        """ValueError that says how many files are missing."""
        expected = [self.folder / NULL, *(shard_file(self.folder, k) for k in range(num_shards(self.manifest)))]
        missing = [file.name for file in expected if not file.is_file()]
        if missing and not (self.skip_bad and missing[0] != NULL):
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
            raise ValueError(f"{self.folder} lacks {some} of {len(expected)} files: the same --mode=pairs goes on")

    def check(self, k: int) -> dict[str, files.Tensor] | None:
        """The tensors of shard k, once all of it is known to be right; None if it is left out."""
        file = shard_file(self.folder, k)
        try:
            tensors, said = read_shard(self.folder, self.manifest, k)
            check_bytes(file, tensors, said)
            check_noise(file, self.manifest, k, said)
        except ValueError as error:
            if not self.skip_bad:
                raise
            print(f"left out: {error}", flush=True)
            return None
        return tensors

    def __len__(self):
        return len(self.rows)

    def item(self, i, rng=None):
        """Usable row i: noise and x0 float32 [h,w,c], its text and the null text as a teacher takes them."""
        row = int(self.rows[i])
        k, at = divmod(row, self.manifest["shard"])
        text = {name: read_row(x, at) for name, x in self.shards[k].items()}
        x0, drawn = text.pop("x0"), noise(self.manifest["seed"], row, self.manifest["x0"])
        return {"noise": drawn, "x0": x0, "text": nested(text), "null": nested(text | self.null)}


def read_row(x: files.Tensor, i: int) -> np.ndarray:
    """Row i, by one read of its bytes alone, floats as float32. No file stays open: there may be 10,000 shards."""
    count = math.prod(x.shape[1:])
    row = np.fromfile(x.file, x.dtype, count, offset=x.start + i * count * x.dtype.itemsize).reshape(x.shape[1:])
    return row if np.issubdtype(x.dtype, np.integer) else row.astype(np.float32)


def named(text: dict) -> dict:
    """A teacher's text as arrays by their names in a shard: encoder_hidden_states, added_cond_kwargs.time_ids ..."""
    return flax.traverse_util.flatten_dict(text, sep=".")


def nested(arrays: dict) -> dict:
    """The inverse of `named`."""
    return flax.traverse_util.unflatten_dict(arrays, sep=".")

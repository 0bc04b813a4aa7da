"""Pairs of noise and the teacher's ODE sample, in shards on disk: the format of `data.pairs` and its reader.

A folder holds manifest.json, null.safetensors (the null text) and 00000000.safetensors, 00000001.safetensors ..., each
with x0 and text of a block of rows. Noise is not stored: it is a function of the seed and the row number.
"""

import concurrent.futures
import itertools
import json
import math
import zlib
from pathlib import Path

import flax.traverse_util
import numpy as np
import safetensors

from cddistill import io
from cddistill.checksums import crc32
from cddistill.models import files

MANIFEST, NULL, FORMAT = "manifest.json", "null.safetensors", 1
REMEDY = "delete it and make it again with the same --mode=pairs"
KINDS = {"rows": int, "shard": int, "seed": int, "x0": list, "teacher": str, "weights": str, "lora": str,
         "lora_scale": int | float, "made_by": str, "fingerprints": dict | None}  # of the manifest  # fmt: skip


def noise(seed: int, row: int, shape) -> np.ndarray:
    """The unit Gaussian noise of a row, float32. It does not depend on shards or batches.

    Philox increments its counter from the low word, so rows differ in a high word: their noise never overlaps.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=row << 128)).standard_normal(shape, np.float32)


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


def read_manifest(folder) -> dict:
    """The content of manifest.json. Raises ValueError if it is missing, damaged or of another format version."""
    path = io.path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"there is no {MANIFEST} in {folder}: data.pairs must be a folder written by --mode=pairs")
    if (version := io.read_json(path, REMEDY, format=int)["format"]) != FORMAT:
        raise ValueError(f"{folder} holds pairs of format {version}, not {FORMAT}: make them again with --mode=pairs")
    manifest = io.read_json(path, REMEDY, **KINDS)
    sizes = {name: manifest[name] for name in ("rows", "shard", "x0")}
    numbers = [sizes["rows"], sizes["shard"], *sizes["x0"]]
    if len(numbers) != 5 or not all(type(x) is int and 1 <= x < 2**31 for x in numbers) or manifest["seed"] < 0:
        raise ValueError(f"{path} has {sizes} and seed = {manifest['seed']}, which are no sizes and no seed: {REMEDY}")
    return manifest


def identity(manifest: dict) -> str:
    """A checksum of everything that the rows depend on."""
    return f"{zlib.crc32(json.dumps(manifest | {'made_by': ''}, sort_keys=True).encode()):08x}"


def describe(manifest: dict, k: int) -> dict:
    """Metadata in the header of shard k. The checksum of the first row's noise stands for all rows."""
    rows = shard_rows(manifest, k)
    first = crc32(noise(manifest["seed"], rows.start, manifest["x0"]))
    return {"manifest": identity(manifest), "first": rows.start, "rows": len(rows), "noise": first}


def read_header(file: Path) -> tuple[dict[str, files.Tensor], dict]:
    """(tensors, not yet read; metadata) of a shard. Raises ValueError if the file is truncated or not a shard."""
    try:
        tensors = files.read_safetensors(file)
        with safetensors.safe_open(file, "numpy") as opened:
            header = json.loads(opened.metadata()["pairs"])
        if header["crc32"].keys() != tensors.keys():
            raise ValueError("its header names other tensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or not a file of pairs: {REMEDY}") from error
    return tensors, header


def read_shard(folder, manifest: dict, k: int) -> tuple[dict[str, files.Tensor], dict]:
    """`read_header` of shard k. Raises ValueError if the file is truncated or does not match the manifest."""
    file, rows = shard_file(folder, k), shard_rows(manifest, k)
    tensors, header = read_header(file)
    if [header.get(name) for name in ("manifest", "first", "rows")] != [identity(manifest), rows.start, len(rows)]:
        expected = f"rows {rows.start} to {rows.stop - 1}"
        raise ValueError(f"{file} does not hold {expected} of the pairs that {MANIFEST} describes: {REMEDY}")
    shapes = {name: x.shape for name, x in tensors.items()}
    if shapes.get("x0") != (len(rows), *manifest["x0"]) or any(s[:1] != (len(rows),) for s in shapes.values()):
        raise ValueError(f"{file} has tensors of other shapes than {MANIFEST} says ({shapes}): {REMEDY}")
    return tensors, header


def check_bytes(file: Path, tensors, header) -> None:
    """Raise ValueError if the checksum of a tensor is wrong."""
    for name, x in tensors.items():
        stored = np.memmap(file, np.uint8, "r", x.start, (math.prod(x.shape) * x.dtype.itemsize,))
        if crc32(stored) != header["crc32"][name]:
            raise ValueError(f"{file} is damaged (the checksum of its {name} is wrong): {REMEDY}")


def check_noise(file: Path, manifest: dict, k: int, header) -> None:
    """Raise ValueError if this numpy version does not generate the noise of shard k."""
    if describe(manifest, k)["noise"] != header.get("noise"):
        raise ValueError(
            f"numpy {np.__version__} does not generate the noise that {file} was made from ({manifest['made_by']}): "
            "install that numpy version, or make the pairs again"
        )


class OdePairs:
    """The rows of a folder written by --mode=pairs. They are read from disk on access; several threads may read.

    Opening verifies every checksum. Raises ValueError, naming the file and the remedy, for files that are missing or
    damaged or whose noise cannot be reproduced. With skip_bad such shards are skipped with a message.
    """

    def __init__(self, folder, skip_bad: bool = False):
        folder = io.local(folder)
        self.folder, self.manifest, self.skip_bad = folder, read_manifest(folder), skip_bad
        self.check_presence()
        null, header = read_header(self.folder / NULL)
        check_bytes(self.folder / NULL, null, header)
        self.null = {name: read_row(x, 0) for name, x in null.items()}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            shards = pool.map(self.check, range(num_shards(self.manifest)))
            self.shards = {k: tensors for k, tensors in enumerate(shards) if tensors}
        if not self.shards:
            raise ValueError(f"{folder} has no usable shard: make the pairs again with --mode=pairs")
        usable = [shard_rows(self.manifest, k) for k in self.shards]
        self.rows = np.concatenate([np.arange(rows.start, rows.stop) for rows in usable])

    def check_presence(self):
        """Raise ValueError, with the names of some missing files, if any is missing."""
        number, there = num_shards(self.manifest), {file.name for file in self.folder.iterdir() if file.is_file()}
        expected = itertools.chain([NULL], (shard_file("", k).name for k in range(number)))  # perhaps billions
        missing = [*itertools.islice((name for name in expected if name not in there), 3)]
        if missing and not (self.skip_bad and missing[0] != NULL):
            some = ", ".join(missing[:2]) + " and others" * (len(missing) > 2)
            raise ValueError(f"{self.folder} lacks {some} of {number + 1} files: resume with the same --mode=pairs")

    def check(self, k: int) -> dict[str, files.Tensor] | None:
        """The tensors of shard k after all checks, or None if it is skipped."""
        file = shard_file(self.folder, k)
        try:
            tensors, header = read_shard(self.folder, self.manifest, k)
            check_bytes(file, tensors, header)
            check_noise(file, self.manifest, k, header)
        except ValueError as error:
            if not self.skip_bad:
                raise
            print(f"skipped: {error}", flush=True)
            return None
        return tensors

    def __len__(self):
        return len(self.rows)

    def item(self, i, rng=None):
        """Usable row i: noise and x0 float32 [h,w,c], text and null text as a UNet takes them, perhaps a condition."""
        row = int(self.rows[i])
        k, at = divmod(row, self.manifest["shard"])
        text = {name: read_row(x, at) for name, x in self.shards[k].items()}
        x0, eps = text.pop("x0"), noise(self.manifest["seed"], row, self.manifest["x0"])
        given = {"cond": text.pop("cond")} if "cond" in text else {}
        return given | {"noise": eps, "x0": x0, "text": unflatten_text(text), "null": unflatten_text(text | self.null)}


def read_row(x: files.Tensor, i: int) -> np.ndarray:
    """Row i, floats as float32. Reads only the bytes of this row and closes the file: there may be 10,000 shards."""
    count = math.prod(x.shape[1:])
    row = np.fromfile(x.file, x.dtype, count, offset=x.start + i * count * x.dtype.itemsize).reshape(x.shape[1:])
    return row if np.issubdtype(x.dtype, np.integer) else row.astype(np.float32)


def flatten_text(text: dict) -> dict:
    """A UNet's text inputs by their names in a shard: encoder_hidden_states, added_cond_kwargs.time_ids ..."""
    return flax.traverse_util.flatten_dict(text, sep=".")


def unflatten_text(arrays: dict) -> dict:
    """The inverse of `flatten_text`."""
    return flax.traverse_util.unflatten_dict(arrays, sep=".")

"""Lazy reading of weight files, by PyTorch's names: safetensors, PyTorch state dicts, Flax msgpack.

Opening a file reads headers only; the bytes of a tensor are read when it is converted to an array. Loading a network
therefore needs hardly more memory than its weights. No code in a file is executed: the unpickler knows tensors and
nothing else.
"""

import dataclasses
import json
import math
import mmap
import re
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import safetensors

from cddistill import io
from cddistill.models import torch_pickle
from cddistill.models.state_dict import REMEDY, find
from cddistill.models.torch_pickle import DTYPES, View, extent
from cddistill.typed import brief

SAFETENSORS = {name: np.dtype(x) for x, name, _ in DTYPES}
FLAX = {np.dtype(x).name: np.dtype(x) for x, _, _ in DTYPES}
# File names in a folder, preferred first: safetensors of diffusers and transformers, former Flax classes, PyTorch.
NAMES = (
    ("diffusion_pytorch_model", ".safetensors"),
    ("model", ".safetensors"),
    ("diffusion_flax_model", ".msgpack"),
    ("flax_model", ".msgpack"),
    ("diffusion_pytorch_model", ".bin"),
    ("pytorch_model", ".bin"),
)
PATTERNS = [  # patterns for downloads, preferred first: a file or its shards, then its variants such as fp16
    patterns
    for stem, suffix in NAMES
    for patterns in (
        (f"{stem}{suffix}", f"{stem}{suffix}.index.json", f"{stem}-*{suffix}"),
        (f"{stem}.*{suffix}", f"{stem}{suffix}.index.*.json"),
    )
]
SUFFIXES = (".safetensors", ".msgpack", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
LENGTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDE: 2, 0xDF: 4}  # msgpack: {tag: bytes of length}
MOST_HEADER = 2**24  # bytes, of a safetensors file; Stable Diffusion XL's has 300,000
MOST_ENTRIES, MOST_DEPTH, MOST_NAME = 20_000, 50, 200  # of a msgpack file: objects, levels, bytes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk with known shape and strides; np.asarray(tensor, dtype) reads its values."""

    file: Path
    start: int  # bytes
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self):
        return self.transpose(*range(self.ndim)[::-1])

    def transpose(self, *axes):
        shape, strides = (tuple(x[i] for i in axes) for x in (self.shape, self.strides))
        return dataclasses.replace(self, shape=shape, strides=strides)

    def squeeze(self, axes):
        """Drop these axes, which must have length 1."""
        return self.transpose(*(i for i in range(self.ndim) if i not in axes))

    def rows(self, start: int, stop: int):
        """The part [start:stop]."""
        first = self.start + start * self.strides[0] * self.dtype.itemsize
        return dataclasses.replace(self, start=first, shape=(stop - start, *self.shape[1:]))

    def __array__(self, dtype=None, copy=None):
        """The values in C order, aligned so that JAX on a CPU uses the memory without a copy."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        n = extent(self.shape, self.strides)
        if self.file.stat().st_size < self.start + n * self.dtype.itemsize:
            raise ValueError(f"{self.file} is truncated: download it again")
        stored = np.memmap(self.file, self.dtype, "r", self.start, (n,)) if n else np.empty(0, self.dtype)
        out, steps = aligned(self.shape, dtype), [step * self.dtype.itemsize for step in self.strides]
        out[...] = np.lib.stride_tricks.as_strided(stored, self.shape, steps)
        return out


def contiguous_strides(shape) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def aligned(shape, dtype):
    """An uninitialised array whose address is a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


class Weights(NamedTuple):
    """Contents of a weight folder or file."""

    tensors: dict[str, Tensor]  # by PyTorch's name; from msgpack by path, a/b/c
    file: Path  # the weight file, or the index of its shards


def choose(names) -> str | None:
    """The preferred weight file or shard index among file names, or None; full precision before variants (fp16)."""
    names = sorted(names)
    for stem, suffix in NAMES:
        full = rf"{stem}\{suffix}"
        for pattern in (full, rf"{full}\.index\.json", rf"{full}\.index\.\w+\.json", rf"{stem}\.\w+\{suffix}"):
            if found := [name for name in names if re.fullmatch(pattern, name)]:
                return found[0]
    loose = [name for name in names if Path(name).suffix in SUFFIXES]
    return loose[0] if len(loose) == 1 else None


def read(path: Path) -> Weights:
    """The tensors, not yet read, of a weight file, of the shards in an index, or of a folder's preferred file.

    Supports float16, bfloat16, float32, float64, integers and booleans. Raises ValueError naming the file if it is
    missing or truncated, lacks tensors that the index lists, or holds anything but named tensors.
    """
    file = path
    if path.is_dir():
        name = choose(p.name for p in path.iterdir())
        if name is None:
            known = ", ".join(f"{stem}{suffix}" for stem, suffix in NAMES)
            raise ValueError(f"{path} holds none of {known}, nor a single weight file of another name: download it too")
        file = path / name
    if not file.is_file():  # a pipe would be waited for
        raise ValueError(f"{file} is no file: name a weight file ({', '.join(SUFFIXES)}) or its folder")
    reader = {".json": read_shards, ".safetensors": read_safetensors, ".msgpack": read_msgpack}
    return Weights(reader.get(file.suffix, read_torch)(file), file)


def shards_of(index: Path) -> dict[str, str]:
    """{tensor: name of the file beside the index} of an index of shards; ValueError for anything else."""
    places = io.read_json(index, weight_map=dict)["weight_map"]
    if wrong := [name for name in places.values() if not io.is_plain_name(name)]:
        raise ValueError(f"{index} names the shard {brief(wrong[0])}, which is no file beside it: download it again")
    return places


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards in an index."""
    places = shards_of(index)
    files, shards = {name: index.parent / name for name in sorted({*places.values()})}, {}
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing, but the index lists it: download it again")
        shards[name] = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise ValueError(f"{files[name]} lacks {tensor}, but {index.name} says it is there: download both again")
    return {tensor: x for shard in shards.values() for tensor, x in shard.items()}


def safetensors_header(file: Path) -> tuple[dict, int]:
    """(header of a safetensors file, first byte of its data); ValueError for a file that is damaged.

    Reads no data. The header's "__metadata__" holds texts by name.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > MOST_HEADER:
                raise ValueError(f"a header of {size} bytes")
            with safetensors.safe_open(file, "numpy"):  # checks the header and the file's length
                pass
            return json.loads(stream.read(size)), 8 + size
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        sentence = f"{file} is truncated or not a safetensors file ({one_line(error)}); download it again"
        raise ValueError(sentence) from error


def one_line(error: Exception) -> str:
    """What an error says, which may quote a file, in at most 120 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    header, first = safetensors_header(file)
    header.pop("__metadata__", None)
    if unknown := {x["dtype"] for x in header.values()} - {*SAFETENSORS}:
        raise ValueError(f"{file} holds {', '.join(sorted(unknown))}, only {', '.join(SAFETENSORS)} can be read")
    tensors = {}
    for name, entry in header.items():
        start, shape = first + entry["data_offsets"][0], tuple(entry["shape"])
        tensors[name] = Tensor(file, start, SAFETENSORS[entry["dtype"]], shape, contiguous_strides(shape))
    return tensors


def read_torch(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch state dict: a zip archive or, before PyTorch 1.6, pickles followed by raw storages."""
    try:
        state, starts = torch_pickle.load(file)
    except torch_pickle.Refused:
        raise
    except Exception as error:  # a broken pickle can raise any error
        raise ValueError(
            f"{file} is truncated or not a state dict by torch.save ({type(error).__name__}: {one_line(error)}): "
            f"download it again, or {REMEDY}"
        ) from error
    views, size = find(state, View, file), file.stat().st_size
    if repeated := [name for name, x in views.items() if math.prod(x.shape) > size]:
        raise ValueError(f"{file} repeats few numbers as the large tensor {brief(repeated[0])}: {REMEDY}")
    return {
        name: Tensor(file, starts[x.storage] + x.start * x.dtype.itemsize, x.dtype, x.shape, x.strides)
        for name, x in views.items()
    }


def read_msgpack(file: Path) -> dict[str, Tensor]:
    """The tensors of a Flax msgpack file, by path "a/b/c"."""
    tensors = {}
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk(data, 0, (), file, tensors, iter(range(MOST_ENTRIES)))
    except (ValueError, IndexError, KeyError, TypeError, msgpack.UnpackException) as error:
        sentence = f"{file} is truncated or not a Flax msgpack file ({one_line(error)}); download it again"
        raise ValueError(sentence) from error
    return tensors


def walk(data, at: int, path: tuple[str, ...], file: Path, tensors: dict, entries) -> int:
    """Add the arrays of the msgpack object at byte `at` to tensors; returns the byte after it.

    entries is an iterator of as many items as there may be objects in all.
    """
    tag, count, at = read_tag(data, at)
    if next(entries, None) is None or len(path) > MOST_DEPTH:
        raise ValueError(f"more than {MOST_ENTRIES} objects, or {MOST_DEPTH} levels of them")
    if is_map(tag):
        for _ in range(count):
            _, size, at = read_tag(data, at)
            if size > MOST_NAME:
                raise ValueError(f"a name of {size} bytes")
            at = walk(data, at + size, (*path, data[at : at + size].decode()), file, tensors, entries)
        return at
    end = at + 1 + count  # an extension: its type (1 is an array), then shape, dtype and data as msgpack
    content = msgpack.Unpacker(max_buffer_size=256)
    content.feed(data[at + 1 : at + 1 + 256])
    if data[at] != 1 or content.read_array_header() != 3 or end > len(data):
        raise ValueError(f"{'/'.join(path)} is no array")
    shape, dtype = tuple(content.unpack()), FLAX[content.unpack()]
    if len(shape) > torch_pickle.MOST_AXES or not all(map(torch_pickle.is_count, shape)):
        raise ValueError(f"{'/'.join(path)} has a shape that is none")
    start = end - math.prod(shape) * dtype.itemsize
    if start <= at + 1 + content.tell():
        raise ValueError(f"{'/'.join(path)} is shorter than its shape")
    tensors["/".join(path)] = Tensor(file, start, dtype, shape, contiguous_strides(shape))
    return end


def is_map(tag: int) -> bool:
    """Whether a msgpack tag is that of a map."""
    return 0x80 <= tag <= 0x8F or tag in (0xDE, 0xDF)


def read_tag(data, at: int) -> tuple[int, int, int]:
    """(tag, length, first byte of the content) of a msgpack map, string or extension."""
    tag, at = data[at], at + 1
    if 0x80 <= tag <= 0x8F or 0xA0 <= tag <= 0xBF:  # short maps and strings
        return tag, tag & (0x0F if tag <= 0x8F else 0x1F), at
    if 0xD4 <= tag <= 0xD8:  # extensions of 1, 2, 4, 8, 16 bytes
        return tag, 1 << tag - 0xD4, at
    if tag not in LENGTHS:
        raise ValueError(f"unexpected tag {tag:#x}")
    return tag, int.from_bytes(data[at : at + LENGTHS[tag]], "big"), at + LENGTHS[tag]

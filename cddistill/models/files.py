"""Lazy reading of weight files, by PyTorch's names: safetensors, PyTorch state dicts, Flax msgpack.

Opening a file reads headers only; the bytes of a tensor are read when it is converted to an array. Loading a network
therefore needs hardly more memory than its weights. No code in a file is executed: the unpickler knows tensors and
nothing else.
"""

import collections
import dataclasses
import json
import math
import mmap
import operator
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import msgpack
import numpy as np
import safetensors

from cddistill.models.state_dict import REMEDY, Ignored, find

DTYPES = (  # numpy's, safetensors', PyTorch's
    ("<f4", "F32", "FloatStorage"),
    ("<f2", "F16", "HalfStorage"),
    (ml_dtypes.bfloat16, "BF16", "BFloat16Storage"),
    ("<f8", "F64", "DoubleStorage"),
    ("<i8", "I64", "LongStorage"),
    ("<i4", "I32", "IntStorage"),
    ("<i2", "I16", "ShortStorage"),
    ("i1", "I8", "CharStorage"),
    ("u1", "U8", "ByteStorage"),
    ("?", "BOOL", "BoolStorage"),
)
SAFETENSORS = {name: np.dtype(x) for x, name, _ in DTYPES}
STORAGES = {f"torch.{name}": np.dtype(x) for x, _, name in DTYPES}
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
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle in a file of torch.save before PyTorch 1.6
LENGTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDE: 2, 0xDF: 4}  # msgpack: {tag: bytes of length}
IGNORED = {  # what trainers save beside a network: nothing is imported or kept for these names
    "argparse.Namespace", "pathlib.PosixPath", "torch.Size", "torch.device", "numpy.dtype", "_codecs.encode",
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"{x}.callbacks.model_checkpoint.ModelCheckpoint" for x in ("pytorch_lightning", "lightning.pytorch")),
}  # fmt: skip


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


def extent(shape, strides) -> int:
    """Number of storage elements that an array with these strides spans."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0


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
    reader = {".json": read_shards, ".safetensors": read_safetensors, ".msgpack": read_msgpack}
    return Weights(reader.get(file.suffix, read_torch)(file), file)


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards in an index."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = {name: index.parent / name for name in sorted({*places.values()})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error!r}): download it again") from error
    shards = {}
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing, but the index lists it: download it again")
        shards[name] = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise ValueError(f"{files[name]} lacks {tensor}, but {index.name} says it is there: download both again")
    return {tensor: x for shard in shards.values() for tensor, x in shard.items()}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        with safetensors.safe_open(file, "numpy"):  # checks the header and the file's length
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    if unknown := {x["dtype"] for x in header.values()} - {*SAFETENSORS}:
        raise ValueError(f"{file} holds {', '.join(sorted(unknown))}, only {', '.join(SAFETENSORS)} can be read")
    tensors = {}
    for name, entry in header.items():
        start, shape = 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
        tensors[name] = Tensor(file, start, SAFETENSORS[entry["dtype"]], shape, contiguous_strides(shape))
    return tensors


class View(NamedTuple):
    """A tensor as PyTorch pickles it: a strided view of a storage, in elements."""

    storage: str
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Refused(ValueError):
    """A weight file that is intact but not supported."""


class TensorsOnly(pickle.Unpickler):
    """Unpickles tensors as views of storages and refuses every other name, so that a weight file cannot run code.

    find_class returns bound methods, a C type and Ignored: unlike a function's, their attributes cannot be set by a
    pickle (its opcode for that calls __setstate__, which the class itself refuses).
    """

    def __init__(self, stream, file: Path):
        super().__init__(stream)
        self.file = file
        self.sizes = {}  # bytes per storage

    def find_class(self, module, name):
        known = {"torch._utils._rebuild_tensor_v2": self.tensor, "torch._utils._rebuild_parameter": self.parameter}
        known |= {"collections.OrderedDict": collections.OrderedDict} | dict.fromkeys(IGNORED, Ignored)
        path = f"{module}.{name}"
        if path in STORAGES:
            return path
        if path not in known:
            raise Refused(f"{self.file} asks for {path}, but weights need no code, so it was not loaded: {REMEDY}")
        return known[path]

    def persistent_load(self, saved):
        kind, storage, key, _, size, *_ = saved
        if kind != "storage" or storage not in STORAGES:
            raise pickle.UnpicklingError(f"unknown {kind}")
        self.sizes[key] = size * STORAGES[storage].itemsize
        return key, STORAGES[storage], size

    def tensor(self, storage, start, shape, strides, *_):
        key, dtype, size = storage
        start, shape, strides = operator.index(start), *(tuple(map(operator.index, x)) for x in (shape, strides))
        if min(0, start, *shape, *strides) < 0 or start + extent(shape, strides) > size:
            raise pickle.UnpicklingError(f"a tensor {shape} lies outside of its storage")
        return View(key, dtype, start, shape, strides)

    def parameter(self, view, *_):
        return view


def read_torch(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch state dict: a zip archive or, before PyTorch 1.6, pickles followed by raw storages."""
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
        stream.seek(0)
        try:
            state, starts = (read_zipped if zipped else read_pickled)(stream, file)
        except Refused:
            raise
        except Exception as error:  # a broken pickle can raise any error
            sentence = f"{file} is truncated or not a state dict by torch.save ({error!r}): download it again, or "
            raise ValueError(sentence + REMEDY) from error
    views = find(state, View, file)
    return {
        name: Tensor(file, starts[x.storage] + x.start * x.dtype.itemsize, x.dtype, x.shape, x.strides)
        for name, x in views.items()
    }


def read_zipped(stream, file: Path):
    """(pickled object, {storage: first byte}) of a zip archive of torch.save."""
    with zipfile.ZipFile(stream) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(f"{len(pickles)} data.pkl in the archive")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise Refused(f"{file} was written on a big-endian machine: save it again on another")
        with archive.open(pickles[0]) as pickled:
            reader = TensorsOnly(pickled, file)
            state = reader.load()
        starts = {}
        for key, size in reader.sizes.items():
            record = archive.getinfo(f"{folder}data/{key}")
            if record.compress_type != zipfile.ZIP_STORED or record.file_size < size:
                raise pickle.UnpicklingError(f"{record.filename} is compressed or too short")
            stream.seek(record.header_offset + 26)  # zip's local header: 30 bytes, file name, extra field
            starts[key] = record.header_offset + 30 + sum(np.frombuffer(stream.read(4), "<u2").tolist())
    return state, starts


def read_pickled(stream, file: Path):
    """The same for the older format: magic number, protocol, machine, state dict, storage keys, raw storages."""
    if TensorsOnly(stream, file).load() != TORCH_MAGIC:
        raise pickle.UnpicklingError("wrong first number")
    for _ in range(2):
        TensorsOnly(stream, file).load()
    reader, starts = TensorsOnly(stream, file), {}
    state, keys = reader.load(), TensorsOnly(stream, file).load()
    for key in keys:
        starts[key] = stream.tell() + 8  # after the number of elements
        stream.seek(starts[key] + reader.sizes[key])
    if {*keys} != {*reader.sizes} or stream.tell() > file.stat().st_size:
        raise pickle.UnpicklingError("storages are missing")
    return state, starts


def read_msgpack(file: Path) -> dict[str, Tensor]:
    """The tensors of a Flax msgpack file, by path "a/b/c"."""
    tensors = {}
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk(data, 0, (), file, tensors)
    except (ValueError, IndexError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"{file} is truncated or not a Flax msgpack file ({error}); download it again") from error
    return tensors


def walk(data, at: int, path: tuple[str, ...], file: Path, tensors: dict) -> int:
    """Add the arrays of the msgpack object at byte `at` to tensors; returns the byte after it."""
    tag, count, at = read_tag(data, at)
    if 0x80 <= tag <= 0x8F or tag in (0xDE, 0xDF):  # a map
        for _ in range(count):
            _, size, at = read_tag(data, at)
            at = walk(data, at + size, (*path, data[at : at + size].decode()), file, tensors)
        return at
    end = at + 1 + count  # an extension: its type (1 is an array), then shape, dtype and data as msgpack
    content = msgpack.Unpacker()
    content.feed(data[at + 1 : at + 1 + 256])
    if data[at] != 1 or content.read_array_header() != 3 or end > len(data):
        raise ValueError(f"{'/'.join(path)} is no array")
    shape, dtype = tuple(content.unpack()), FLAX[content.unpack()]
    start = end - math.prod(shape) * dtype.itemsize
    if start <= at + 1 + content.tell():
        raise ValueError(f"{'/'.join(path)} is shorter than its shape")
    tensors["/".join(path)] = Tensor(file, start, dtype, shape, contiguous_strides(shape))
    return end


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

"""What torch.save wrote, without running any of it: an interpreter for the pickles of state dicts.

It knows tensors, dicts, lists and plain values, and nothing else. It is our own because Python's has no bounds: a file
of a few bytes may make it hash nested tuples for years, allocate gigabytes for an index, or end the process.
"""

import collections
import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cddistill.models.state_dict import REMEDY, Ignored
from cddistill.typed import brief

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
STORAGES = {f"torch.{name}": np.dtype(x) for x, _, name in DTYPES}
MAGIC = 0x1950A86A20F9469CFC6C  # first pickle in a file of torch.save before PyTorch 1.6
IGNORED = {  # what trainers save beside a network: nothing is imported or kept for these names
    "argparse.Namespace", "pathlib.PosixPath", "torch.Size", "torch.device", "numpy.dtype", "_codecs.encode",
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"{x}.callbacks.model_checkpoint.ModelCheckpoint" for x in ("pytorch_lightning", "lightning.pytorch")),
}  # fmt: skip
# Stable Diffusion XL with its average and an optimizer's state has 7,000 tensors: 280,000 opcodes, 1 MB of pickles.
MOST_OPCODES, MOST_BYTES, MOST_DIRECTORY = 500_000, 2**25, 2**23
MOST_AXES, MOST_ELEMENTS = 16, 2**50  # of a tensor
MOST_ARGUMENTS, MOST_NAME = 32, 1000  # of a call; characters of a key
MOST_MARKS, MOST_PAIRS = 1000, 50_000


class Refused(ValueError):
    """A weight file that is intact but not supported."""


class Damaged(Exception):
    """A file that torch.save cannot have written."""


class Name(NamedTuple):
    """A class or function that a pickle names, and what is called in its place."""

    path: str
    make: Callable | None = None


class Storage(NamedTuple):
    """The memory of a tensor, in elements."""

    key: str
    dtype: np.dtype
    size: int


class View(NamedTuple):
    """A tensor as PyTorch pickles it: a strided view of a storage, in elements."""

    storage: str
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def extent(shape, strides) -> int:
    """Number of storage elements that an array with these strides spans."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0


class TensorsOnly:
    """The stack machine of pickles, for those opcodes that state dicts need; tensors become `View`s.

    `load` raises Refused, naming the file, for a name outside of the few that state dicts have, and Damaged or any
    error of Python's for what is no pickle. Keys are texts or short integers, since hashing others may take forever.
    """

    def __init__(self, file: Path):
        self.file = file
        self.sizes = {}  # bytes per storage
        self.opcodes = self.pairs = 0  # so far, over all pickles of the file
        known = {"torch._utils._rebuild_tensor_v2": tensor, "torch._utils._rebuild_parameter": lambda view, *_: view}
        known |= {"collections.OrderedDict": self.ordered} | dict.fromkeys(IGNORED, Ignored)
        self.names = {path: Name(path, make) for path, make in known.items()} | {path: Name(path) for path in STORAGES}

    def load(self, stream):
        """The object in the pickle at the stream's position, which ends behind it."""
        self.stack, self.below, self.memo = [], [], {}
        for count in range(self.opcodes, MOST_OPCODES):
            name, reader = OPCODES.get(stream.read(1), ("of no meaning", None))
            value = reader and reader(stream)
            if name in PUSHED:
                self.stack.append(value)
            elif name in PUT:
                self.memo[value] = self.stack[-1]
            elif name in GET:
                self.stack.append(self.memo[value])
            elif name in FIXED:
                self.stack.append(FIXED[name]())
            elif name in TUPLES:
                parts = self.stack[-TUPLES[name] :]
                if len(parts) < TUPLES[name]:
                    raise Damaged("an empty stack")
                self.stack[-len(parts) :] = [tuple(parts)]
            elif name == "STOP":
                self.opcodes = count
                return self.stack.pop()
            elif name in STEPS:
                STEPS[name](self, value)
            elif name not in SKIPPED:
                raise Damaged(f"an opcode {name}")
        raise Damaged(f"more than {MOST_OPCODES} opcodes")

    def last(self, n: int) -> list:
        """The last n objects on the stack."""
        if len(self.stack) < n:
            raise Damaged("an empty stack")
        return self.stack[-n:]

    def marked(self) -> list:
        """The objects since the last mark, taken off the stack."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def on_MARK(self, _):
        if len(self.below) == MOST_MARKS:
            raise Damaged(f"more than {MOST_MARKS} levels")
        self.below.append(self.stack)
        self.stack = []

    def on_MEMOIZE(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def on_POP(self, _):
        self.stack.pop() if self.stack else self.marked()

    def on_POP_MARK(self, _):
        self.marked()

    def on_DUP(self, _):
        self.stack.append(self.stack[-1])

    def on_TUPLE(self, _):
        items = self.marked()
        self.stack.append(tuple(items))

    def on_LIST(self, _):
        items = self.marked()
        self.stack.append(items)

    def on_DICT(self, _):
        items = self.marked()
        self.stack.append(set_items({}, items))

    def on_APPEND(self, _):
        self.extend([self.stack.pop()])

    def on_APPENDS(self, _):
        self.extend(self.marked())

    def extend(self, items: list):
        """Append to the list on the stack."""
        if type(self.stack[-1]) is not list:
            raise Damaged("items for what is no list")
        self.stack[-1].extend(items)

    def on_SETITEM(self, _):
        items = self.last(2)
        del self.stack[-2:]
        set_items(self.stack[-1], items)

    def on_SETITEMS(self, _):
        items = self.marked()
        set_items(self.stack[-1], items)

    def on_GLOBAL(self, names):
        path = ".".join(names.split(" "))
        if path not in self.names:
            shown = path if len(path) <= 100 and path.isprintable() else brief(path)
            raise Refused(f"{self.file} asks for {shown}, but weights need no code, so it was not loaded: {REMEDY}")
        self.stack.append(self.names[path])

    def on_STACK_GLOBAL(self, _):
        names = self.last(2)
        del self.stack[-2:]
        self.on_GLOBAL(" ".join(names))

    def on_REDUCE(self, _):
        called, args = self.last(2)
        self.stack[-2:] = [call(called, args)]

    on_NEWOBJ = on_REDUCE

    def on_NEWOBJ_EX(self, _):
        self.stack.pop()  # keywords
        self.on_REDUCE(_)

    def on_INST(self, names):
        items = self.marked()
        self.on_GLOBAL(names)
        self.stack[-1] = call(self.stack[-1], tuple(items))

    def on_OBJ(self, _):
        called, *args = self.marked()
        self.stack.append(call(called, tuple(args)))

    def on_BUILD(self, _):
        self.stack.pop()  # such as the versions of a state dict's modules
        if not isinstance(self.stack[-1], collections.OrderedDict | Ignored):
            raise Damaged("a state for what has none")

    def on_BINPERSID(self, _):
        kind, name, key, _, size, *_ = short(self.stack.pop())
        dtype = STORAGES.get(name.path) if isinstance(name, Name) else None
        if kind != "storage" or dtype is None or type(key) is not str or not is_count(size):
            raise Damaged("an unknown storage")
        self.sizes[key] = size * dtype.itemsize
        self.stack.append(Storage(key, dtype, size))

    def ordered(self, pairs=()):
        """An OrderedDict, which Python 2 pickled with its [key, value] pairs."""
        self.pairs += len(pairs)
        if self.pairs > MOST_PAIRS:
            raise Damaged(f"more than {MOST_PAIRS} pairs")
        if type(pairs) not in (list, tuple) or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
            raise Damaged("pairs that are none")
        return set_items(collections.OrderedDict(), [x for pair in pairs for x in pair])


PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "FLOAT", "BINFLOAT",
}  # fmt: skip
FIXED = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUT, GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
SKIPPED = {"PROTO", "FRAME"}
STEPS = {name.removeprefix("on_"): step for name, step in vars(TensorsOnly).items() if name.startswith("on_")}
OPCODES = {x.code.encode("latin-1"): (x.name, x.arg and x.arg.reader) for x in pickletools.opcodes}


def call(name, args):
    """What a pickled call returns."""
    if not isinstance(name, Name) or name.make is None:
        raise Damaged("a call of what is no function")
    return name.make(*short(args))


def short(values) -> tuple:
    """The values, if they are a short tuple: passing on a long one again and again would take forever."""
    if type(values) is not tuple or len(values) > MOST_ARGUMENTS:
        raise Damaged("arguments that are none")
    return values


def set_items(target, items: list):
    """The dict with items [key, value, key, value, ...]."""
    if not isinstance(target, dict) or len(items) % 2:
        raise Damaged("items for what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        text = isinstance(key, str | bytes) and len(key) <= MOST_NAME
        if not (text or key is None or isinstance(key, Name) or (type(key) in (int, bool) and abs(key) < 2**31)):
            raise Damaged(f"a key of type {type(key).__name__}, or a long one")  # others may take forever to hash
        target[key] = value
    return target


def tensor(storage, start, shape, strides, *_) -> View:
    """A tensor of a storage."""
    whole = type(shape) is type(strides) is tuple and len(shape) == len(strides) <= MOST_AXES
    if not isinstance(storage, Storage) or not whole or not all(map(is_count, (start, *shape, *strides))):
        raise Damaged("a tensor without a storage or shape")
    if start + extent(shape, strides) > storage.size:
        raise Damaged(f"a tensor {shape} lies outside of its storage")
    return View(storage.key, storage.dtype, start, shape, strides)


def is_count(x) -> bool:
    """Whether a value is a number of elements."""
    return type(x) is int and 0 <= x <= MOST_ELEMENTS


def load(file: Path):
    """(pickled object, {storage: first byte}) of a file: a zip archive or, before PyTorch 1.6, pickles and storages.

    Raises Refused for a file of another kind, and any other error for one that is broken.
    """
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
        stream.seek(0)
        return (load_zipped if zipped else load_pickled)(stream, file)


def load_zipped(stream, file: Path):
    """`load` of a zip archive."""
    if directory_size(stream) > MOST_DIRECTORY:
        raise Damaged("too many files in the archive")
    with zipfile.ZipFile(stream) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise Damaged(f"{len(pickles)} data.pkl in the archive")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and stored(archive, order, most=64) != b"little":
            raise Refused(f"{file} was written on a big-endian machine: save it again on another")
        reader = TensorsOnly(file)
        state = reader.load(io.BytesIO(stored(archive, pickles[0], MOST_BYTES)))
        starts = {}
        for key, size in reader.sizes.items():
            record = archive.getinfo(f"{folder}data/{key}")
            check_stored(record, size)
            stream.seek(record.header_offset + 26)  # zip's local header: 30 bytes, file name, extra field
            starts[key] = record.header_offset + 30 + sum(np.frombuffer(stream.read(4), "<u2").tolist())
    return state, starts


def directory_size(stream) -> int:
    """Bytes of a zip archive's directory, which the zipfile module reads as a whole; by its one or two last records."""
    length = stream.seek(0, io.SEEK_END)
    start = stream.seek(max(0, length - 2**16 - 100))
    tail, sizes = stream.read(length - start), [0]
    for mark, first, n in ((b"PK\5\6", 12, 4), (b"PK\6\6", 40, 8)):
        at = tail.rfind(mark)
        sizes += [int.from_bytes(tail[at + first : at + first + n], "little")] if at >= 0 else []
    stream.seek(0)
    return max(size for size in sizes if size != 2**32 - 1)


def check_stored(record: zipfile.ZipInfo, size: int) -> None:
    """Raise Damaged unless a file in an archive is stored as it is, in at least `size` bytes."""
    if record.compress_type != zipfile.ZIP_STORED or record.file_size < size or record.compress_size < size:
        raise Damaged(f"{brief(record.filename)} is compressed or too short")


def stored(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The content of a small file in an archive, which torch.save does not compress."""
    record = archive.getinfo(name)
    check_stored(record, 0)
    if record.file_size > most:
        raise Damaged(f"{brief(name)} has {record.file_size} bytes")
    return archive.read(record)


def load_pickled(stream, file: Path):
    """`load` of the older format: magic number, protocol, machine, state dict, storage keys, raw storages."""
    head, reader, starts = io.BytesIO(stream.read(MOST_BYTES)), TensorsOnly(file), {}
    if reader.load(head) != MAGIC:
        raise Damaged("wrong first number")
    for _ in range(2):
        reader.load(head)
    reader.sizes = {}
    state, keys = reader.load(head), reader.load(head)
    if type(keys) is not list or {*map(type, keys)} - {str} or sorted(keys) != sorted(reader.sizes):
        raise Damaged("storages are missing")
    at = head.tell()
    for key in keys:
        starts[key] = at + 8  # after the number of elements
        at = starts[key] + reader.sizes[key]
    if at > file.stat().st_size:
        raise Damaged("storages are missing")
    return state, starts

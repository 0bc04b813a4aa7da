"""Images in ArrayRecord files: each record a tf.train.Example or a msgpack map with the bytes of an image file."""

import dataclasses
import functools
from pathlib import PurePath
from typing import Any

import msgpack
import numpy as np

from cddistill import io
from cddistill.data.index import ROW, Found
from cddistill.data.indexed import Indexed, fields_of
from cddistill.data.sides import of_headers, picture
from cddistill.data.splits import digest

OPEN_FILES = 256
EXAMPLE = 0x0A  # first byte of a tf.train.Example; those of msgpack maps are 0x80 to 0x8f, 0xde and 0xdf


class ArrayRecord:
    """ArrayRecord files, such as cats.array_record or cats-train.array_record-00000-of-00010."""

    suffix, shards = "array_record", "a folder of *.array_record"

    def is_shard(self, name: str) -> bool:
        return ".array_record" in name.lower() or ".arrayrecord" in name.lower()

    def scan(self, path: PurePath, shard: str) -> Found:
        """The records of a file, from its footer."""
        opened.cache_clear()  # of files as they were
        reader = opened(path)
        if not reader.ok():
            return Found(np.empty(0, ROW), damaged=f"{shard} is no whole ArrayRecord file: download it again")
        n = reader.num_records()
        rows = np.zeros(n, ROW)
        rows["at"], rows["digest"] = np.arange(n), [digest(f"{shard}/{i}") for i in range(n)]
        return Found(rows)

    def sample(self, path: PurePath, shard: str, at: int, size: int) -> tuple[str, dict[str, Any]]:
        """Record `at`."""
        name = f"record {at} of {shard}"
        try:
            return name, fields_of(name, parse(opened(path).read([at])[0]))
        except (RuntimeError, msgpack.UnpackException, message_errors()) as error:
            raise ValueError(f"{name} is damaged ({error}): write {shard} again") from error

    def sides(self, path: PurePath, shard: str, rows: np.ndarray) -> Found:
        """From the headers of the pictures, for which every record is read."""
        return of_headers(rows, lambda at, size: picture(*self.sample(path, shard, at, size)))


@functools.lru_cache(maxsize=OPEN_FILES)
def opened(path: PurePath):
    """A reader, which several threads may use. Read-ahead would read what a shuffled order does not need.

    It reads local files only: of one on an object store, a copy in scratch.
    """
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(str(io.local(path)), options="readahead_buffer_size:0")


def parse(record: bytes) -> dict[str, Any]:
    """The values of a record by name: of an Example the first of each feature. ValueError for other records."""
    if record[:1] == bytes([EXAMPLE]):
        found = {}
        for entry in example().FromString(record).features.feature:
            kind = entry.value.WhichOneof("kind")
            values = getattr(entry.value, kind).value if kind else ()
            found[entry.key] = values[0] if len(values) else None
        return found
    if not isinstance(row := msgpack.unpackb(record), dict) or not all(isinstance(key, str) for key in row):
        raise ValueError("a record must be a tf.train.Example or a msgpack map with texts as keys")
    return row


def message_errors():
    """What protobuf raises for bytes that are no message."""
    from google.protobuf.message import DecodeError

    return DecodeError


@functools.cache
def example():
    """The message tf.train.Example (tensorflow/core/example/{example,feature}.proto) without TensorFlow.

    A map on the wire is a repeated message of key and value.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="cddistill_example.proto", package="cddistill", syntax="proto3")
    kinds = {"BytesList": "BYTES", "FloatList": "FLOAT", "Int64List": "INT64"}
    messages = {name: [("value", 1, kind, True, None)] for name, kind in kinds.items()} | {
        "Feature": [("bytes_list", 1, "BytesList", False, 0), ("float_list", 2, "FloatList", False, 0),
                    ("int64_list", 3, "Int64List", False, 0)],
        "Entry": [("key", 1, "STRING", False, None), ("value", 2, "Feature", False, None)],
        "Features": [("feature", 1, "Entry", True, None)],
        "Example": [("features", 1, "Features", False, None)],
    }  # fmt: skip
    proto = descriptor_pb2.FieldDescriptorProto
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated, one_of in fields:
            label = proto.LABEL_REPEATED if repeated else proto.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind in messages:
                added.type, added.type_name = proto.TYPE_MESSAGE, f".cddistill.{kind}"
            else:
                added.type = getattr(proto, f"TYPE_{kind}")
            if one_of is not None:
                added.oneof_index = one_of
        if name == "Feature":
            message.oneof_decl.add(name="kind")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("cddistill.Example"))


@dataclasses.dataclass(frozen=True)
class ArrayRecords(Indexed):
    """ArrayRecord files in the folder data.path."""

    format = ArrayRecord()
    needs = "array_record"

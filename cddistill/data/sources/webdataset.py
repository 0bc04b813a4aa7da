"""Images in WebDataset tar files, as img2dataset writes them: read in place by their offsets, never unpacked."""

import dataclasses
import functools
import json
import os
import tarfile
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from cddistill import io
from cddistill.data.captions import check_text, facts, label_of
from cddistill.data.images import SUFFIXES
from cddistill.data.index import ROW, Found
from cddistill.data.indexed import PICTURES, Indexed
from cddistill.data.sides import of_headers
from cddistill.data.splits import digest

BLOCK = 512  # bytes; headers and contents start at multiples of it
TEXTS = {"txt": "caption", "caption": "caption", "text": "caption", "cls": "label", "json": "json"}
OPEN_FILES = 256
AHEAD = 2**23  # bytes that are read ahead for the headers of a tar file on an object store: about all of it


def parts(member: str) -> tuple[str, str | None]:
    """(key of the sample, field) of a member's name, cut at the first dot of its file name: ("a/7", "caption") of
    a/7.txt; the field is None if it is not used. An image has any suffix of a picture, another is 7.depth.png."""
    folder, _, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    kind, _, suffix = extension.lower().rpartition(".")
    if f".{suffix}" in SUFFIXES or (kind, suffix) == ("depth", "npy"):
        field = kind or "image"
        return f"{folder}/{stem}" if folder else stem, field if field in PICTURES else None
    return f"{folder}/{stem}" if folder else stem, None if kind else TEXTS.get(suffix)


class Tar:
    """Tar files of samples: members that follow each other and have one name up to the first dot."""

    suffix, shards = "tar", "a folder of WebDataset's *.tar (unpacked from *.tar.gz, which cannot be read at random)"

    def is_shard(self, name: str) -> bool:
        return name.lower().endswith(".tar")

    def scan(self, path: PurePath, shard: str) -> Found:
        """The samples of a tar file, from its headers. Of one that is cut off, those before the end."""
        opened.cache_clear()  # of files as they were
        samples, damaged, size = [], "", io.size(path)
        try:
            with io.opened(path, AHEAD) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    key, field = parts(member.name)
                    if not member.isfile() or not key.rpartition("/")[2]:
                        continue
                    if not samples or samples[-1][0] != key:
                        samples.append((key, member.offset, [], []))
                    samples[-1][2].append(field)
                    samples[-1][3][:] = [end]
                    if end > size:
                        raise tarfile.ReadError("it ends before its last member does")
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(BLOCK).strip(b"\0"):  # tarfile takes any damaged header for the end
                    raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")
        except tarfile.TarError as error:
            damaged = f"{shard} is no whole tar file ({error}): download it again"
            samples = samples[:-1]  # its last member may be elsewhere
        whole = [sample for sample in samples if "image" in sample[2]]
        rows = np.empty(len(whole), ROW)
        for i, (key, start, _, (end,)) in enumerate(whole):
            rows[i] = start, end - start, digest(f"{shard}/{key}")
        bare = sum(not {"caption", "json"} & {*fields} for _, _, fields, _ in whole)
        left = tuple(f"{key} in {shard}" for key, _, fields, _ in samples if "image" not in fields)
        return Found(rows, bare, left, damaged)

    def sample(self, path: PurePath, shard: str, at: int, size: int) -> tuple[str, dict[str, Any]]:
        """The members from byte `at` on, by field."""
        content, name, fields = read_range(path, shard, at, size), "", {}
        try:
            with tarfile.open(fileobj=BytesIO(content), mode="r:") as tar:
                for member in tar:
                    key, field = parts(member.name)
                    name = name or f"{key} in {shard}"
                    if not member.isfile() or field is None:
                        continue
                    if field in fields:
                        raise ValueError(f"{name} has two members for its {field}: keep one of them")
                    fields[field] = tar.extractfile(member).read()
        except tarfile.TarError as error:
            raise ValueError(f"{name or shard} is damaged at byte {at} ({error}): download {shard} again") from error
        try:
            return name, texts(fields)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def sides(self, path: PurePath, shard: str, rows: np.ndarray) -> Found:
        """From the headers of the pictures. Of a tar file on an object store that takes about all of its bytes."""

        def picture(at, size):
            file.seek(at)
            try:
                tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (of a file that others close)
                members = ((member, *parts(member.name)) for member in tar if member.isfile())
                member, key = next((member, key) for member, key, field in members if field == "image")
            except (tarfile.TarError, StopIteration) as error:
                raise ValueError(f"{shard} is damaged at byte {at}: download it again") from error
            return tar.extractfile(member), f"{key} in {shard}"

        with io.opened(path, AHEAD) as file:
            return of_headers(rows, picture)


def texts(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with captions and labels as such; those of a .json member if there is no other."""
    stated = {}
    if "json" in fields:
        row = json.loads(fields.pop("json"))
        if not isinstance(row, dict):
            raise ValueError(f"its .json holds a {type(row).__name__}, not an object {{...}}")
        stated, _ = facts({key.lower(): x for key, x in row.items() if key.lower() not in OTHERS})
    for field, read in (("caption", check_text), ("label", label_of)):
        if field in fields:
            fields[field] = read(fields[field].decode("utf-8", "surrogateescape").strip())
    return stated | fields


OTHERS = {key for field, keys in PICTURES.items() if field != "image" for key in keys}  # in .json these are no images


def read_range(path: PurePath, shard: str, at: int, size: int) -> bytes:
    """Bytes at ... at + size - 1 of a file. Raises ValueError for a file that ends before."""
    content = io.read_range(path, at, size) if io.is_remote(path) else read_local(path, at, size)
    if len(content) < size:
        end = at + len(content)
        raise ValueError(f"{shard} ends at byte {end}, before a sample does: it has changed since the start of the run")
    return content


def read_local(path: Path, at: int, size: int) -> bytes:
    """Up to `size` bytes of a local file from `at` on: fewer only at its end."""
    file, pieces = opened(path), []
    while size and (piece := os.pread(file.fileno(), size, at)):
        pieces.append(piece)
        at, size = at + len(piece), size - len(piece)
    return b"".join(pieces)


@functools.lru_cache(maxsize=OPEN_FILES)  # one that leaves the cache is closed when its last reader is done
def opened(path: Path):
    """A file, open for `os.pread` by several threads."""
    return path.open("rb", buffering=0)


@dataclasses.dataclass(frozen=True)
class WebDataset(Indexed):
    """WebDataset tar files in the folder data.path."""

    format = Tar()

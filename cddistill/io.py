"""Files: paths, atomic writes, JSON, and whether a folder can be written, on disks and on object stores.

`path` makes a path of a text: a pathlib.Path or, for gs:// and s3://, one of etils.epath. Both have /, exists, iterdir,
read_bytes and so on. What differs in meaning between a disk and an object store is a function here.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

from cddistill import remote

MOST_JSON, MOST_DEPTH = 2**24, 50  # bytes of a file, levels of lists and objects


def path(text) -> PurePath:
    """The path that a text names, its ~ expanded: local, or on an object store. A path is itself.

    Raises ValueError for another scheme than gs:// and s3://, and if the package for one of these is missing.
    """
    if isinstance(text, PurePath):
        return text
    return remote.path(text) if remote.SCHEME.match(text) else Path(text).expanduser()


def is_remote(place) -> bool:
    """Whether a path, or the text of one, names something on an object store."""
    return str(place).startswith(tuple(remote.PACKAGES))


def local(place) -> Path:
    """A local path as it is; of a file or folder on an object store, a copy in scratch, which is only read.

    A copy is kept under the names, sizes and versions of its objects, and made anew when these change.
    """
    return remote.fetch(path(place)) if is_remote(place) else path(place)


@contextlib.contextmanager
def naming(file):
    """Give an OSError that has no file's name, such as that of a full disk, this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


def own() -> str:
    """A part of a file's name that no other process uses, on this host or another, nor this one a second time."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def write_atomic(file, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, never finds half of it; text is UTF-8. Makes the folder it lies in."""
    file, content = path(file), content.encode(errors="surrogateescape") if isinstance(content, str) else content
    if is_remote(file):
        remote.put(file, content)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{own()}.tmp" if len(os.fsencode(file.name)) > 200 else f".{file.name}.{own()}.tmp")
    try:
        with naming(file):
            draft.write_bytes(content)
            os.replace(draft, file)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def create(file: PurePath, content: bytes) -> bool:
    """Write a file, unless there is one: of several processes, one succeeds."""
    if is_remote(file):
        return remote.create(file, content)
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with naming(file), os.fdopen(handle, "wb") as opened:
            opened.write(content)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def rewrite(file: PurePath, content: bytes) -> None:
    """Write over a file, as long as before, where it lies; FileNotFoundError if there is none."""
    if is_remote(file):
        remote.rewrite(file, content)
        return
    with file.open("r+b") as opened:
        opened.write(content)


def read_changed(file: PurePath) -> tuple[bytes, str]:
    """A file's bytes and, where its writing may leave these the same, its time of change."""
    if is_remote(file):
        return remote.read(file), ""
    with file.open("rb") as opened:  # a network file system looks for changes when a file is opened
        return opened.read(), str(os.fstat(opened.fileno()).st_mtime_ns)


def append_to(file: PurePath):
    """A text file open for adding whole lines, which exists; each is kept if the process is killed.

    On an object store they are kept in parts, after a `flush` or 30 s; `read_appended` reads these, too.
    """
    return remote.Appender(file) if is_remote(file) else file.open("a", buffering=1, encoding="utf-8")


def read_appended(file: PurePath) -> bytes:
    """What is in a file that is added to; b"" if there is none."""
    if is_remote(file):
        return remote.read_appended(file)
    return file.read_bytes() if file.exists() else b""


def joined(file: PurePath) -> Path:
    """A local path as it is; of a file on an object store that is added to, a local copy of all of it."""
    return remote.joined(file) if is_remote(file) else file


def mirror(folder: PurePath) -> tuple[Path, Callable]:
    """A local folder for a program that writes to no other, and push(final=False), which copies it to `folder`."""
    if not is_remote(folder):
        return folder, lambda final=False: None
    copied = remote.Mirror(folder)
    return copied.folder, copied.push


def move(place: PurePath, target: PurePath) -> None:
    """Rename a folder; on an object store, its objects one by one."""
    if is_remote(place):
        remote.move(place, target)
    else:
        place.rename(target)


def sizes(root) -> dict[str, int]:
    """{name: bytes} of all files below a folder, in order of names; {".": bytes} of a single file."""
    root = path(root)
    if is_remote(root):
        return {name or ".": x["size"] for name, x in remote.objects(root).items()}
    files = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]
    return {name: (root / name).stat().st_size for name in sorted(p.relative_to(root).as_posix() for p in files)}


def versions(root: PurePath) -> dict[str, tuple[int, str]]:
    """{name: (bytes, what changes when it is written again)} of all objects below a folder on an object store."""
    return {name: (x["size"], remote.version(x)) for name, x in remote.objects(root).items()}


def read_range(file: PurePath, start: int, size: int) -> bytes:
    """`size` bytes of an object on an object store from `start` on, in one request; fewer if it ends before."""
    return remote.read_range(file, start, size)


def opened(file: PurePath, ahead: int = 0):
    """A file, open for reading bytes in place; on an object store each request reads `ahead` bytes more."""
    return remote.opened(file, ahead) if is_remote(file) else file.open("rb")


def heads(root, names: Iterable[str], length: int) -> list[bytes]:
    """The first bytes of files below a folder."""
    root = path(root)
    if is_remote(root):
        return remote.heads(root, names, length)
    found = []
    for name in names:
        with (root / name).open("rb") as file:
            found.append(file.read(length))
    return found


def make_folder(folder: PurePath) -> None:
    """Make a folder and those it lies in; object stores have none."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def absolute(place) -> PurePath:
    """The absolute path that a path or text names, with links as they are."""
    return path(place) if is_remote(place) else Path(os.path.abspath(path(place)))


@contextlib.contextmanager
def made_for(target: PurePath, keep: bool = False):
    """A folder in which the content of `target` is made; on an object store a scratch folder, uploaded in the end.

    *.json at the top goes last, so that a folder with its manifest is whole. With `keep` the scratch folder starts with
    what is there, and is uploaded after an error, too, and its *.safetensors, which have that name when they are whole,
    every minute: the same command can go on.
    """
    if not is_remote(target):
        yield target
        return
    with remote.scratch("made") as folder:
        known = remote.download(target, folder, lambda name: not name.startswith(".")) if keep else {}
        whole = False
        try:
            with remote.uploading(folder, target, ".safetensors", known) if keep else contextlib.nullcontext():
                yield folder
            whole = True
        finally:
            if keep or whole:
                remote.upload(folder, target, last=".json", known=known)


@contextlib.contextmanager
def draft_of(folder):
    """A hidden folder inside this one, which exists, for what is moved into it when the block ends, *.json last.

    Until then, and after a crash, the folder looks empty. What an earlier process left of its draft is removed.
    """
    if is_remote(folder):
        with made_for(folder) as draft:
            yield draft
        return
    draft = Path(folder) / ".unfinished"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for entry in sorted(draft.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
            os.replace(entry, Path(folder) / entry.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_json(file, remedy: str = "download it again", **kinds) -> dict:
    """The object in a JSON file. Raises ValueError, naming the file and the remedy, for anything else.

    `kinds` are the types of keys that it must have, rows=int, or may have, fingerprints=dict | None.
    """
    file = path(file)
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected a diffusers folder")
    try:
        if size(file) > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        content = parse_json(file.read_bytes().decode("utf-8"))
    except ValueError as error:  # also for bytes that are not UTF-8
        raise ValueError(f"{file} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object {{...}}: {remedy}")
    for key, kind in kinds.items():
        if not isinstance(value := content.get(key), kind) or isinstance(value, bool):
            kind = getattr(kind, "__name__", kind)
            raise ValueError(f"{file} has {key} = {value!r:.60}, where {kind} is expected: {remedy}")
    return content


def size(file: PurePath) -> int:
    """The number of bytes in a file."""
    return file.stat().length if is_remote(file) else file.stat().st_size


def parse_json(text: str):
    """What a JSON text holds; ValueError for any other text, and for lists or objects nested more than MOST_DEPTH."""
    try:
        level = [json.loads(text)]
    except RecursionError as error:
        raise ValueError(str(error)) from error
    content = level[0]
    for _ in range(MOST_DEPTH + 1):
        held = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        level = [x for values in held for x in values]
    if level:
        raise ValueError(f"nested more than {MOST_DEPTH} levels deep")
    return content


def is_plain_name(name) -> bool:
    """Whether this is the name of a file or folder itself, not a path to elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {*name} & {"/", "\\", "\0"}


def write_json(file, content) -> None:
    """Write an object as indented JSON, atomically."""
    write_atomic(file, json.dumps(content, indent=2) + "\n")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; lists are values."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def ensure_writable(folder, flag: str = "--workdir") -> None:
    """Make the folder that a flag names. Raises ValueError, before any work is done, if it cannot be written."""
    folder = path(folder)
    if is_remote(folder):
        remote.check_writable(folder, flag)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{own()}"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be written ({error.strerror}); choose another with {flag}") from error

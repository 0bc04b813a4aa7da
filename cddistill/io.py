"""Files: atomic writes, JSON, and whether a folder can be written."""

import contextlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

MOST_JSON, MOST_DEPTH = 2**24, 50  # bytes of a file, levels of lists and objects


@contextlib.contextmanager
def naming(path):
    """Give an OSError that has no file's name, such as that of a full disk, this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def own() -> str:
    """A part of a file's name that no other process uses, on this host or another, nor this one a second time."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def write_atomic(path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, never finds half of it; text is UTF-8. Makes the folder it lies in."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{own()}.tmp" if len(os.fsencode(path.name)) > 200 else f".{path.name}.{own()}.tmp")
    try:
        with naming(path):
            draft.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


@contextlib.contextmanager
def draft_of(folder):
    """A hidden folder inside this one, which exists, for what is moved into it when the block ends, *.json last.

    Until then, and after a crash, the folder looks empty. What an earlier process left of its draft is removed.
    """
    draft = Path(folder) / ".unfinished"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for entry in sorted(draft.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
            os.replace(entry, Path(folder) / entry.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_json(path, remedy: str = "download it again", **kinds) -> dict:
    """The object in a JSON file. Raises ValueError, naming the file and the remedy, for anything else.

    `kinds` are the types of keys that it must have, rows=int, or may have, fingerprints=dict | None.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected a diffusers folder")
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        content = parse_json(path.read_text("utf-8"))
    except ValueError as error:  # also for bytes that are not UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object {{...}}: {remedy}")
    for key, kind in kinds.items():
        if not isinstance(value := content.get(key), kind) or isinstance(value, bool):
            kind = getattr(kind, "__name__", kind)
            raise ValueError(f"{path} has {key} = {value!r:.60}, where {kind} is expected: {remedy}")
    return content


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


def write_json(path, content) -> None:
    """Write an object as indented JSON, atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; lists are values."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def ensure_writable(folder, flag: str = "--workdir") -> None:
    """Make the folder that a flag names. Raises ValueError, before any work is done, if it cannot be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{own()}"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be written ({error.strerror}); choose another with {flag}") from error

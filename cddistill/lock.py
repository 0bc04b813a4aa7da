"""An advisory lock of a folder that one program at a time may write: a file that names its owner.

It needs nothing of a file system but that a file is created by one process only, so it works where flock does not. An
owner on this machine is asked for by its process number; one on another machine lives if it keeps rewriting the file.
"""

import contextlib
import datetime
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path, PurePath

from cddistill import io, signals

BEAT = 10.0  # s between the signs of life of an owner
SILENT = 60.0  # s without one, after which an owner on another machine counts as gone


class InUse(OSError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def held(folder, flag: str = "--workdir", index: int = 0):
    """Hold the lock of a folder that exists, in the name of the process with this number in its run.

    Raises InUse, naming the owner and the flag that chooses another folder, if another process holds it. A lock whose
    owner is gone is taken over; on another machine, that takes SILENT seconds to find out.
    """
    path = io.path(folder) / (f".lock-{index}" if index else ".lock")
    token = take(path, flag)
    stop = threading.Event()
    thread = threading.Thread(target=beat, args=(path, token, stop), daemon=True)
    thread.start()
    try:
        with signals.at_end(functools.partial(release, path, token)):
            yield
    finally:
        stop.set()
        thread.join()
        release(path, token)


def take(path: PurePath, flag: str) -> str:
    """Create the lock file, or replace one whose owner is gone; returns its token."""
    token = secrets.token_hex(8)
    while not io.create(path, content(token)):
        if (left := abandoned(path)) is None:
            raise InUse(in_use(path, flag))
        if left and replace(path, content(token), left):
            break
    return token


def replace(path: PurePath, text: bytes, left: bytes) -> bool:
    """Write a lock file instead of the one whose owner is gone, `left`, unless another process has done so."""
    marker, end = path.with_name(f"{path.name}.takeover"), time.monotonic() + SILENT
    while not io.create(marker, b""):
        if time.monotonic() > end:
            marker.unlink(missing_ok=True)  # of a process that was killed right here
        time.sleep(0.01)
    try:
        if read(path)[1] != left:
            return False
        io.write_atomic(path, text)
        return True
    finally:
        marker.unlink(missing_ok=True)


def content(token: str) -> bytes:
    """The lock file of this process, at this time; always equally long, as it is rewritten in place."""
    pid = os.getpid()
    owner = {"token": token, "host": socket.gethostname(), "pid": pid, "place": place(), "born": born(pid)}
    return json.dumps(owner | {"since": SINCE, "alive": now()}).encode() + b"\n"


def now() -> str:
    """The time, of fixed length."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


SINCE = now()


def read(path: PurePath) -> tuple[dict, bytes]:
    """(owner, the file's bytes and time of change); ({}, ...) for a file that is being written, or gone."""
    try:
        found, changed = io.read_changed(path)
        owner = json.loads(found)
    except FileNotFoundError:
        return {}, b""
    except ValueError:
        return {}, found + changed.encode()
    return owner if isinstance(owner, dict) else {}, found + changed.encode()


def abandoned(path: PurePath) -> bytes | None:
    """What is in a lock file whose owner is gone, as `read` gives it, b"" if there is none; None if the owner lives."""
    owner, before = read(path)
    if owner.get("place") == place():
        runs = born(owner["pid"]) if isinstance(owner.get("pid"), int) else None
        return None if runs and runs == owner.get("born") else before
    said, end = "", time.monotonic() + SILENT
    while before and time.monotonic() < end:
        time.sleep(min(1.0, SILENT / 10))
        owner, seen = read(path)
        if seen != before:
            return None if seen else b""
        if not said:
            said = f"{path} is of {named(owner)}: waiting {SILENT:.0f} s for a sign of life"
            print(said, file=sys.stderr, flush=True)
    return before


def in_use(path: PurePath, flag: str) -> str:
    """The sentence for a folder that another process writes."""
    owner, _ = read(path)
    return (
        f"{path.parent} is in use by {named(owner)}: wait until it ends, stop it, or choose another {flag} (if it does "
        f"not run, remove {path})"
    )


def named(owner: dict) -> str:
    """An owner in words."""
    pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "since"))
    return f"process {pid} on {host}, started {since}"


def beat(path: PurePath, token: str, stop: threading.Event) -> None:
    """Rewrite the lock file until `stop`, and end the process if another has taken the lock over."""
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):  # gone with its folder, or out of reach: saving will say so
            owner, _ = read(path)
            if owner.get("token") not in (token, None):
                said = f"{path.parent} was taken over by {named(owner)}, as this process gave no sign of life"
                print(f"cddistill: {said}: this one stops", file=sys.stderr, flush=True)
                os._exit(1)
            io.rewrite(path, content(token))


def release(path: PurePath, token: str) -> None:
    """Remove the lock file, if it is still one's own."""
    if read(path)[0].get("token") == token:
        path.unlink(missing_ok=True)


# ---- which process


@functools.cache
def place() -> str:
    """What process numbers are unique in: this machine since it was started, and in it this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def born(pid: int) -> str | None:
    """When a process of this machine was started, in some unit; None if it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else running(pid)
    return None if state in "ZX" else fields[18]  # proc(5): field 22, starttime


def running(pid: int) -> str | None:
    """`born` where there is no /proc: only whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"

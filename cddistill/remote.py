"""Object stores, gs:// and s3://, through etils.epath and fsspec's clients: what `io` does with them.

A put replaces an object whole, so it needs no draft; folders are prefixes of names, so they are neither made nor
renamed. The limits of both clients, and what is tried again, are set here and nowhere else.
"""

import contextlib
import datetime
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path, PurePath

from cddistill import progress

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PACKAGES = {"gs://": ("gcsfs", "gcs"), "s3://": ("s3fs", "s3")}  # scheme: package, extra
CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs")
VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime")  # of the two clients, and of emulators
ATTEMPTS = 8  # of a request to S3 that is answered with 429 or 5xx, or whose connection fails
PART_EVERY, MOST_PARTS = 30.0, 64  # of what grows: s between two parts; parts, after which they are joined
WHOLE_EVERY = 60.0  # s between two looks for files of --mode=pairs that are whole
MIRROR_EVERY = 300.0  # s between two copies of files that grow
STALLED = 60.0  # s without a byte, after which a connection counts as failed


def path(text: str) -> PurePath:
    """The path of an object or folder, as etils has them. Raises ValueError as `io.path` does."""
    scheme = SCHEME.match(text)[0]
    if scheme not in PACKAGES:
        raise ValueError(f"{text} is on {scheme}, and paths are local or on {' or '.join(PACKAGES)}: choose such a one")
    package, extra = PACKAGES[scheme]
    if not importlib.util.find_spec(package):
        raise ValueError(f"{text} needs {package}: pip install 'cddistill[{extra}]'")
    if not text[len(scheme) :].strip("/"):
        raise ValueError(f"{text} names no bucket: write {scheme}bucket/folder")
    configure()
    from etils import epath

    return epath.Path(text)


def configure() -> None:
    """Set the limits of the clients, but for those that FSSPEC_... variables or files of fsspec's set."""
    import fsspec

    os.environ.setdefault("EPATH_USE_TF", "false")  # etils prefers TensorFlow's client where that is installed
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks by gRPC first, with rights of its own
    for protocol, options in {"gcs": gcs_options, "s3": s3_options}.items():
        fsspec.config.conf[protocol] = options() | fsspec.config.conf.get(protocol, {})


def gcs_options() -> dict:
    """Options of gcsfs, which tries a request 6 times, for half a minute."""
    if not importlib.util.find_spec("aiohttp"):  # no gcsfs either
        return {}
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
    return {"use_listings_cache": False, "requests_timeout": limits, "session_kwargs": {"timeout": limits}}


def s3_options() -> dict:
    """Options of s3fs and of botocore below it."""
    retries = {"mode": "legacy", "max_attempts": ATTEMPTS}  # "standard" takes 429 without a code for final
    limits = {"retries": retries, "connect_timeout": STALLED, "read_timeout": STALLED}
    return {"use_listings_cache": False, "config_kwargs": limits}  # what others write is seen at once


def client(place: PurePath):
    """fsspec's file system of a path, and the path's name in it."""
    import fsspec

    return fsspec.core.url_to_fs(str(place))


@contextlib.contextmanager
def naming(place: PurePath):
    """Any error of a client as an OSError that names the path: they raise many types."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise OSError(getattr(error, "errno", None) or 5, said, str(place)) from error


def of_client(error: BaseException) -> bool:
    """Whether an error is one of a client of an object store: credentials, networks, refusals."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def put(file: PurePath, content: bytes) -> None:
    """Write an object: no reader finds half of it."""
    with naming(file):
        fs, name = client(file)
        fs.pipe_file(name, content)


def read(file: PurePath) -> bytes:
    """An object's bytes."""
    with naming(file):
        return file.read_bytes()


def read_range(file: PurePath, start: int, size: int) -> bytes:
    """`size` bytes of an object from `start` on, in one request; fewer if it ends before."""
    with naming(file):
        fs, name = client(file)
        return fs.cat_file(name, start=start, end=start + size)


def opened(file: PurePath, ahead: int):
    """An object as an open binary file; each request reads `ahead` bytes more than are asked for."""
    with naming(file):
        fs, name = client(file)
        how = {"cache_type": "readahead", "block_size": ahead} if ahead else {"cache_type": "none"}
        return fs.open(name, "rb", **how)


def create(file: PurePath, content: bytes) -> bool:
    """Write an object, unless there is one: by a precondition and, for stores that ignore it, by reading it again.

    That also tells an object of others from one's own, whose answer was lost and which was put a second time.
    """
    if file.exists():
        return False
    with naming(file):
        fs, name = client(file)
        try:
            fs.pipe_file(name, content, mode="create")
        except FileExistsError:
            return bool(content) and fs.cat_file(name) == content
        return fs.cat_file(name) == content


def rewrite(file: PurePath, content: bytes) -> None:
    """Write an object instead of one that is there; FileNotFoundError if there is none."""
    if not file.exists():
        raise FileNotFoundError(str(file))
    put(file, content)


def move(place: PurePath, target: PurePath) -> None:
    """Copy all objects below `place` to the same names below `target`, and remove them."""
    names = [*objects(place)]
    with naming(place):
        fs, root = client(place)
        _, end = client(target)
        fs.copy([f"{root}/{name}" for name in names], [f"{end}/{name}" for name in names])
        fs.rm([f"{root}/{name}" for name in names])


def check_writable(folder: PurePath, flag: str) -> None:
    """Raises ValueError, with the client's reason, if nothing can be written to a folder."""
    probe = folder / f".writable.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        put(probe, b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or "there is no such bucket"
        raise ValueError(f"folder {folder} cannot be written ({reason}); choose another with {flag}") from error


# ---- copies


@contextlib.contextmanager
def scratch(use: str):
    """A folder on the local disk for as long as the block takes."""
    with tempfile.TemporaryDirectory(prefix=f"cddistill-{use}-") as folder:
        yield Path(folder)


def objects(place: PurePath) -> dict[str, dict]:
    """{name within a folder: what the store says of it}; {"": ...} for a single object. In order of names."""
    with naming(place):
        fs, root = client(place)
        found = fs.find(root, detail=True)
    within = lambda name: name[len(root) :].strip("/")
    return {within(name): x for name, x in sorted(found.items()) if x["type"] == "file" and name[-1:] != "/"}


def version(said: dict) -> str:
    """What changes when an object is written again, of what a store, or an emulator, says of it."""
    return " ".join(str(said[key]) for key in VERSIONS if said.get(key))


def changed(said: dict) -> int:
    """When an object was written, in ns since 1970; 0 if a store does not say it."""
    time = next((said[key] for key in ("LastModified", "mtime", "updated") if said.get(key)), None)
    time = datetime.datetime.fromisoformat(time) if isinstance(time, str) else time
    return int(time.timestamp() * 1000) * 10**6 if time else 0


def heads(place: PurePath, names, length: int) -> list[bytes]:
    """The first bytes of objects below `place`, "." for itself."""
    with naming(place):
        fs, root = client(place)
        paths = [root if name == "." else f"{root}/{name}" for name in names]
        return fs.cat_ranges(paths, [0] * len(paths), [length] * len(paths), on_error="raise")


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """{name: (bytes, time of change)} of all files below a local folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def download(place: PurePath, folder: Path, wanted=lambda name: True) -> dict[str, tuple[int, int]]:
    """Copy the objects below `place` that are `wanted` to a local folder; returns its `stamps`.

    Files have the times of their objects, so that copies on other hosts, and later ones, are the same. Raises OSError
    if one comes incomplete.
    """
    there = {name: x for name, x in objects(place).items() if wanted(name)}
    targets = [folder / name for name in there]
    for parent in {target.parent for target in targets}:
        parent.mkdir(parents=True, exist_ok=True)
    with naming(place):
        fs, root = client(place)
        names = [f"{root}/{name}".rstrip("/") for name in there]
        megabytes = sum(x["size"] for x in there.values()) / 1e6
        with progress.counting(f"MB of {place}", round(megabytes)) as advance:
            fs.get(names, [str(target) for target in targets], callback=progress.transfer(advance))
    for target, said in zip(targets, there.values(), strict=True):
        if target.stat().st_size != said["size"]:
            raise OSError(5, f"{target.stat().st_size} of {said['size']} bytes were read", str(place))
        os.utime(target, ns=(changed(said),) * 2)
    return stamps(folder)


def upload(folder: Path, place: PurePath, last: str, known: dict | None = None, only=None) -> dict:
    """Copy the files of a local folder below `place`; names that end in `last` after the others, deep ones first.

    Files with the same stamp as in `known` are there. `only` are the stamps of some files, by default those of all;
    they are returned.
    """
    now = stamps(folder) if only is None else only
    names = [name for name in now if name not in (known or {}) or now[name] != known[name]]
    closing = sorted((name for name in names if name.endswith(last)), key=lambda name: (-name.count("/"), name))
    fs, root = client(place)
    with naming(place):
        if early := [name for name in names if name not in closing]:
            fs.put([str(folder / name) for name in early], [f"{root}/{name}" for name in early])
        for name in closing:
            fs.put_file(str(folder / name), f"{root}/{name}")
    return now


@contextlib.contextmanager
def uploading(folder: Path, place: PurePath, suffix: str, known: dict):
    """Every WHOLE_EVERY seconds, copy new files that end in a suffix; their stamps are added to `known`."""
    stop = threading.Event()

    def work():
        while not stop.wait(WHOLE_EVERY):
            new = {name: stamp for name, stamp in stamps(folder).items() if name.endswith(suffix)}
            with contextlib.suppress(OSError):  # what is left goes with the rest, which says so
                upload(folder, place, last=suffix, known=known, only=new)
                known.update(new)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def cache() -> Path:
    """Where copies of what is only read are kept: CDDISTILL_SCRATCH or, by default, a folder in that of tempfile."""
    own = Path(tempfile.gettempdir()) / f"cddistill-{os.getuid()}"
    folder = Path(os.environ.get("CDDISTILL_SCRATCH") or own)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def fetch(place: PurePath) -> Path:
    """The local copy of an object or of all below a folder; it is made anew when a name, a size or a version changes.

    Raises ValueError if there is nothing.
    """
    there = objects(place)
    if not there:
        raise ValueError(f"there is nothing at {place}: check its name")
    said = [(name, x["size"], version(x)) for name, x in there.items()]
    target = cache() / hashlib.sha256(f"{place} {said}".encode()).hexdigest()[:16] / place.name
    if not target.exists():
        draft = target.parent.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            draft.mkdir()
            download(place, draft / place.name)
            with contextlib.suppress(OSError):  # another process was quicker
                os.replace(draft, target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


# ---- what grows


def parts(file: PurePath) -> list[PurePath]:
    """The objects that go on where a file ends, named after the number of bytes before each."""
    if not file.parent.exists():
        return []
    return sorted((p for p in file.parent.iterdir() if p.name.startswith(f"{file.name}.part-")), key=lambda p: p.name)


def read_appended(file: PurePath) -> bytes:
    """A file and its parts. One that does not begin where the others end was merged before, or is of an older file."""
    with naming(file):
        content = file.read_bytes() if file.exists() else b""
        for part in parts(file):
            if int(part.name.rpartition("-")[2]) == len(content):
                content += part.read_bytes()
    return content


def joined(file: PurePath) -> Path:
    """A local copy of a file with its parts."""
    content = read_appended(file)
    target = cache() / hashlib.sha256(str(file).encode() + content).hexdigest()[:16] / file.name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    return target


class Appender:
    """A text file that is added to, as an open one: what is written lies in parts, which are joined at times.

    What was written is safe after `flush`, and after `PART_EVERY` seconds. Parts that are there are removed first.
    """

    def __init__(self, file: PurePath):
        self.file, self.name, self.waiting = file, str(file), []
        self.remove_parts()
        self.size, self.number, self.last = len(file.read_bytes()), 0, time.monotonic()

    def write(self, text: str) -> None:
        """Add a text, in UTF-8."""
        self.waiting.append(text.encode())
        if time.monotonic() - self.last >= PART_EVERY:
            self.flush()

    def flush(self) -> None:
        """Put what was written since the last time."""
        if content := b"".join(self.waiting):
            put(self.file.with_name(f"{self.file.name}.part-{self.size:015}"), content)
            self.size, self.number, self.waiting = self.size + len(content), self.number + 1, []
        self.last = time.monotonic()
        if self.number >= MOST_PARTS:
            self.join()

    def join(self) -> None:
        """Make the parts one object with what is before them."""
        put(self.file, read_appended(self.file))
        self.remove_parts()
        self.number = 0

    def remove_parts(self) -> None:
        """Remove all parts, wherever they begin."""
        with naming(self.file):
            for part in parts(self.file):
                part.unlink(missing_ok=True)

    def close(self) -> None:
        """Put what is left, as one object with the rest."""
        self.flush()
        if self.number:
            self.join()


class Mirror:
    """A scratch folder whose files are copied to an object store by `push`."""

    def __init__(self, place: PurePath):
        self.place, self.last = place, time.monotonic()
        self.kept = tempfile.TemporaryDirectory(prefix="cddistill-mirror-")
        self.folder, self.known = Path(self.kept.name), {}

    def push(self, final: bool = False) -> None:
        """Copy all, unless that was done less than MIRROR_EVERY seconds ago; the last time in any case."""
        if final or time.monotonic() - self.last >= MIRROR_EVERY:
            self.known = upload(self.folder, self.place, last="/", known=self.known)
            self.last = time.monotonic()

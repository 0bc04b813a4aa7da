"""The files below a folder: which there are, and reading all of them."""

import concurrent.futures
import errno
import logging
import os
import time
from pathlib import Path, PurePath

from cddistill import io

PROGRESS_EVERY = 10  # seconds between progress messages
SKIPPED = ("__MACOSX", "@eaDir", "lost+found")  # besides hidden ones: folders of archives, file managers, file systems
CHECKED = 256  # images of a split, evenly spaced, that are read when it is opened; the others when they are used
HICCUPS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN, errno.EAGAIN, errno.EHOSTDOWN}
"""Errors of a disk or a network, not of a file: what is read once more may be there."""
WAITS = (1, 5, 25)  # seconds before reading once more


def data_path(path: str, what: str) -> Path:
    """The folder data.path. Raises ValueError if it is no folder; `what` it should be, "a folder of images"."""
    root = io.local(path)
    if path and root.is_dir():
        return root
    wrong = "is not a folder"
    if path and not root.exists():
        wrong = f"does not exist{'' if root.is_absolute() else f' in {Path.cwd()}'}"
    raise ValueError(f"data.path {path!r} {wrong}; set it to {what}")


def objects_below(root: PurePath) -> dict[str, tuple[int, str]]:
    """{name: (bytes, version)} of the files below a folder on an object store, without hidden ones."""
    return {name: x for name, x in io.versions(root).items() if all(map(visible, name.split("/")))}


def files_below(root: Path) -> list[str]:
    """Paths of all files below root, relative to it, as in "train/a.png".

    Hidden files and folders are left out. Linked folders are followed; a folder that is reached a second time is not
    listed again. Raises ValueError, naming it, for a folder that cannot be listed.
    """
    found, starts, seen = [], [root], set()
    while starts:  # links last, so that files are listed where they really are
        for folder, subfolders, files in os.walk(starts.pop(0), onerror=refuse):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                logging.warning("%s leads to a folder that is listed already: not read again", folder)
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            within = Path(folder).relative_to(root).as_posix()
            found += [name if within == "." else f"{within}/{name}" for name in files if visible(name)]
            known = [Path(folder, name) for name in sorted(subfolders) if visible(name)]
            subfolders[:] = [path.name for path in known if not path.is_symlink()]
            starts += [path for path in known if path.is_symlink()]
    return found


def visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor made by an archiver, a file manager or the file system."""
    return not name.startswith(".") and name not in SKIPPED


def refuse(error: OSError):
    """Say that a folder cannot be listed."""
    raise ValueError(f"{error.filename} cannot be listed ({error.strerror}): change its permissions") from error


def read_all(read, names, what: str, skip_bad: bool) -> dict:
    """{name: read(name)} in threads. Raises ValueError with the first sentences of those that `read` raises.

    With skip_bad such names are left out with a warning. `what` is a plural, as in "images in /data".
    """
    found, bad, last = {}, [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done, (name, result) in enumerate(zip(names, pool.map(attempt(read), names), strict=True), 1):
            if isinstance(result, ValueError):
                bad.append(str(result))
            else:
                found[name] = result
            if time.monotonic() - last > PROGRESS_EVERY:
                logging.warning("checked %d of %d %s", done, len(names), what)
                last = time.monotonic()
    report_bad(bad, f"{len(bad)} of {len(names)} {what} cannot be used", skip_bad)
    return found


def check_some(check, n: int, what: str, skip_bad: bool) -> None:
    """Call check(i) for CHECKED of n positions, evenly spaced: all if there are not more; for the rest see `read_all`.

    Raises ValueError also with skip_bad if all of these are bad.
    """
    some = sorted({i * (n - 1) // max(CHECKED - 1, 1) for i in range(CHECKED)} if n > CHECKED else range(n))
    patient = lambda i: patiently(check, i)
    if not read_all(patient, some, what if n <= CHECKED else f"checked {what} (of {n})", skip_bad):
        raise ValueError(f"none of the {len(some)} checked {what} can be used: see the warnings above")


def is_hiccup(error: Exception) -> bool:
    """Whether an error says nothing of the data: see HICCUPS."""
    return isinstance(error, OSError) and error.errno in HICCUPS


def patiently(read, *args):
    """read(*args), again after WAITS if the disk or the network fails."""
    for wait in WAITS:
        try:
            return read(*args)
        except OSError as error:
            if not is_hiccup(error):
                raise
            logging.warning("%s: reading again in %d s", error, wait)
            time.sleep(wait)
    return read(*args)


def attempt(function):
    """The function, returning a ValueError instead of raising it."""

    def outcome(*args):
        try:
            return function(*args)
        except ValueError as error:
            return error

    return outcome


def report_bad(sentences: list[str], what: str, skip_bad: bool) -> None:
    """Raise ValueError with the first sentences, if there are any; with skip_bad only warn."""
    summary = f"{what}: {'; '.join(sentences[:3])}"
    if sentences and not skip_bad:
        raise ValueError(f"{summary} (data.skip_bad=True skips them)")
    if sentences:
        logging.warning("%s; skipped", summary)

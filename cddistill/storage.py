"""What orbax lacks: a checksum of each array beside the arrays, and folders of any name."""

import json
import logging
import math
import os
import re
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cddistill import checksums, io

ITEM = "checksums"  # the sub-folder of a checkpoint: a file of each host, {"hosts": 1, "sums": {"step": "0f..."}}
METRICS = "metrics/metrics"  # a JSON object
COMMITTED = "commit_success.txt"  # in checkpoints on object stores, as orbax itself writes it there
UNUSUAL = re.compile(r"[][*?\\\udc80-\udcff]")  # the last are bytes that are not UTF-8


class SumsHandler(ocp.AsyncCheckpointHandler):
    """Sums of the arrays of a checkpoint, computed while orbax writes these, and complete when the checkpoint is."""

    async def async_save(self, directory, args):
        arrays = {name: checksums.blocks(x) for name, x in args.arrays.items()}  # before the arrays are donated

        async def write():
            sums = {name: f"{value:016x}" for name, value in checksums.host_sums(arrays).items()}
            content = {"hosts": jax.process_count(), "sums": sums}
            (directory / f"{jax.process_index():05}.json").write_text(json.dumps(content))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name=ITEM)]

    def save(self, directory, args):
        raise NotImplementedError("checksums are written in the background only")

    def restore(self, directory, args):
        return read_sums(directory)


@ocp.args.register_with_handler(SumsHandler, for_save=True, for_restore=True)
class Sums(ocp.args.CheckpointArgs):
    """The arrays of a checkpoint by name."""

    def __init__(self, arrays):
        self.arrays = arrays


def read_sums(folder: PurePath) -> dict[str, int] | None:
    """The sums in a checkpoint's sub-folder ITEM, of all hosts that saved; None if it has none, as older ones.

    Raises OSError if they are damaged or not of all hosts.
    """
    if not folder.is_dir():
        return None
    try:
        parts = [json.loads(path.read_text("utf-8")) for path in folder.iterdir() if path.suffix == ".json"]
        if not parts or {part["hosts"] for part in parts} != {len(parts)}:
            raise OSError(f"it has checksums of {len(parts)} hosts, not of all")
        return {
            name: checksums.total(int(part["sums"].get(name, "0"), 16) for part in parts)
            for name in set().union(*(part["sums"] for part in parts))
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"its checksums cannot be read ({type(error).__name__})") from error


def sums(arrays: dict) -> dict[str, int]:
    """The part of this host in the sum of each array."""
    return checksums.host_sums({name: checksums.blocks(x) for name, x in sorted(arrays.items())})


def agreed(reason: str) -> str:
    """This host's reason, or that another one has one; "" on all hosts or on none."""
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(reason))).any():
        return reason or "another host cannot read it"
    return reason


def difference(expected: dict[str, int], found: dict[str, int]) -> str:
    """What is damaged, in words, or ""; found has each host's part in the sums, of which `expected` are the whole."""
    if jax.process_count() > 1:
        mine = np.array([divmod(x, 2**32) for x in found.values()], np.uint32)  # JAX has no uint64
        halves = multihost_utils.process_allgather(mine).astype(object)  # [hosts, arrays, 2]
        whole = [checksums.total((high << 32) + low for high, low in hosts) for hosts in zip(*halves, strict=True)]
        found = dict(zip(found, whole, strict=True))
    wrong = [name for name, value in found.items() if expected.get(name) != value]
    others = f", and {len(wrong) - 1} more," * bool(wrong[1:])
    return f"it is damaged: the checksum of {wrong[0]}{others} is wrong" if wrong else ""


# ---- metrics, as orbax keeps them


def metric(folder: PurePath, name: str) -> float | None:
    """A metric of the checkpoint in a folder; None if it has none that is a finite number."""
    try:
        value = json.loads((folder / METRICS).read_text("utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def set_aside_metrics(folder: PurePath, name: str | None) -> None:
    """Rename the files of metrics by which a checkpoint cannot be ranked: orbax would not start."""
    if name is not None and jax.process_index() == 0:
        for path in folder.glob(f"*/{METRICS}"):
            if metric(path.parents[1], name) is None:
                logging.warning("%s is damaged: this checkpoint is not ranked", path)
                path.rename(path.with_name("metrics.unreadable"))  # a single file, which stores copy
    if name is not None and jax.process_count() > 1:
        multihost_utils.sync_global_devices("metrics are renamed")


class Place:
    """A folder of checkpoints by a path that orbax can use.

    orbax, etils and tensorstore take some characters for something else: the wildcards of glob, a backslash and bytes
    that are not UTF-8. A folder with such a character in its own path is reached through this process's handle of it
    (on Linux).
    """

    def __init__(self, folder: Path):
        self.folder, self.handle, self.path = folder, None, str(folder)
        if UNUSUAL.search(self.path) and folder.is_dir():
            self.open(folder)

    def open(self, folder: Path) -> None:
        """Hold the folder open, if the system has a path for that."""
        handle = os.open(folder, os.O_RDONLY)
        path = f"/proc/self/fd/{handle}"
        if os.path.isdir(path):
            self.handle, self.path = handle, path
        else:
            os.close(handle)

    def handler(self) -> ocp.PyTreeCheckpointHandler:
        """What writes the arrays of a checkpoint, and reads them."""
        return ocp.PyTreeCheckpointHandler()

    def options(self) -> dict[str, Any]:
        """Options of orbax's manager: none, for a folder that all hosts see."""
        return {}

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return steps(self.folder)

    def check(self) -> None:
        """FileNotFoundError if the folder has been removed."""
        if not self.folder.is_dir():
            raise FileNotFoundError

    def fetch(self, step: int) -> None:
        """Make a checkpoint readable: it is."""

    def put_together(self, step: int) -> None:
        """Make one of what several hosts have written to a checkpoint that was fetched: it is."""

    def publish(self, step: int, manager: ocp.CheckpointManager) -> None:
        """Keep a checkpoint that orbax has begun to write: it does."""

    def wait(self) -> None:
        """Wait until what was published is kept."""

    def forget(self, step: int) -> None:
        """Take note that a checkpoint was renamed."""

    def close(self) -> None:
        """Give the handle back."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def steps(folder: PurePath) -> list[int]:
    """The steps of the complete checkpoints in a folder, which are named after them."""
    names = [p.name for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    whole = lambda name: not io.is_remote(folder) or (folder / name / COMMITTED).exists()
    return sorted(int(name) for name in names if whole(name))

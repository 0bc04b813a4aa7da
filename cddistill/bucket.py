"""Checkpoints on object stores, of any number of hosts: on each, orbax works in a folder of its own, whose files are
copied.

A host copies the arrays, or parts of arrays, that it wrote; the first one also what describes them. It then writes the
file COMMITTED, without which there is no checkpoint, after all hosts have said that theirs are there: what a host that
was killed has left is never read, and is removed before the step is saved again. To read a checkpoint, each host copies
all of it and puts the parts together, whatever the number of hosts that wrote it.
"""

import concurrent.futures
import itertools
import shutil
import tempfile
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cddistill import io, remote, sharding
from cddistill.storage import COMMITTED, ITEM, METRICS, Place

PART = "ocdbt.process_"  # orbax's sub-folders with the arrays of a host, by its number, and what is in each of them
WHOLE = "manifest.ocdbt"  # what is in all of them
DESCRIBED = (METRICS, "_CHECKPOINT_METADATA")  # what ranks a checkpoint
numbers = itertools.count()  # of checkpoints that this process has copied: the same on all hosts


def alone() -> ocp.options.MultiprocessingOptions:
    """This host makes its own folders, and waits for no other: one may be unable to read what others can."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, active_processes={own}, barrier_sync_key_prefix=f"host {own}")


class OwnArrays(ocp.BasePyTreeCheckpointHandler):
    """Arrays of which each host writes its parts to a folder that others do not see."""

    def __init__(self):
        arrays = (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=jax.process_index()))
        numpy = (np.ndarray, ocp.type_handlers.NumpyHandler())  # in which arrays are read without a sharding
        self.kinds = ocp.type_handlers.create_type_handler_registry(arrays, numpy)
        super().__init__(multiprocessing_options=alone(), type_handler_registry=self.kinds)

    def finalize(self, directory) -> None:
        """Nothing: the parts of the others are not here. See `put_together`."""

    def put_together(self, folder: Path) -> None:
        """Make the parts of all hosts, which lie in a folder, readable as one. ValueError if one is missing."""
        super().finalize(epath.Path(folder))


class Bucket(Place):
    """A folder of checkpoints on any object store.

    Of the checkpoints there, the scratch folder has what ranks them until they are read.
    """

    def __init__(self, folder: PurePath):
        self.folder, self.kept = folder, tempfile.TemporaryDirectory(prefix="cddistill-checkpoints-")
        self.path, self.fetched = self.kept.name, set()
        self.pool, self.pending = concurrent.futures.ThreadPoolExecutor(1), []
        there = self.steps()
        sharding.check_alike(lambda: f"{there}", f"the checkpoints in {folder}")
        for step in there:
            self.scratch(step).mkdir()
            remote.download(folder / str(step), self.scratch(step), DESCRIBED.__contains__)

    def handler(self) -> ocp.PyTreeCheckpointHandler:
        if jax.process_count() == 1:
            return super().handler()
        arrays = OwnArrays()
        return ocp.PyTreeCheckpointHandler(
            multiprocessing_options=alone(), type_handler_registry=arrays.kinds, handler_impl=arrays
        )

    def options(self) -> dict[str, Any]:
        if jax.process_count() == 1:
            return super().options()
        own = ocp.AsyncOptions(create_directories_asynchronously=False)  # else a host hears of those of another
        return {"multiprocessing_options": alone(), "async_options": own, "create": False}

    def scratch(self, step: int) -> Path:
        """Where orbax has a checkpoint."""
        return Path(self.path) / str(step)

    def check(self) -> None:
        """A folder on an object store cannot be missed: it is a part of names."""

    def fetch(self, step: int) -> None:
        """Copy a checkpoint to the scratch folder, unless that was done. OSError if it cannot be."""
        if step not in self.fetched:
            remote.download(self.folder / str(step), self.scratch(step))
            self.fetched.add(step)

    def put_together(self, step: int) -> None:
        """Make one of the arrays of several hosts; those of one are. Raises what damaged files make orbax raise."""
        for folder in {part.parent for part in self.scratch(step).glob(f"*/{PART}*")}:
            if not (folder / WHOLE).exists():
                OwnArrays().put_together(folder)

    def publish(self, step: int, manager: ocp.CheckpointManager) -> None:
        """Copy a checkpoint to the store in the background, as soon as orbax has written it."""
        self.pending.append(self.pool.submit(self.copy, step, manager, next(numbers)))

    def copy(self, step: int, manager: ocp.CheckpointManager, number: int) -> None:
        """Copy this host's part of a checkpoint; host 0 first removes what is left of an earlier attempt, and in the
        end commits the checkpoint and deletes those that orbax has deleted."""
        manager.wait_until_finished()
        first, place, scratch = sharding.is_host0(), self.folder / str(step), self.scratch(step)
        if first and remote.objects(place):
            place.rmtree()
        meet(f"checkpoint copy {number} can begin")
        own = {name: stamp for name, stamp in remote.stamps(scratch).items() if first or PART in name or ITEM in name}
        remote.upload(scratch, place, last=COMMITTED, only=own)
        meet(f"checkpoint copy {number} is complete")
        if first:
            remote.put(place / COMMITTED, b"")
            self.remove_old()
        meet(f"checkpoint copy {number} is committed")
        if jax.process_count() == 1:  # else others have parts of it
            self.fetched.add(step)

    def remove_old(self) -> None:
        """Delete the checkpoints that orbax has deleted."""
        for old in self.steps():
            if not self.scratch(old).exists():
                (self.folder / str(old) / COMMITTED).unlink()  # first: the rest is no checkpoint
                (self.folder / str(old)).rmtree()

    def wait(self) -> None:
        """Raises what kept a checkpoint from being copied."""
        while self.pending:
            self.pending.pop(0).result()

    def forget(self, step: int) -> None:
        """Remove a checkpoint from the scratch folder."""
        shutil.rmtree(self.scratch(step), ignore_errors=True)
        self.fetched.discard(step)

    def close(self) -> None:
        """Remove the scratch folder."""
        self.pool.shutdown()
        self.kept.cleanup()


def meet(what: str) -> None:
    """Wait until all hosts are here; in any thread, as no device takes part."""
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=what, timeout_ms=sharding.LONGEST)


def place(folder: PurePath) -> Place:
    """The folder as orbax can use it."""
    return Bucket(folder) if io.is_remote(folder) else Place(folder)

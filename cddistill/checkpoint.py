"""Checkpoints of the training state, and what a run was started with: the config and an example in its workdir."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Collection
from io import BytesIO
from pathlib import PurePath
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as keepers

from cddistill import bucket, data, io, progress, sharding, storage
from cddistill.config import defaults, method_of, plain
from cddistill.data import DataConfig
from cddistill.data.contracts import Source
from cddistill.methods import METHODS
from cddistill.step import TrainState

STATE = "default"  # the sub-folder of a checkpoint with the arrays of the state


class CheckpointMismatch(ValueError):
    """The checkpoint is readable, but its model is not the one that this run trains."""


class Checkpoints:
    """The checkpoints of one run, written in the background: the newest `keep`, and the best one by a metric.

    A checkpoint is a directory named after its step; it gets that name only when it is complete. With `read_only`
    nothing is created, deleted or renamed, so evaluation can use it while a training is running.
    """

    def __init__(self, folder, keep: int = 3, best_metric: str | None = None, best_mode: str = "min", read_only=False):
        if keep < 1 or best_mode not in ("min", "max"):
            raise ValueError(f"keep={keep} must be at least 1, and best_mode={best_mode!r} 'min' or 'max'")
        self.folder = io.absolute(folder)
        if not read_only:
            io.make_folder(self.folder)
            storage.set_aside_metrics(self.folder, best_metric)
        self.place = bucket.place(self.folder)
        self.best_metric, self.best_mode, self.read_only = best_metric, best_mode, read_only
        policy = [keepers.LatestN(keep)]
        rank = None
        if best_metric is not None and not read_only:  # else orbax need not read them
            rank = lambda metrics: metrics[best_metric]
            last = best_mode == "min"  # orbax sorts by the metric and keeps the last, so "min" sorts in reverse
            policy.append(keepers.BestN(get_metric_fn=rank, reverse=last, n=1, keep_checkpoints_without_metrics=False))
        options = dict(
            best_fn=rank,
            best_mode=best_mode,
            preservation_policy=keepers.AnyPreservationPolicy(policy),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            lightweight_initialize=read_only,  # reads no metrics
        )
        options = ocp.CheckpointManagerOptions(**options | self.place.options())
        handlers = {STATE: self.place.handler(), storage.ITEM: storage.SumsHandler()}
        self.manager = ocp.CheckpointManager(self.place.path, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return latest_step(self.folder)

    def best_step(self) -> int | None:
        """The step with the best `best_metric`, None if no checkpoint has one; without a metric the newest step."""
        if self.best_metric is None:
            return self.latest_step()
        sign = 1 if self.best_mode == "max" else -1
        found = {s: storage.metric(self.folder / str(s), self.best_metric) for s in self.manager.all_steps()}
        return max((s for s in found if found[s] is not None), key=lambda s: (sign * found[s], s), default=None)

    def resolve(self, which: str) -> int | None:
        """The step that --checkpoint means: "best", a number, or "latest", which is None (the newest readable one).

        Raises ValueError, naming the steps that there are, for a step without a checkpoint and if none is ranked.
        """
        there = sorted(self.manager.all_steps())
        if which == "latest":
            return None
        if which == "best":
            if self.best_metric is None or self.best_step() is None:
                raise ValueError(f"--checkpoint=best: no checkpoint in {self.folder} is ranked; steps are {there}")
            return self.best_step()
        if not which.isdecimal() or int(which) not in there:
            raise ValueError(f"--checkpoint={which} is neither latest, best nor one of the steps {there}")
        return int(which)

    def last_good(self) -> str:
        """As the function of this name."""
        return last_good(self.folder)

    def save(self, step: int, state: TrainState, *, metrics: dict[str, float] | None = None) -> None:
        """Start to write the state, which may be donated as soon as this returns. An existing step is not overwritten.

        `metrics` are those of an evaluation at this step and rank it. Raises OSError if this save or the one before it
        failed, ValueError if best_metric is not in metrics.
        """
        if metrics is not None and self.best_metric and self.best_metric not in metrics:
            raise ValueError(f"best_metric {self.best_metric!r} is not among the metrics {sorted(metrics)}")
        with self.writing():
            self.place.check()
            self.place.wait()
            if step not in self.manager.all_steps():
                items = {STATE: ocp.args.PyTreeSave(state), storage.ITEM: storage.Sums(by_name(state))}
                self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
                self.place.publish(step, self.manager)

    def wait(self) -> None:
        """Wait until every save is on disk. Raises OSError if one failed."""
        with self.writing():
            self.manager.wait_until_finished()
            self.place.wait()

    def close(self) -> None:
        """Wait, then release orbax's threads."""
        with self.writing():
            self.place.wait()
            self.manager.close()
        self.place.close()

    @contextlib.contextmanager
    def writing(self):
        """Turn a failure to write, here or in orbax's thread, into one OSError that names the last good checkpoint."""
        try:
            yield
        except Exception as error:  # a full disk is an OSError here, and a ValueError from tensorstore's thread
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            number, reason = (errno.ENOSPC, "the disk is full") if full else (errno.EIO, one_line(error))
            if isinstance(error, FileNotFoundError):
                number, reason = errno.ENOENT, "the folder, or a part of it, has been removed"
            message = f"cannot write a checkpoint to {self.folder}: {reason}; the last good one is {self.last_good()}"
            raise OSError(number, message) from error

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The newest readable state, or that of `step`, with the shardings of `abstract`.

        abstract is a TrainState of jax.ShapeDtypeStruct with this run's shardings; those at the time of saving may have
        been others. A checkpoint that cannot be read is renamed with a warning, and the one before it is read instead.
        Raises FileNotFoundError if there is none, OSError if none can be read, and CheckpointMismatch with the
        differences.
        """
        return self.newest(step, lambda s: self.read(s, abstract))

    def nets(self) -> set[str]:
        """Names of the nets in the newest checkpoint with a description; none if there is no such checkpoint."""
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                self.place.fetch(step)
                names = by_name(self.manager.item_metadata(step)[STATE].tree)
            except Exception as error:  # as in `verified`
                logging.warning("checkpoint %s cannot be read (%s)", self.folder / str(step), one_line(error))
            else:
                return {name.split(".")[1] for name in names if name.startswith("nets.")}
        return set()

    def restore_weights(self, abstract: TrainState, names: Collection[str] | None = None, step: int | None = None):
        """As `restore`, but only the nets called `names` (None: all) and their averages, with opt = {}.

        Leaves of `abstract` without a sharding are returned as numpy arrays. Raises ValueError for an unknown name.
        """
        if unknown := set(names or ()) - set(abstract.nets):
            raise ValueError(f"no net is called {min(unknown)!r}; this run trains {', '.join(sorted(abstract.nets))}")
        nets, ema = ({k: v for k, v in d.items() if names is None or k in names} for d in (abstract.nets, abstract.ema))
        weights = abstract.replace(nets=nets, ema=ema, opt={})
        return self.newest(step, lambda s: self.read(s, weights, partial=True))

    def read(self, step: int, abstract: TrainState, partial: bool = False) -> TrainState:
        """The state of one checkpoint; with `partial`, only the nets, averages and optimisers that `abstract` has.

        Raises CheckpointMismatch, or any exception of orbax or tensorstore for damaged files.
        """
        description = self.manager.item_metadata(step)[STATE]
        if description is None:
            raise OSError("its description is missing")
        saved = by_name(description.tree)
        wanted = by_name(abstract)
        if partial:
            roots = {tuple(name.split(".")[:2]) for name in wanted}  # ("nets", "student"), ...
            saved = {name: leaf for name, leaf in saved.items() if tuple(name.split(".")[:2]) in roots}
        check_same(self.folder / str(step), saved, wanted)
        fields = {k: v for k, v in vars(abstract).items() if jax.tree.leaves(v)}  # orbax refuses empty parts
        shardings = ocp.checkpoint_utils.construct_restore_args(fields)
        args = ocp.args.PyTreeRestore(fields, shardings, partial_restore=True)
        return abstract.replace(**self.manager.restore(step, args=ocp.args.Composite(**{STATE: args}))[STATE])

    def newest(self, step: int | None, read: Callable[[int], TrainState]) -> TrainState:
        """read(s) for the newest step s that can be read, or for `step`; see `restore` for the errors."""
        self.wait()
        there = sorted(self.manager.all_steps(), reverse=True)
        if not there or step not in (None, *there):
            others = f"; there are {there}" if there else " yet: train first, or give another --workdir"
            raise FileNotFoundError(f"no checkpoint {'' if step is None else f'{step} '}in {self.folder}{others}")
        reasons = {}
        for s in there if step is None else [step]:
            self.place.fetch(s)
            with progress.counting(f"reading checkpoint {s}", shown=sharding.is_host0()):
                state, reasons[s] = self.verified(s, read)
            if state is not None:
                del reasons[s]
                self.set_aside(reasons, s)
                return state
            said = f"checkpoint {self.folder / str(s)} cannot be read ({reasons[s]})"
            if s == step:
                raise OSError(errno.EIO, f"{said}: choose another --checkpoint of {[s for s in there if s != step]}")
            logging.warning("%s", said)
        raise OSError(errno.EIO, f"no checkpoint in {self.folder} can be read ({reasons}); move it away to start again")

    def verified(self, step: int, read: Callable[[int], TrainState]) -> tuple[TrainState | None, str]:
        """(read(step), "") if its checksums are right, else (None, why not): the same on all hosts."""
        state, expected, found, reason = None, None, {}, ""
        try:
            self.place.put_together(step)
            state = read(step)
            expected = storage.read_sums(self.folder / str(step) / storage.ITEM)
            found = storage.sums(by_name(state)) if expected is not None else {}
        except CheckpointMismatch:
            raise
        except Exception as error:  # damaged files make orbax and tensorstore raise many types
            reason = one_line(error)
        reason = storage.agreed(reason) or storage.difference(expected or {}, found)
        return (None, reason) if reason else (state, "")

    def set_aside(self, steps: Collection[int], good: int) -> None:
        """Rename unreadable checkpoints, so that training can save these steps again; `good` is read instead."""
        if not steps:
            return
        if self.read_only:
            logging.warning("reading %s instead", self.folder / str(good))
            return
        for step in steps:
            if sharding.is_host0():
                io.move(self.folder / str(step), self.folder / f"{step}.unreadable-{time.time_ns()}")
            self.place.forget(step)
        multihost_utils.sync_global_devices("unreadable checkpoints are renamed")
        self.manager.reload()
        logging.warning("renamed the unreadable checkpoints %s; continuing from %s", sorted(steps), self.last_good())


def latest_step(folder: PurePath) -> int | None:
    """The step of the newest complete checkpoint in a folder, which is named after it; None if there is none."""
    return max(storage.steps(folder), default=None)


def last_good(folder: PurePath) -> str:
    """The path of the newest complete checkpoint in a folder, or "none yet", for messages."""
    step = latest_step(folder)
    return "none yet" if step is None else str(folder / str(step))


def one_line(error: Exception) -> str:
    """The start of an error of orbax or tensorstore."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def by_name(tree) -> dict[str, Any]:
    """{"nets.student.params.conv.kernel": leaf}; a state and orbax's description of it have the same names."""

    def part(key):
        return str(next(getattr(key, kind) for kind in ("name", "key", "idx") if hasattr(key, kind)))

    return {".".join(map(part, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_same(path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CheckpointMismatch with the first three differences in name, shape and dtype."""
    differences = []
    for name in sorted(saved | wanted):
        there, here = (f"{t[name].dtype}{list(t[name].shape)}" if name in t else "absent" for t in (saved, wanted))
        if there != here:
            differences.append(f"{name} is {there} in the checkpoint, {here} here")
    if differences:
        first = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if differences[3:] else "")
        raise CheckpointMismatch(f"checkpoint {path} has another model: {first}. Use its config, or another workdir")


# ---- what a run was started with


def write_config(workdir, config: dict[str, Any]) -> None:
    """Record a config (nested dicts) as workdir/config.json, atomically; only host 0 writes."""
    if sharding.is_host0():
        io.write_json(io.path(workdir) / "config.json", config)


def has_steps(workdir) -> bool:
    """Whether a run has saved a checkpoint, readable or not."""
    return any(p.name.partition(".")[0].isdigit() for p in (io.path(workdir) / "checkpoints").glob("*"))


def changed(workdir, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (old, new)} of every value that differs from the config in the workdir; {} if it has none.

    Two texts are one value if they are the same path, one relative and the other absolute, say. An option that is newer
    than the run had its default.
    """
    path = io.path(workdir) / "config.json"
    if not path.exists():
        return {}
    groups = dict.fromkeys(("method", "data", "optim"), dict | None)
    stored = io.read_json(path, "restore it, or use another workdir", **groups)
    new = io.flatten(json.loads(json.dumps(config)))
    old = {key: x for key, x in options_now(stored).items() if key in new} | io.flatten(stored)
    pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old | new)}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b and not same_path(a, b)}


def options_now(stored: dict[str, Any]) -> dict[str, Any]:
    """Every option of a stored config's method with its default, by key; {} for a config of another form."""
    name = method_of(stored)
    return io.flatten(json.loads(json.dumps(plain(defaults(name))))) if name in METHODS else {}


def same_path(a, b) -> bool:
    """Whether two values are texts that name one place."""
    real = [x if "://" in x else os.path.realpath(os.path.expanduser(x)) for x in (a, b) if isinstance(x, str) and x]
    return len(real) == 2 and real[0] == real[1]


def check_config(workdir, config: dict[str, Any], free: Collection[str] = ()) -> None:
    """Raises ValueError with every key whose value differs from the config in the workdir, if it has one.

    The keys in `free`, and the keys below them, may change when a run is resumed: "steps", "parallel", ...
    """
    differences = [
        f"{key}: {old} in the workdir, {new} now"
        for key, (old, new) in changed(workdir, config).items()
        if not any(f"{key}.".startswith(f"{f}.") for f in free)
    ]
    if differences:
        raise ValueError(f"{workdir} holds another run ({'; '.join(differences)}): undo it, or use another workdir")


def write_example(workdir, example: dict[str, Any]) -> None:
    """Keep one example, arrays [1, ...] by name, as workdir/example.npz: see `data_or_example`. Only host 0 writes."""
    if sharding.is_host0():
        file = BytesIO()
        np.savez_compressed(file, **io.flatten(example))
        io.write_atomic(io.path(workdir) / "example.npz", file.getvalue())


@dataclasses.dataclass(frozen=True)
class KeptExample(Source):
    """The example that is kept with a run: it shows shapes and the null text."""

    file: str = ""
    written: int = 0  # when, in ns: another file is another data set

    precomputed = True

    def open(self, config, split):
        return ExampleItems(self.file)


class ExampleItems:
    """One example as a data set."""

    def __init__(self, file: str):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                rows = {name: x[0] for name, x in arrays.items()}
                self.row = flax.traverse_util.unflatten_dict(rows, sep=".")
        except Exception as error:  # numpy raises many types for damaged archives
            raise ValueError(f"{file} is damaged ({error}): give the run's data, or copy the file again") from error

    def __len__(self):
        return 1

    def item(self, i, rng):
        return {"caption": "", "label": np.int32(0)} | self.row


def data_or_example(workdir, config: DataConfig) -> DataConfig:
    """The config if its data can be read, else one whose data is the example that was kept with the run.

    A run can be loaded, sampled and exported where its data is not. Raises the data's own ValueError for runs that
    have kept none.
    """
    file = io.path(workdir) / "example.npz"
    try:
        for split in ("train", "validation"):
            data.load(config, split)
    except ValueError:
        if not file.is_file():
            raise
    else:
        return config
    file = io.local(file)
    kept = KeptExample(str(file.resolve()), file.stat().st_mtime_ns)
    return dataclasses.replace(config, source=kept, path="")

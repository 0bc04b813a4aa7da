"""Checkpoints of the training state, the record of a workdir's config, and leaving in good order when told to."""

import contextlib
import errno
import json
import logging
import signal
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as keepers

from cddistill import sharding
from cddistill.step import TrainState


class CheckpointMismatch(ValueError):
    """The checkpoint is sound, but it is of another model than this run trains."""


class Checkpoints:
    """The checkpoints of one run, written in the background: the newest `keep`, and the best by a metric.

    A checkpoint is a directory named by its step, and gets that name only when it is complete. `read_only` is for
    those who just look: it creates, deletes and renames nothing, and so is safe beside a running training.
    """

    def __init__(self, folder, keep: int = 3, best_metric: str | None = None, best_mode: str = "min", read_only=False):
        if keep < 1 or best_mode not in ("min", "max"):
            raise ValueError(f"keep={keep} must be at least 1, and best_mode={best_mode!r} 'min' or 'max'")
        self.folder = epath.Path(folder).expanduser().resolve()
        self.best_metric, self.read_only = best_metric, read_only
        policy, rank = [keepers.LatestN(keep)], None
        if best_metric is not None:
            rank = lambda metrics: metrics[best_metric]
            last = best_mode == "min"  # orbax keeps the last of the order, so the smallest must come last
            policy.append(keepers.BestN(get_metric_fn=rank, reverse=last, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            best_fn=rank,
            best_mode=best_mode,
            preservation_policy=keepers.AnyPreservationPolicy(policy),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        handler = ocp.PyTreeCheckpointHandler()  # named, so that metadata can be read before anything is saved
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handler)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return max(ocp.utils.checkpoint_steps(self.folder), default=None)

    def best_step(self) -> int | None:
        """The best step by `best_metric`, None if none was ranked; the newest step if there is no metric."""
        return self.manager.best_step()

    def last_good(self) -> str:
        """The path of the newest complete checkpoint, for messages."""
        step = self.latest_step()
        return "none yet" if step is None else str(self.folder / str(step))

    def save(self, step: int, state: TrainState, *, metrics: dict[str, float] | None = None) -> None:
        """Start to write the state, which may be donated as soon as this returns; a step that is there is left alone.

        `metrics`, of an evaluation at this step, rank it. Raises OSError if this save or the one before it failed.
        """
        if metrics is not None and self.best_metric and self.best_metric not in metrics:
            raise ValueError(f"the best checkpoint is chosen by {self.best_metric!r}, not among {sorted(metrics)}")
        with self.writing():
            if step not in self.manager.all_steps():
                self.manager.save(step, args=ocp.args.PyTreeSave(state), metrics=metrics, force=True)

    def wait(self) -> None:
        """Return when all is on disk. Raises OSError if it could not be written."""
        with self.writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release orbax's threads."""
        with self.writing():
            self.manager.close()

    @contextlib.contextmanager
    def writing(self):
        """Turn a failure to write, here or in orbax's thread, into one sentence that says what is left."""
        try:
            yield
        except Exception as error:  # a full disk is an OSError here, and a ValueError from tensorstore's thread
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            number, reason = (errno.ENOSPC, "the disk is full") if full else (errno.EIO, str(error))
            sentence = f"cannot write a checkpoint to {self.folder}: {reason}; the last good one is {self.last_good()}"
            raise OSError(number, sentence) from error

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The newest readable state, or that of `step`, with every leaf placed as `abstract` says.

        abstract: a TrainState of jax.ShapeDtypeStruct with this run's shardings, whatever those at the time of saving.
        A checkpoint that cannot be read is set aside with a warning, and the one before it taken. Raises
        FileNotFoundError if there is none, OSError if none can be read, and CheckpointMismatch naming what differs.
        """
        return self.newest(step, lambda s: self.read(s, abstract))

    def nets(self) -> set[str]:
        """Names of the nets in the newest checkpoint."""
        description = self.manager.item_metadata(self.latest_step())
        return {name.split(".")[1] for name in by_name(description.tree) if name.startswith("nets.")}

    def restore_weights(self, abstract: TrainState, names: Collection[str] | None = None, step: int | None = None):
        """As `restore`, but only the nets and the averages called `names` (None: all), and opt = {}.

        Leaves of `abstract` that name no sharding come back as numpy arrays.
        """
        if unknown := set(names or ()) - set(abstract.nets):
            raise ValueError(f"no net is called {min(unknown)!r}; this run trains {', '.join(sorted(abstract.nets))}")
        nets, ema = ({k: v for k, v in d.items() if names is None or k in names} for d in (abstract.nets, abstract.ema))
        weights = abstract.replace(nets=nets, ema=ema, opt={})
        return self.newest(step, lambda s: self.read(s, weights, partial=True))

    def read(self, step: int, abstract: TrainState, partial: bool = False) -> TrainState:
        """The state of one checkpoint; with `partial`, the nets, averages and optimisers in `abstract` alone."""
        description = self.manager.item_metadata(step)
        if description is None:
            raise OSError("its description is missing")
        saved, wanted = by_name(description.tree), by_name(abstract)
        if partial:
            roots = {tuple(name.split(".")[:2]) for name in wanted}  # ("nets", "student"), ...
            saved = {name: leaf for name, leaf in saved.items() if tuple(name.split(".")[:2]) in roots}
        check_same(self.folder / str(step), saved, wanted)
        fields = {k: v for k, v in vars(abstract).items() if jax.tree.leaves(v)}  # orbax refuses empty parts
        places = ocp.checkpoint_utils.construct_restore_args(fields)
        args = ocp.args.PyTreeRestore(fields, places, partial_restore=True)
        return abstract.replace(**self.manager.restore(step, args=args))

    def newest(self, step: int | None, read: Callable[[int], TrainState]) -> TrainState:
        """What `read` makes of the newest checkpoint that can be read, or of `step`."""
        self.wait()
        there = sorted(self.manager.all_steps(), reverse=True)
        if not there or step not in (None, *there):
            others = f"; there are {there}" if there else " yet: train first, or give another --workdir"
            raise FileNotFoundError(f"no checkpoint {'' if step is None else f'{step} '}in {self.folder}{others}")
        reasons = {}
        for s in there if step is None else [step]:
            try:
                state = read(s)
            except CheckpointMismatch:
                raise
            except Exception as error:  # whatever damage makes orbax or tensorstore raise
                reasons[s] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                logging.warning("checkpoint %s cannot be read (%s)", self.folder / str(s), reasons[s])
            else:
                self.set_aside(reasons)
                return state
        raise OSError(errno.EIO, f"no checkpoint in {self.folder} can be read ({reasons}); move it away to begin anew")

    def set_aside(self, steps: Collection[int]) -> None:
        """Rename unreadable checkpoints, so that training can write these steps again."""
        if self.read_only or not steps:
            return
        if sharding.is_host0():
            for step in steps:
                (self.folder / str(step)).rename(self.folder / f"{step}.unreadable-{time.time_ns()}")
        multihost_utils.sync_global_devices("unreadable checkpoints are renamed")
        self.manager.reload()
        logging.warning("set the unreadable checkpoints %s aside; going on from %s", sorted(steps), self.last_good())


def by_name(tree) -> dict[str, Any]:
    """{"nets.student.params.conv.kernel": leaf}; the same names for a state and for orbax's description of it."""

    def part(key):
        return str(next(getattr(key, kind) for kind in ("name", "key", "idx") if hasattr(key, kind)))

    return {".".join(map(part, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_same(path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise CheckpointMismatch with the first differences in name, shape and dtype."""
    differences = []
    for name in sorted(saved | wanted):
        there, here = (f"{t[name].dtype}{list(t[name].shape)}" if name in t else "absent" for t in (saved, wanted))
        if there != here:
            differences.append(f"{name} is {there} there and {here} here")
    if differences:
        first = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if differences[3:] else "")
        raise CheckpointMismatch(f"checkpoint {path} is of another model: {first}. Use its config, or another workdir")


def write_config(workdir, config: dict[str, Any]) -> None:
    """Record a config (nested dicts) as workdir/config.json, whole or not at all; only host 0 writes."""
    if sharding.is_host0():
        path = epath.Path(workdir) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(config, indent=2) + "\n")
        draft.replace(path)


def check_config(workdir, config: dict[str, Any], free: Collection[str] = ()) -> None:
    """Raise ValueError naming every key whose value differs from the one recorded in the workdir, if one is.

    The keys in `free`, and those below them, may change between restarts: "steps", "parallel", ...
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    old, new = flatten(json.loads(path.read_text())), flatten(json.loads(json.dumps(config)))
    differences = [
        f"{key}: {old.get(key, 'absent')} in the workdir, {new.get(key, 'absent')} now"
        for key in sorted(old | new)
        if old.get(key, "absent") != new.get(key, "absent") and not any(f"{key}.".startswith(f"{f}.") for f in free)
    ]
    if differences:
        raise ValueError(f"{path.parent} holds another run ({'; '.join(differences)}): undo it, or use another workdir")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; lists are values."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class Preemption:
    """`with Preemption() as stop:` turns SIGTERM and Ctrl-C into a request to save and leave; a second one kills.

    With several hosts jax.distributed listens to SIGTERM itself, and all hosts agree on the last step through it.
    """

    def __enter__(self):
        alone = jax.process_count() == 1
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT) if alone}
        return self

    def ask(self, number, frame) -> None:
        """Handle the first signal, and hand the next one to whoever had it before."""
        self.asked = True
        logging.warning("%s: saving a checkpoint, then leaving", signal.Signals(number).name)
        self.__exit__()

    def requested(self, step: int) -> bool:
        """Whether this step is the last one; every host must ask at every step."""
        return self.asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

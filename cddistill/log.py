"""Metrics: read one step late, averaged between logs, written to files, the terminal and Weights & Biases."""

import datetime
import importlib.util
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import rich.console
import rich.progress
import tensorboardX
from clu.metrics import Average

from cddistill import health, io, progress


@runtime_checkable
class MetricWriter(Protocol):
    """The part of clu's writer interface that is used here, so that clu's writers fit too."""

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...
    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None: ...  # NHWC, uint8 or float in [0, 1]
    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonlWriter(MetricWriter):
    """Scalars as lines {"step": 100, "time": 1.7e9, "student/loss": 0.1} of workdir/metrics.jsonl.

    Each line is flushed, so it survives if the process is killed. Resuming from `first_step` drops later records and
    lines that are none, so that the file is the same as without the interruption.
    """

    def __init__(self, workdir, first_step: int = 0):
        path = io.path(workdir) / "metrics.jsonl"
        *lines, last = io.read_appended(path).split(b"\n")
        found = [(line, health.record(line)) for line in [*lines, last] if line]
        if damaged := sum(record is None for line, record in found if line is not last):
            logging.warning("%s has %d damaged lines, which are left out", path, damaged)
        kept = [line + b"\n" for line, record in found if record and record["step"] <= first_step]
        io.write_atomic(path, b"".join(kept))
        self.file = io.append_to(path)

    def write_scalars(self, step, scalars):
        values = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}  # JSON has no NaN
        with io.naming(self.file.name):
            self.file.write(json.dumps({"step": int(step), "time": round(time.time(), 3), **values}) + "\n")

    def flush(self):
        with io.naming(self.file.name):
            self.file.flush()

    def close(self):
        with io.naming(self.file.name):
            self.file.close()


class TensorBoardWriter(MetricWriter):
    """Event files in workdir/tensorboard. Records of an earlier run after `first_step` are hidden."""

    def __init__(self, workdir, first_step: int = 0):
        folder, self.push = io.mirror(io.path(workdir) / "tensorboard")
        self.writer = tensorboardX.SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self.writer.add_scalar(name, float(value), step)

    def write_images(self, step, images):
        for name, image in images.items():
            self.writer.add_images(name, np.asarray(image), step, dataformats="NHWC")

    def flush(self):
        self.writer.flush()
        self.push()

    def close(self):
        self.writer.close()
        self.push(final=True)


class WandbWriter(MetricWriter):
    """A run of Weights & Biases, with the options of the config; its files are in workdir/wandb.

    A workdir has one run, which is resumed with it: records after `first_step` are sent again. WANDB_PROJECT
    ("cddistill" without it), WANDB_MODE=offline and its other variables hold.
    """

    def __init__(self, workdir, options: Mapping[str, Any], first_step: int = 0):
        import wandb

        workdir = io.path(workdir)
        folder, self.push = io.mirror(workdir / "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        name = workdir / "wandb_run.txt"
        if not (first_step and name.is_file()):
            io.write_atomic(name, secrets.token_hex(8))
        project = os.environ.get("WANDB_PROJECT", "cddistill")
        self.image = wandb.Image
        self.run = wandb.init(
            project=project,
            name=workdir.name,
            id=name.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(options),
        )
        self.run.define_metric("*", step_metric="step")  # wandb's own count only goes up

    def write_scalars(self, step, scalars):
        self.run.log({"step": int(step), **{name: float(value) for name, value in scalars.items()}})

    def write_images(self, step, images):
        self.run.log(
            {"step": int(step), **{k: [self.image(np.asarray(x)) for x in rows] for k, rows in images.items()}}
        )

    def flush(self):
        self.push()

    def close(self):
        self.run.finish()
        self.push(final=True)


def check(kind: str) -> None:
    """ValueError if the writer that config.log names cannot work here."""
    if kind != "wandb":
        return
    if not importlib.util.find_spec("wandb"):
        raise ValueError("log=wandb needs Weights & Biases: pip install 'cddistill[wandb]', or set log=tensorboard")
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
        raise ValueError("log=wandb needs a key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline")


class Terminal(MetricWriter):
    """A progress bar with losses, images per second and the time left; without a terminal, a line every `seconds`."""

    def __init__(self, total_steps: int, batch_size: int, first_step: int = 0, console=None, seconds: float = 30.0):
        self.console = console or progress.terminal(sys.stdout)
        self.total = total_steps
        self.batch_size = batch_size
        self.seconds = seconds
        self.start = None  # (step, time) of the first log
        self.printed = -math.inf
        columns = ("{task.completed}/{task.total}", rich.progress.BarColumn(), "{task.description}")
        columns = (*columns, rich.progress.TimeElapsedColumn())  # which moves while the first step compiles
        self.bar = rich.progress.Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("compiling", total=total_steps, completed=first_step)
        self.bar.start()

    def write_scalars(self, step, scalars):
        if not any(name.endswith("/loss") for name in scalars):  # an evaluation
            self.console.print(f"{step}/{self.total}  {words(scalars)}", highlight=False, soft_wrap=True)
            return
        now = time.monotonic()
        self.start = self.start or (step, now)  # after the first log, so that compilation does not count
        speed = (step - self.start[0]) / max(now - self.start[1], 1e-9)
        text = words({k: v for k, v in scalars.items() if k.endswith("/loss")})
        if speed:
            left = datetime.timedelta(seconds=round((self.total - step) / speed))
            text += f"  {speed * self.batch_size:.4g} images/s  {left} left"
        self.bar.update(self.task, completed=step, description=text)
        if not self.console.is_terminal and (now - self.printed >= self.seconds or step >= self.total):
            self.printed = now
            self.console.print(f"{step}/{self.total}  {text}", highlight=False, soft_wrap=True)

    def close(self):
        self.bar.stop()


class HealthWriter(MetricWriter):
    """Prints each alarm of the health rules once. A resumed run first reads the records up to `first_step`."""

    def __init__(self, workdir, console, rules: health.Rules, first_step: int = 0):
        self.console = console
        self.monitor = health.Monitor(rules)
        if first_step:
            for record in health.read(io.joined(io.path(workdir) / "metrics.jsonl")):
                self.monitor.examine(record)

    def write_scalars(self, step, scalars):
        for alarm in self.monitor.examine({"step": step, **scalars}):
            self.console.print(
                f"health: {alarm.name} at step {alarm.step}: {alarm.words}", highlight=False, soft_wrap=True
            )


def words(scalars: dict[str, float]) -> str:
    """Scalars as text: "student/loss 0.1234  critic/loss 5.67"."""
    return "  ".join(f"{name} {float(value):.4g}" for name, value in scalars.items())


class MultiWriter:
    """Several writers as one MetricWriter; without any it writes nothing."""

    def __init__(self, *writers: MetricWriter):
        self.writers = writers

    def __getattr__(self, method: str):
        """Any method of MetricWriter: calls it on each writer, returns None."""
        return lambda *args: [getattr(writer, method)(*args) for writer in self.writers] and None


def make_writer(
    workdir, total_steps: int, batch_size: int, rules: health.Rules, first_step: int = 0, is_host0: bool = True,
    kind: str = "tensorboard", options: Mapping[str, Any] = {},
) -> MultiWriter:  # fmt: skip
    """The writer of a run that starts or resumes at `first_step`; hosts other than host 0 write nothing.

    `kind` is config.log, and `options` are those of the run, for Weights & Biases.
    """
    if not is_host0:
        return MultiWriter()
    files = [JsonlWriter(workdir, first_step)]
    files += [TensorBoardWriter(workdir, first_step)] if kind != "none" else []
    files += [WandbWriter(workdir, options, first_step)] if kind == "wandb" else []
    terminal = Terminal(total_steps, batch_size, first_step)
    return MultiWriter(*files, terminal, HealthWriter(workdir, terminal.console, rules, first_step))


class Delayed:
    """Device metrics as host floats one step late, so that the host never waits for the step in flight."""

    def __init__(self, last_good: Callable[[], str]):
        self.last_good = last_good
        self.pending = None

    def push(self, step: int, metrics: dict[str, jax.Array]) -> tuple[int, dict[str, float]] | None:
        """Takes a step's metrics and returns those of the previous step: (step, floats), or None the first time.

        Raises FloatingPointError with step, metric and the last good checkpoint if one of them is not finite.
        """
        before, self.pending = self.pending, (step, metrics)
        return before and self.read(*before)

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """The metrics of the last step, which `push` has not returned; None if there are none."""
        before, self.pending = self.pending, None
        return before and self.read(*before)

    def read(self, step, metrics):
        """Wait for one step's metrics and check them in alphabetical order, the order of jax dicts."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}; last good checkpoint: {self.last_good()}")
        return step, values


class Means:
    """Means of scalars since the last `take`, each over the steps that logged it: not every step plays every turn."""

    def __init__(self):
        self.averages: dict[str, Average] = {}

    def add(self, scalars: dict[str, float]) -> None:
        """Add one step's scalars."""
        for name, value in scalars.items():
            one = Average(total=np.float64(value), count=np.int64(1))
            self.averages[name] = self.averages[name].merge(one) if name in self.averages else one

    def take(self) -> dict[str, float]:
        """The means by name; the next ones start from here."""
        averages, self.averages = self.averages, {}
        return {name: float(average.compute()) for name, average in averages.items()}

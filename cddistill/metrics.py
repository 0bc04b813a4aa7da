"""Metrics: read one step late, averaged between logs, written to JSONL, TensorBoard and the terminal."""

import datetime
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
import rich.console
import rich.progress
import tensorboardX
from clu.metrics import Average
from etils import epath

from cddistill import health


class MetricWriter(Protocol):
    """The methods of clu's writers, so that one of those fits wherever this is asked for; each may do nothing."""

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...
    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None: ...  # NHWC, uint8 or float in [0, 1]
    def write_texts(self, step: int, texts: dict[str, str]) -> None: ...
    def write_histograms(self, step: int, arrays: dict[str, np.ndarray], num_buckets: dict | None = None) -> None: ...
    def write_hparams(self, hparams: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonlWriter(MetricWriter):
    """Scalars as lines {"step": 100, "time": 1.7e9, "student/loss": 0.1} of workdir/metrics.jsonl.

    A line survives a kill once the call returns. Resuming from `first_step` drops the records after it, and a line
    that a kill tore, so that the file reads as if the run had never stopped.
    """

    def __init__(self, workdir, first_step: int = 0):
        path = epath.Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            draft = path.with_suffix(".tmp")
            draft.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if kept(line, first_step)))
            draft.replace(path)
        self.file = path.open("a")

    def write_scalars(self, step, scalars):
        values = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": int(step), "time": round(time.time(), 3), **values}) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


def kept(line: str, first_step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and not after first_step."""
    try:
        return json.loads(line)["step"] <= first_step
    except (ValueError, KeyError, TypeError):
        return False


class TensorBoardWriter(MetricWriter):
    """Event files under workdir/tensorboard; records after `first_step` of an earlier run are hidden."""

    def __init__(self, workdir, first_step: int = 0):
        folder = str(epath.Path(workdir) / "tensorboard")
        self.writer = tensorboardX.SummaryWriter(folder, purge_step=first_step + 1 if first_step else None)

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self.writer.add_scalar(name, float(value), step)

    def write_images(self, step, images):
        for name, image in images.items():
            self.writer.add_images(name, np.asarray(image), step, dataformats="NHWC")

    def write_texts(self, step, texts):
        for name, text in texts.items():
            self.writer.add_text(name, text, step)

    def write_histograms(self, step, arrays, num_buckets=None):
        for name, array in arrays.items():
            self.writer.add_histogram(name, np.asarray(array), step)

    def write_hparams(self, hparams):
        values = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
        self.writer.add_hparams(values, {}, name="hparams")  # a folder of its own: "." corrupts this writer's file

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class Terminal(MetricWriter):
    """A progress bar with losses, images per second and the time left; off a terminal, a plain line now and then."""

    def __init__(self, total_steps: int, batch_size: int, first_step: int = 0, console=None, seconds: float = 30.0):
        self.console = console or rich.console.Console()
        self.total, self.batch_size, self.seconds = total_steps, batch_size, seconds
        self.start, self.printed = None, -math.inf
        columns = ("{task.completed}/{task.total}", rich.progress.BarColumn(), "{task.description}")
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


class Watch(MetricWriter):
    """Says so on the terminal as soon as the metrics show that a run is ill (see `health`), each thing once."""

    def __init__(self, workdir, console, first_step: int = 0):
        self.console, self.patient = console, health.Patient()
        if first_step:
            for record in health.read(pathlib.Path(workdir) / "metrics.jsonl"):
                self.patient.examine(record)

    def write_scalars(self, step, scalars):
        for alarm in self.patient.examine({"step": step, **scalars}):
            self.console.print(
                f"health: {alarm.name} at step {alarm.step}: {alarm.words}", highlight=False, soft_wrap=True
            )


def words(scalars: dict[str, float]) -> str:
    """ "student/loss 0.1234  critic/loss 5.67"."""
    return "  ".join(f"{name} {float(value):.4g}" for name, value in scalars.items())


class MultiWriter:
    """Several writers as one MetricWriter; of none, silence."""

    def __init__(self, *writers: MetricWriter):
        self.writers = writers

    def __getattr__(self, method: str):
        """Any method of MetricWriter, called on each of the writers."""
        return lambda *args: [getattr(writer, method)(*args) for writer in self.writers] and None


def make_writer(workdir, total_steps: int, batch_size: int, first_step: int = 0, is_host0: bool = True) -> MetricWriter:
    """The writers of a run that starts, or resumes, after `first_step` steps; those of other hosts write nothing."""
    if not is_host0:
        return MultiWriter()
    files = JsonlWriter(workdir, first_step), TensorBoardWriter(workdir, first_step)
    terminal = Terminal(total_steps, batch_size, first_step)
    return MultiWriter(*files, terminal, Watch(workdir, terminal.console, first_step))


class Delayed:
    """Device metrics as host floats one step late, so that the host never waits for the step in flight."""

    def __init__(self, last_good: Callable[[], str]):
        self.last_good, self.pending = last_good, None

    def push(self, step: int, metrics: dict[str, jax.Array]) -> tuple[int, dict[str, float]] | None:
        """Hand in a step's metrics, get those of the step before: (step, floats), or None the first time.

        Raises FloatingPointError, naming step, metric and the last good checkpoint, if one is not finite.
        """
        before, self.pending = self.pending, (step, metrics)
        return before and self.read(*before)

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """The metrics that are still out; None if there are none."""
        before, self.pending = self.pending, None
        return before and self.read(*before)

    def read(self, step, metrics):
        """Wait for one step's metrics and look at them, by name in alphabetical order as jax keeps them."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}; last good checkpoint: {self.last_good()}")
        return step, values


class Means:
    """Means of scalars since the last look; each over the steps that had it, as turns are played at their own rates."""

    def __init__(self):
        self.averages: dict[str, Average] = {}

    def add(self, scalars: dict[str, float]) -> None:
        """Count one step's scalars."""
        for name, value in scalars.items():
            one = Average(total=np.float64(value), count=np.int64(1))
            self.averages[name] = self.averages[name].merge(one) if name in self.averages else one

    def take(self) -> dict[str, float]:
        """The means, and begin again."""
        averages, self.averages = self.averages, {}
        return {name: float(average.compute()) for name, average in averages.items()}

"""Where the time of a training run goes: time per step, waits for data, MFU, and goodput over all restarts.

The loop waits for no step: a thread notes when each one is done on the devices.
"""

import contextlib
import queue
import statistics
import threading
import time
from pathlib import PurePath
from typing import Any, NamedTuple

import jax

from cddistill import devices, io

FILE = "goodput.json"
REMEDY = "delete it: only the goodput of the time before is lost"
EVERY = 10.0  # s between two writes of FILE, besides those at checkpoints
LOSSES = {  # of the devices' time, in the order of the report's table
    "start": "starting: loading, restoring",
    "compile": "compiling",
    "data": "waiting for data",
    "evaluation": "previews while training",
    "checkpoint": "writing checkpoints",
}


class Called(NamedTuple):
    """A train step that the host has started; times are those of time.monotonic, in s."""

    asked: float  # for the batch
    got: float  # it
    called: float  # the compiled program
    elsewhere: float  # s of compiling, previews and checkpoints since the step before
    metrics: Any  # ready when the step is done
    flops: float | None  # of one device


class Done(NamedTuple):
    """A train step as the devices saw it."""

    busy: float  # s in the step
    waited: float  # s before it, with nothing to do because the batch was not there
    gap: float  # s before it with nothing to do, waits included, but not compiling, previews and checkpoints
    flops: float | None


class Clock:
    """The times of one session of a run, which starts or resumes at step `first`, and those of the sessions before.

    `began` is when the session began (time.monotonic). With `writes`, they are kept in workdir/FILE.
    """

    def __init__(self, workdir: PurePath, first: int, began: float, batch_size: int, writes: bool = True):
        self.workdir, self.first, self.batch_size, self.writes = workdir, first, batch_size, writes
        self.past, now = read(workdir), time.monotonic()
        if self.past is None:
            self.past = {"started": time.time() - (now - began), "from_step": first, "steps": 0, "seconds": {}}
        self.seconds = dict.fromkeys(("step", *LOSSES), 0.0) | {"start": now - began}
        self.noted, self.written, self.last = 0, -EVERY, {}
        self.elsewhere, self.asked, self.got, self.called = 0.0, now, now, now
        self.calls, self.news, self.interval = queue.SimpleQueue(), threading.Condition(), []
        self.thread = threading.Thread(target=self.note, args=(now,), daemon=True)
        self.thread.start()
        self.write()

    def next(self, stream):
        """The stream's next batch."""
        self.asked = time.monotonic()
        batch = next(stream)
        self.got = self.called = time.monotonic()
        return batch

    @contextlib.contextmanager
    def spending(self, kind: str):
        """What the block takes is lost to one of LOSSES; no step is in flight in it, unless it is compiling."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.called = time.monotonic()
            with self.news:
                self.seconds[kind] += self.called - start
            self.elsewhere += self.called - start

    def watch(self, metrics, flops: float | None = None) -> None:
        """Note when the step that was just started is done: when its metrics are there. It does not wait."""
        self.calls.put(Called(self.asked, self.got, self.called, self.elsewhere, metrics, flops))
        self.elsewhere = 0.0

    def note(self, last: float) -> None:
        """The thread: wait for one step after the other, the first of which could begin at `last`."""
        for call in iter(self.calls.get, None):
            with contextlib.suppress(Exception):  # the loop raises it
                jax.block_until_ready(call.metrics)
            done = time.monotonic()
            gap = max(call.called - last - call.elsewhere, 0.0)
            waited = min(call.got - call.asked, gap)
            with self.news:
                self.interval.append(Done(done - max(call.called, last), waited, gap, call.flops))
                self.seconds["step"] += self.interval[-1].busy
                self.seconds["data"] += waited
                self.noted += 1
                self.news.notify()
            last = done

    def take(self, step: int) -> dict[str, float]:
        """The times of the steps since the last call, up to `step`, which is done: see docs/performance.md.

        time/mfu only on devices whose peak is known.
        """
        with self.news:
            self.news.wait_for(lambda: self.noted >= step - self.first, timeout=10.0)
            steps, self.interval = self.interval, []
        peak = devices.peak_of(jax.devices()[0].device_kind)
        found = summary(steps, self.batch_size, peak and peak.flops)
        self.last = found | {"time/goodput": goodput(self.times())}
        if time.monotonic() - self.written > EVERY:
            self.write()
        return self.last

    def times(self) -> dict:
        """What FILE holds, as of now: when the run first started, and seconds and steps of all sessions."""
        with self.news:
            seconds = {k: self.past["seconds"].get(k, 0.0) + x for k, x in self.seconds.items()}
            noted = self.noted
        first = min(self.past["from_step"], self.first)
        known = {"started": self.past["started"], "until": time.time(), "from_step": first, "step": self.first + noted}
        return known | {"steps": self.past["steps"] + noted, "seconds": seconds}

    def write(self) -> None:
        """Keep the times, for the next session and the report. A session without a step, after the last, adds none."""
        self.written = time.monotonic()
        if self.writes and (self.noted or not (self.workdir / FILE).is_file()):
            io.write_json(self.workdir / FILE, self.times())

    def close(self) -> None:
        """End the thread, and keep the times."""
        self.calls.put(None)
        self.thread.join()
        self.write()

    def facts(self) -> dict[str, float]:
        """The times of the last logged steps, for the report."""
        words = {"step_ms": "time per step, ms", "images_per_s": "speed, images/s", "mfu": "MFU, %"}
        shares = {"time/mfu": 100.0}
        return {words[k[5:]]: x * shares.get(k, 1.0) for k, x in self.last.items() if k[5:] in words}


class Programs:
    """The train step's programs, each compiled before its first call: that is timed, and their FLOPs are known.

    Called as `sharding.Driver.step`. `accumulate` is the number of micro-batches, which XLA counts once.
    """

    def __init__(self, step, clock: Clock, accumulate: int):
        self.step, self.clock, self.accumulate, self.known = step, clock, accumulate, {}

    def __call__(self, state, frozen, batch, play):
        """(next state, metrics); it does not wait for them."""
        key = play, tuple(x.shape for x in jax.tree.leaves(batch))  # each of data.buckets has its programs
        if key in self.known:
            program, flops = self.known[key]
            state, metrics = program(state, frozen, batch)
        elif hasattr(self.step, "lower"):
            with self.clock.spending("compile"):
                program = self.step.lower(state, frozen, batch, play).compile()
            flops = flops_of(program, self.accumulate)
            self.known[key] = program, flops
            state, metrics = program(state, frozen, batch)
        else:  # pmap compiles when it is called
            with self.clock.spending("compile"):
                state, metrics = self.step(state, frozen, batch, play)
            flops = None
            self.known[key] = (lambda state, frozen, batch: self.step(state, frozen, batch, play)), flops
        self.clock.watch(metrics, flops)
        return state, metrics


def flops_of(program, accumulate: int) -> float | None:
    """FLOPs of a compiled step on one device by XLA's count; None if it gives none. What is in a loop counts once."""
    counted = program.cost_analysis() or {}
    return counted["flops"] * accumulate if counted.get("flops", 0.0) > 0.0 else None


def summary(steps: list[Done], batch_size: int, peak: float | None) -> dict[str, float]:
    """Median time of these steps in ms, the share of waits for data, images/s and, with the peak FLOP/s, MFU."""
    if not steps:
        return {}
    busy = sum(s.busy for s in steps)
    elapsed = max(busy + sum(s.gap for s in steps), 1e-9)
    found = {
        "time/step_ms": 1e3 * statistics.median(s.busy for s in steps),
        "time/data_wait": sum(s.waited for s in steps) / elapsed,
        "time/images_per_s": batch_size * len(steps) / elapsed,
    }
    if peak and all(s.flops for s in steps):
        found["time/mfu"] = sum(s.flops for s in steps) / max(busy, 1e-9) / peak
    return found


# ---- goodput


def read(workdir: PurePath) -> dict | None:
    """What `Clock.write` wrote, None if there is nothing. Raises ValueError if it is damaged."""
    path, number = io.path(workdir) / FILE, int | float
    if not path.is_file():
        return None
    kinds = {"started": number, "until": number, "from_step": int, "step": int, "steps": int, "seconds": dict}
    found = io.read_json(path, REMEDY, **kinds)
    wrong = {k: x for k, x in found["seconds"].items() if type(x) not in (int, float) or not 0 <= x < 1e12}
    if wrong:
        raise ValueError(f"{path} has seconds = {wrong!r:.60}, which are no times: {REMEDY}")
    return found


def kept(times: dict) -> float:
    """Seconds in steps that were kept: all steps, those that were lost and done again being as long as the others."""
    return times["seconds"]["step"] * min(1.0, (times["step"] - times["from_step"]) / max(times["steps"], 1))


def goodput(times: dict) -> float:
    """The share, in [0, 1], of the wall time since the run's first start in steps that were kept."""
    return kept(times) / max(times["until"] - times["started"], 1e-9)


def table(workdir: PurePath) -> list[tuple[str, float, float]]:
    """(what, seconds, share of the wall time) since the run's first start, up to its last step; [] if not known."""
    if (times := read(workdir)) is None:
        return []
    seconds, wall = times["seconds"], max(times["until"] - times["started"], 1e-9)
    rows = {"steps that were kept (goodput)": kept(times), "steps that were done again": seconds["step"] - kept(times)}
    rows |= {words: seconds.get(kind, 0.0) for kind, words in LOSSES.items()}
    rows["not running, or between steps"] = max(wall - sum(rows.values()), 0.0)
    return [(words, x, x / wall) for words, x in rows.items()]

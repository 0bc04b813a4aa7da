"""How far a long piece of work is, on stderr: a bar with the time left, or without a terminal a line now and then."""

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator

import rich.console
import rich.progress

SECONDS = 30.0  # between two lines without a terminal, and before the first
SHORTEST = 1.0  # s that work takes before its bar is shown
TICK = 0.5  # s between two looks at what is due
LONGEST = 359_999.0  # s that are shown as the time left


class Work:
    """Work of `total` parts, of which `done` are done; `what` names it, "encoding train".

    A total of None is not known: the time that has passed is shown instead of the time left.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0, console=None):
        self.console = console or terminal(sys.stderr)
        self.what, self.total, self.done, self.first = what, total, done, done
        self.start = self.printed = time.monotonic()
        self.bar = None

    def advance(self, parts: float = 1) -> None:
        """Count parts that are done."""
        self.done += parts

    def show(self, now: float) -> None:
        """Draw or print what is due at a time.monotonic()."""
        if self.console.is_terminal:
            if self.bar is None and now - self.start >= SHORTEST:
                self.bar = rich.progress.Progress(*columns(self.total), console=self.console, transient=True)
                self.task = self.bar.add_task(self.what, total=self.total, completed=self.first)
                self.bar.start()
            if self.bar is not None:
                self.bar.update(self.task, completed=self.done)
        elif now - self.printed >= SECONDS:
            self.printed = now
            self.console.print(self.line(now), highlight=False, markup=False, soft_wrap=True)

    def line(self, now: float) -> str:
        """What is printed, such as "encoding train 640/1490  0:01:10 left"."""
        passed = now - self.start
        if self.total is None:
            return f"{self.what}  {clock(passed)} so far"
        speed = (self.done - self.first) / max(passed, 1e-9)
        left = f"  {clock(max(self.total - self.done, 0) / speed)} left" if speed else ""
        return f"{self.what} {self.done:.0f}/{self.total}{left}"

    def watch(self, stop: threading.Event) -> None:
        """Show it until it stops."""
        while not stop.wait(TICK):
            self.show(time.monotonic())
        if self.bar is not None:
            self.bar.stop()


def terminal(stream) -> rich.console.Console:
    """A console for sys.stdout or sys.stderr, which has bars if that is a terminal. A notebook's streams say that they
    are one, but would keep every drawing of a bar, so that they get lines."""
    notebook = type(stream).__module__.startswith("ipykernel.")
    return rich.console.Console(file=stream, force_jupyter=False, force_terminal=False if notebook else None)


def columns(total: int | None) -> tuple:
    """Those of the bar."""
    if total is None:
        return "{task.description}", rich.progress.SpinnerColumn(), rich.progress.TimeElapsedColumn()
    counted = rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn()
    return "{task.description}", rich.progress.BarColumn(), *counted


def clock(seconds: float) -> str:
    """Such as 0:01:10."""
    return str(datetime.timedelta(seconds=round(min(seconds, LONGEST))))


@contextlib.contextmanager
def counting(what: str, total: int | None = None, done: int = 0, shown: bool = True) -> Iterator[Callable[..., None]]:
    """advance(parts=1), for a block that does `total` parts of work, of which some are done. Silent if it has no name,
    or is not to be shown.

    Without a total only the time that has passed is shown.
    """
    work, stop, shown = Work(what, total, done), threading.Event(), bool(shown and what)
    thread = threading.Thread(target=work.watch, args=(stop,), daemon=True)
    if shown:
        thread.start()
    try:
        yield work.advance
    finally:
        stop.set()
        if shown:
            thread.join()


def each(what: str, items: Collection, shown: bool = True) -> Iterator:
    """The items; those count that the loop is done with."""
    with counting(what, len(items), shown=shown) as advance:
        for item in items:
            yield item
            advance()


def transfer(advance: Callable[[float], None]):
    """A callback for fsspec's get and put of several files; `advance` counts the MB of all."""
    from fsspec.callbacks import Callback

    class Files(Callback):
        def branched(self, path_1, path_2, **_):
            seen = [0]

            def count(size, value, **_):
                advance((value - seen[0]) / 1e6)
                seen[0] = value

            return Callback(hooks={"bytes": count})

    return Files()

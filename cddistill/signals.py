"""SIGTERM and Ctrl-C: exit status 128 + the signal's number, in training after a checkpoint."""

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

NUMBERS = (signal.SIGINT, signal.SIGTERM)
handled = threading.Event()  # Python has run a handler
ENDING: list[Callable[[], None]] = []  # what remains to be done if the process ends without unwinding
BEHIND: list[Callable[[int], None]] = []  # a handler of SIGTERM in C, which jax.distributed has installed


class Noticed(BaseException):
    """The first signal of a `Preemption`, in a block that may be left for it."""


@contextlib.contextmanager
def at_end(last: Callable[[], None]):
    """Also do `last` if a signal that was not handled in time ends the process within the block."""
    ENDING.append(last)
    try:
        yield
    finally:
        ENDING.remove(last)


def end_quietly() -> None:
    """From now on a signal ends the process at once."""
    for number in NUMBERS:
        signal.signal(number, lambda number, _: os._exit(128 + number))


def catch() -> None:
    """From now on a signal ends the process as `interrupt` says.

    Python runs handlers between two of its instructions, but XLA may compile for many minutes: a signal that has
    not been handled for CDDISTILL_GRACE seconds (25) ends the process, as SIGKILL often follows in 30. Once the
    functions of `atexit` have run, signals are ignored: the work is done, and the system's handler, which Python puts
    back, would say that it is not.
    """
    atexit.register(ignore)
    for number in NUMBERS:
        signal.signal(number, interrupt)
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)  # written to at once, by C
    grace = float(os.environ.get("CDDISTILL_GRACE", "25"))
    threading.Thread(target=insist, args=(arrived, grace), daemon=True).start()


def ignore() -> None:
    """From now on signals have no effect."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def insist(arrived: int, grace: float) -> None:
    """End the process when a signal that arrives through this pipe is not handled in time."""
    while number := os.read(arrived, 1)[0]:
        for theirs in BEHIND * (number == signal.SIGTERM):
            theirs(number)
        if number in NUMBERS and not handled.wait(grace):
            for last in reversed(ENDING):
                with contextlib.suppress(Exception):
                    last()
            os._exit(128 + number)


def stand_before() -> None:
    """Call this after jax.distributed has begun: put the handler of `catch` before the one that it has installed.

    That one makes all hosts stop after the same step, but alone it would let XLA compile on until SIGKILL.
    """
    of_c = ctypes.CDLL(None).signal
    of_c.argtypes, of_c.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    theirs, handler = of_c(signal.SIGTERM, None), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)
    ours = of_c(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, handler)
    if theirs and theirs != ours:
        BEHIND.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs))


def interrupt(number, frame):
    """The handler outside of the training loop: two seconds to tidy up; a second signal ends the process at once."""
    handled.set()
    end_quietly()
    sys.unraisablehook = lambda _: None
    end = threading.Timer(2.0, os._exit, [128 + number])  # where the exception is lost, in a callback of the collector
    end.daemon = True
    end.start()
    raise KeyboardInterrupt(128 + number)


class Preemption:
    """`with Preemption() as stop:` turns SIGTERM and Ctrl-C into a request to save a checkpoint and exit.

    A second signal has its usual effect, which ends the process. With several hosts jax.distributed is told of SIGTERM
    (`stand_before`), and makes all hosts agree on the last step. When the block ends, the handlers are those of before.
    """

    def __enter__(self):
        import jax  # not above: `main` catches signals before slow imports

        self.hosts = jax.process_count()
        self.asked, self.status, self.leaves = False, 128 + signal.SIGTERM, False
        if self.hosts == 1:
            handlers = dict.fromkeys(NUMBERS, self.ask)
        else:
            handlers = {signal.SIGTERM: lambda *_: handled.set()} if BEHIND else {}
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def ask(self, number, frame) -> None:
        """The handler of the first signal; it restores the handlers that were there before."""
        handled.set()
        self.asked, self.status = True, 128 + number
        logging.warning("%s: saving a checkpoint, then exiting", signal.Signals(number).name)
        self.__exit__()
        if self.leaves:
            raise Noticed

    @contextlib.contextmanager
    def leaving(self):
        """The first signal ends the block where it is; what comes after the block goes on."""
        self.leaves = True
        with contextlib.suppress(Noticed):
            yield
        self.leaves = False

    def requested(self, step: int) -> bool:
        """Whether this step is the last one; every host must call this at every step."""
        from jax.experimental import multihost_utils

        return self.asked or (self.hosts > 1 and multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

"""Graceful shutdown of training on SIGTERM and Ctrl-C; outside of the loop `main` ends quietly on Ctrl-C."""

import logging
import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """`with Preemption() as stop:` turns SIGTERM and Ctrl-C into a request to save a checkpoint and exit.

    A second signal has its usual effect, which ends the process. With several hosts jax.distributed handles SIGTERM,
    and makes all hosts agree on the last step.
    """

    def __enter__(self):
        single = jax.process_count() == 1
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT) if single}
        return self

    def ask(self, number, frame) -> None:
        """The handler of the first signal; it restores the handlers that were there before."""
        self.asked = True
        logging.warning("%s: saving a checkpoint, then exiting", signal.Signals(number).name)
        self.__exit__()

    def requested(self, step: int) -> bool:
        """Whether this step is the last one; every host must call this at every step."""
        return self.asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

"""A trace of some train steps, as jax.profiler writes it, for xprof and TensorBoard's profile plugin."""

import contextlib
from pathlib import PurePath

import jax

from cddistill import io


def check(steps: tuple[int, ...], total: int) -> None:
    """Raises ValueError for steps (first, last) that a run of `total` train steps does not have; () is no trace."""
    if steps and not steps[0] <= steps[1] <= total:
        raise ValueError(
            f"profile={','.join(map(str, steps))} must be the first and the last step to trace, at most {total} (steps)"
        )


class Profile:
    """Traces steps (first, last), or () for none, to workdir/profile, but not those before a resumed run's start."""

    def __init__(self, steps: tuple[int, ...], workdir: PurePath):
        self.first, self.last = steps or (1, 0)
        self.place, self.on = io.path(workdir) / "profile", False
        self.folder, self.push = io.mirror(self.place)

    def before(self, step: int):
        """Begin the trace if this step is the first of it. The context is a name for the step in the trace."""
        if not self.on and self.first <= step <= self.last:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would slow the steps, and fill the file
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self.on else contextlib.nullcontext()

    def after(self, step: int, metrics) -> None:
        """End the trace if this step was the last of it, and once it is done."""
        if self.on and step >= self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End the trace, if it has begun."""
        if self.on:
            self.on = False
            jax.profiler.stop_trace()
            self.push(final=True)
            print(f"profile of steps {self.first} to {self.last}: {self.place} (view it with xprof)", flush=True)

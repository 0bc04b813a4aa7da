"""One of several processes that save checkpoints, or read them: `python bucket_hosts.py FOLDER save LAST` or
`... check`. test_bucket.py starts them. What step k saves is a function of k, of arrays that are sharded, copied to
every device, or small. `check` prints the step that was read."""

import contextlib
import functools
import sys

import jax
import numpy as np

from cddistill import io, sharding
from cddistill.checkpoint import Checkpoints
from cddistill.step import TrainState

SHAPES = {"sharded": (64, 1024), "copied": (3, 50_001), "small": (7,), "number": ()}  # the second is no multiple of 4


def state(step: int) -> TrainState:
    """On all devices, over which the large array is sharded."""
    mesh = sharding.make_mesh(-1)
    values = {name: np.full(shape, step + 0.5, np.float32) for name, shape in SHAPES.items()}
    values = {name: x + np.arange(x.size, dtype=np.float32).reshape(x.shape) / 7 for name, x in values.items()}
    whole = TrainState(step=np.int32(step), nets={"student": values}, ema={"student": values}, opt={})
    return sharding.put(whole, sharding.by_shape(mesh, whole, 2**15))


def abstract() -> TrainState:
    """The shapes and shardings of `state`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def check(step: int, found: TrainState) -> None:
    """Every part of every array that this process has is that of the step."""
    for x, expected in zip(jax.tree.leaves(found), jax.tree.leaves(state(step)), strict=True):
        for a, b in zip(x.addressable_shards, expected.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)


def main(folder, mode, last=0):
    with contextlib.closing(Checkpoints(folder, keep=2, best_metric="val/x", read_only=mode == "check")) as checkpoints:
        step = checkpoints.latest_step() or 0
        if step:
            found = checkpoints.restore(abstract())
            step = int(found.step)
            check(step, found)
            print(f"READ {step}", flush=True)
        for k in range(step + 1, int(last) + 1):
            checkpoints.save(k, state(k), metrics={"val/x": float(k != 2)})
        checkpoints.wait()


if __name__ == "__main__":
    jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=5)
    sharding.initialize()
    main(io.path(sys.argv[1]), *sys.argv[2:])
    sharding.wait_for_others()

"""One of two processes of four devices that train together: `python two_hosts.py METHOD`. test_sharding.py starts both
and sets their environment; host 0 prints the losses and the sum of absolute weights, and ends later than host 1."""

import functools
import sys
import time

import jax
import numpy as np
import tiny
from jax.experimental import multihost_utils

from cddistill import sharding
from cddistill.step import active

jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=1)
sharding.initialize()
assert (jax.process_count(), jax.device_count()) == (2, 8)
name, rows = sys.argv[1], sharding.local_rows(16)
d, turns = tiny.driver(name), tiny.parts(name)[1]
state, held = d.put_state(tiny.start(name)), d.put_frozen(tiny.frozen())
for i in range(3):
    batch = jax.tree.map(lambda x: x[rows], tiny.make_batch(i))
    state, metrics = d.step(state, held, d.put_batch(batch), active(turns, i))
    if sharding.is_host0():
        print("LOSS", float(metrics[f"{[*turns][-1]}/loss"]), flush=True)
total = sum(float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(state.nets))
multihost_utils.sync_global_devices("trained")
if sharding.is_host0():
    print("WEIGHTS", total, flush=True)
    time.sleep(4)  # as if it wrote a report; longer than the shutdown waits, which ends both processes
sharding.wait_for_others()

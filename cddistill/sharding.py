"""Devices and hosts: mesh, shardings, and the step under jit or pmap. Losses and models import nothing from here."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import flax.jax_utils
import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cddistill import reduction

LONGEST = 7 * 24 * 3600 * 1000  # ms that hosts wait for the others at the end; of one that is gone they learn earlier

# XLA's schedule for CPUs starts all that it can at once, and holds what every layer makes of its weights. Compilers for
# accelerators save memory, as this does; in two cases a step took 0.95 and 0.99 of the time, too.
IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def initialize(training: bool = True) -> None:
    """Connect to the other hosts of the run, if there are any. In training they will agree on the step to stop at when
    one of them gets SIGTERM (`signals.Preemption`); otherwise its handler stays.

    The environment variables CDDISTILL_COORDINATOR (address), CDDISTILL_PROCESSES (number of hosts) and
    CDDISTILL_PROCESS_ID (number of this host) describe the run; CDDISTILL_COORDINATOR="auto" reads all three from the
    cluster (Cloud TPU, Slurm). A single process sets none.
    """
    coordinator = os.environ.get("CDDISTILL_COORDINATOR")
    jax.config.update("jax_enable_preemption_service", training)
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        processes = int(os.environ["CDDISTILL_PROCESSES"])
        index = int(os.environ["CDDISTILL_PROCESS_ID"])
        jax.distributed.initialize(coordinator, processes, index)


def check_devices() -> None:
    """ValueError if JAX_PLATFORMS asks for devices that are not there; JAX's own error is a traceback."""
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if not asked:
            raise
        why = f" ({str(error).partition(' (set JAX')[0]})" if str(error) else ""
        raise ValueError(
            f"JAX_PLATFORMS={asked} asks for devices that JAX cannot use here{why}: unset it to use those that there "
            "are, or install what they need, such as pip install 'cddistill[gpu]'"
        ) from error


def wait_for_others() -> None:
    """The end of a mode on every host. One that ended its process earlier would wait in the shutdown of
    jax.distributed, which ends all others after five minutes."""
    if os.environ.get("CDDISTILL_COORDINATOR"):
        from orbax.checkpoint import multihost  # not above: it takes a second

        multihost.get_barrier_sync_fn()(key="the mode has ended", timeout_ms=LONGEST)


def is_host0() -> bool:
    """Whether this is the process that writes the run's files."""
    return jax.process_index() == 0


def make_mesh(fsdp: int = 1, devices=None) -> Mesh:
    """A ("data", "fsdp") mesh of `devices` (default: all). Batches are sharded over both axes, weights over "fsdp".

    fsdp is the size of that axis; -1 = all devices. Raises ValueError if it does not divide their number.
    """
    total = len(devices or jax.devices())
    fsdp = total if fsdp == -1 else fsdp
    if total % fsdp:
        raise ValueError(f"fsdp={fsdp} does not divide the {total} devices of this run")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((total // fsdp, fsdp), ("data", "fsdp"), devices=devices, axis_types=kinds)


def local_rows(batch_size: int, accumulate: int = 1) -> slice:
    """The rows of the global batch that this host loads.

    Raises ValueError if batch_size is not divisible by devices x micro-batches.
    """
    devices, hosts = jax.device_count(), jax.process_count()
    if batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {devices} devices x {accumulate} micro-batches; "
            f"use {max(batch_size // (devices * accumulate), 1) * devices * accumulate}"
        )
    rows = batch_size // hosts
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def share(n: int) -> np.ndarray:
    """This host's share of 0 ... n - 1, in order; the last number repeats, so that all hosts have equally many."""
    each = -(-n // jax.process_count())
    return np.minimum(np.arange(each) + jax.process_index() * each, n - 1)


def gathered(shares, n: int):
    """Arrays with a row for each of n numbers, from those of every host's `share`; equal on all hosts, which must call
    this together. Of several hosts 64-bit numbers become 32-bit ones."""
    if jax.process_count() == 1:
        return shares
    return jax.tree.map(lambda x: np.asarray(x)[:n], multihost_utils.process_allgather(shares, tiled=True))


def check_alike(text: Callable[[], str], what: str) -> None:
    """Raise ValueError, on every host, if the hosts of the run have different texts; `what` they are of, a plural."""
    if jax.process_count() > 1:
        mine = np.frombuffer(hashlib.sha256(text().encode()).digest()[:8], np.uint32)
        others = multihost_utils.process_allgather(mine)
        if odd := [host for host, other in enumerate(others) if (other != others[0]).any()]:
            raise ValueError(f"{what} of host {odd[0]} are others than those of host 0: give each host the same")


def replicated(mesh):
    """The sharding with a copy on every device."""
    return NamedSharding(mesh, P())


def by_row(mesh):
    """The sharding of batches: the leading axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def by_shape(mesh, tree, min_elements: int = 2**18):
    """Shardings of a tree by shape, so that models carry no annotations.

    Arrays of at least min_elements are sharded along the largest axis that the size of "fsdp" divides; the others are
    replicated.
    """
    n = mesh.shape["fsdp"]

    def rule(x):
        axes = [i for i in np.argsort(x.shape, kind="stable")[::-1] if x.shape[i] % n == 0]
        if n == 1 or x.size < min_elements or not axes:
            return replicated(mesh)
        return NamedSharding(mesh, P(*("fsdp" if i == axes[0] else None for i in range(x.ndim))))

    return jax.tree.map(rule, tree)


def laid_out(tree, layout):
    """The shapes of a tree with the shardings `layout`, as jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


class Driver(NamedTuple):
    """How one pure step runs on the devices. Every function takes and returns pytrees."""

    put_state: Callable  # host or device arrays -> arrays sharded or replicated for training
    put_frozen: Callable  # the same for frozen nets
    put_batch: Callable  # this host's rows -> the global batch
    step: Callable  # (state, frozen, batch, play) -> (state, metrics); donates the state
    get_state: Callable  # the state in training -> global arrays on the mesh, for checkpoints and sampling
    by_row: Callable  # f(frozen, batch, number), pure, to arrays by row -> the same, compiled; it does not wait


def inside(mesh, f, reduce_dtype: str = "same"):
    """f, to be jitted, traced under the abstract mesh: kernels that GSPMD cannot partition use shard_map over it.

    On a mesh that shards weights, what every layer of a network returns is kept sharded by row. With reduce_dtype
    "float32" the weights' gradients are summed over devices in float32: see `reduction`.
    """
    interceptors = [keep_rows(mesh)] * (mesh.shape["fsdp"] > 1)
    interceptors += [reduction.in_float32] * (reduce_dtype == "float32")

    @functools.wraps(f)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), contextlib.ExitStack() as stack:
            for interceptor in interceptors:
                stack.enter_context(nn.intercept_methods(interceptor))
            return f(*args)

    return traced


def keep_rows(mesh):
    """An interceptor of Flax's module calls. GSPMD otherwise lets activations follow the shards of the weights, and
    gathers them: many times the weights' bytes, instead of gathering the weights.
    """

    def pin(x):
        whole = isinstance(x, jax.Array) and x.ndim > 1 and x.shape[0] and x.shape[0] % mesh.size == 0
        return jax.lax.with_sharding_constraint(x, by_row(mesh)) if whole else x

    def call(f, args, kwargs, context):
        out = f(*args, **kwargs)
        return jax.tree.map(pin, out) if context.method_name == "__call__" else out

    return call


def jit_driver(step: Callable, mesh: Mesh, state, min_elements: int = 2**18, reduce_dtype: str = "same") -> Driver:
    """`jax.jit` over the mesh, the default. Only the shapes of `state` are used."""
    layout = by_shape(mesh, state, min_elements)
    compiled = jax.jit(
        inside(mesh, step, reduce_dtype),
        static_argnums=3,
        donate_argnums=0,
        out_shardings=(layout, replicated(mesh)),
        compiler_options=IN_ORDER if mesh.devices.flat[0].platform == "cpu" else None,
    )
    return Driver(
        put_state=lambda tree: put(tree, layout),
        put_frozen=lambda tree: put(tree, by_shape(mesh, tree, min_elements)),
        put_batch=functools.partial(put_rows, mesh),
        step=compiled,
        get_state=lambda tree: tree,
        by_row=lambda f: jax.jit(inside(mesh, f), out_shardings=by_row(mesh)),
    )


def pmap_driver(step: Callable, mesh: Mesh) -> Driver:
    """`jax.pmap` with replicated weights; `step` must average over the axis "devices"."""
    n = jax.local_device_count()
    parallel = jax.pmap(step, axis_name="devices", static_broadcasted_argnums=3, donate_argnums=0)

    def play(state, frozen, batch, turns):
        state, metrics = parallel(state, frozen, batch, turns)
        return state, jax.tree.map(lambda x: x.addressable_shards[0].data[0], metrics)  # does not wait for the step

    def stack(tree):
        return flax.jax_utils.replicate(jax.tree.map(np.asarray, tree))

    return Driver(
        put_state=stack,
        put_frozen=stack,
        put_batch=lambda batch: jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch),
        step=play,
        get_state=lambda tree: put(jax.tree.map(first, tree), jax.tree.map(lambda _: replicated(mesh), tree)),
        by_row=functools.partial(jax.pmap, in_axes=(0, 0, None)),
    )


def first(x):
    """One copy, as numpy, of an array that pmap replicated."""
    return np.asarray(x.addressable_shards[0].data)[0]


def put(tree, layout):
    """Arrays with the shardings `layout`; every host passes the whole arrays."""

    def place(x, sharding):
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, layout)


def whole(mesh, tree):
    """Arrays on the mesh as numpy, each gathered from all hosts, which must call this together."""
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    return jax.tree.map(lambda x: np.asarray(x if x.is_fully_replicated else gather(x)), tree)


def put_rows(mesh, batch):
    """Global batch arrays from this host's rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_row(mesh), x), batch)


def make_driver(parallel: str, step: Callable, mesh: Mesh, state, reduce_dtype: str = "same") -> Driver:
    """The driver of `step(state, frozen, batch, play, axis=None)` for parallel = "jit" or "pmap". pmap sums whole
    gradients, which are float32 whatever networks compute in, so reduce_dtype changes nothing there.

    Raises ValueError for anything else, and for pmap on a mesh that shards weights.
    """
    if parallel == "jit":
        return jit_driver(step, mesh, state, reduce_dtype=reduce_dtype)
    if parallel != "pmap":
        raise ValueError(f"parallel {parallel!r} is neither 'jit' nor 'pmap'")
    if mesh.shape["fsdp"] != 1:
        raise ValueError("parallel='pmap' replicates the weights: use fsdp=1, or parallel='jit' to shard them")
    return pmap_driver(functools.partial(step, axis="devices"), mesh)

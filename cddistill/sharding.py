"""All that knows about devices and hosts. Losses and models import nothing from here."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import flax.jax_utils
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def initialize() -> None:
    """Join the other hosts of the run: the addresses come from CDDISTILL_COORDINATOR, _PROCESSES and _PROCESS_ID, or,
    when CDDISTILL_COORDINATOR is "auto", from the cluster itself (Cloud TPU, Slurm). A single process needs
    neither."""
    coordinator = os.environ.get("CDDISTILL_COORDINATOR")
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        processes, index = int(os.environ["CDDISTILL_PROCESSES"]), int(os.environ["CDDISTILL_PROCESS_ID"])
        jax.distributed.initialize(coordinator, processes, index)


def is_host0() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def make_mesh(fsdp: int = 1, devices=None) -> Mesh:
    """A ("data", "fsdp") mesh of all devices, or of those given: batches are split over both axes, weights over "fsdp"
    only; -1 = all of them."""
    total = len(devices or jax.devices())
    fsdp = total if fsdp == -1 else fsdp
    if total % fsdp:
        raise ValueError(f"fsdp={fsdp} does not divide the {total} devices of this run")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((total // fsdp, fsdp), ("data", "fsdp"), devices=devices, axis_types=kinds)


def local_rows(batch_size: int, accumulate: int = 1) -> slice:
    """The rows of the global batch that this host loads."""
    devices, hosts = jax.device_count(), jax.process_count()
    if batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {devices} devices x {accumulate} micro-batches; "
            f"the nearest that is: {max(batch_size // (devices * accumulate), 1) * devices * accumulate}"
        )
    rows = batch_size // hosts
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def replicated(mesh):
    """A copy on every device."""
    return NamedSharding(mesh, P())


def by_row(mesh):
    """The leading axis split over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def by_shape(mesh, tree, min_elements: int = 2**18):
    """Shard each large array along its largest axis that "fsdp" divides; replicate the rest. Models carry no
    annotation."""
    n = mesh.shape["fsdp"]

    def rule(x):
        axes = [i for i in np.argsort(x.shape, kind="stable")[::-1] if x.shape[i] % n == 0]
        if n == 1 or x.size < min_elements or not axes:
            return replicated(mesh)
        return NamedSharding(mesh, P(*("fsdp" if i == axes[0] else None for i in range(x.ndim))))

    return jax.tree.map(rule, tree)


class Driver(NamedTuple):
    """How one pure step runs on the devices at hand. Every function takes and returns pytrees."""

    put_state: Callable  # host or device arrays -> where training keeps them
    put_frozen: Callable
    put_batch: Callable  # this host's rows -> the global batch
    step: Callable  # (state, frozen, batch, play) -> (state, metrics); donates the state
    get_state: Callable  # training's arrays -> mesh arrays, one copy, for checkpoints and sampling


def inside(mesh, f):
    """f, to be jitted, traced with the mesh in sight: kernels that GSPMD cannot split are split by hand over it."""

    @functools.wraps(f)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return traced


def jit_driver(step: Callable, mesh: Mesh, state, min_elements: int = 2**18) -> Driver:
    """`jax.jit` over the mesh: the default. `state` gives shapes only."""
    layout = by_shape(mesh, state, min_elements)
    compiled = jax.jit(inside(mesh, step), static_argnums=3, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    return Driver(
        put_state=lambda tree: put(tree, layout),
        put_frozen=lambda tree: put(tree, by_shape(mesh, tree, min_elements)),
        put_batch=functools.partial(put_rows, mesh),
        step=compiled,
        get_state=lambda tree: tree,
    )


def pmap_driver(step: Callable, mesh: Mesh) -> Driver:
    """`jax.pmap`: everything replicated; `step` must average over the axis "devices"."""
    n = jax.local_device_count()
    parallel = jax.pmap(step, axis_name="devices", static_broadcasted_argnums=3, donate_argnums=0)

    def play(state, frozen, batch, turns):
        state, metrics = parallel(state, frozen, batch, turns)
        return state, jax.tree.map(lambda x: x.addressable_shards[0].data[0], metrics)  # without waiting for it

    def stack(tree):
        return flax.jax_utils.replicate(jax.tree.map(np.asarray, tree))

    return Driver(
        put_state=stack,
        put_frozen=stack,
        put_batch=lambda batch: jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch),
        step=play,
        get_state=lambda tree: put(jax.tree.map(first, tree), jax.tree.map(lambda _: replicated(mesh), tree)),
    )


def first(x):
    """One device's copy of an array that pmap replicated."""
    return np.asarray(x.addressable_shards[0].data)[0]


def put(tree, layout):
    """Arrays to their places; each host holds the whole value of what it passes."""

    def place(x, sharding):
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, layout)


def put_rows(mesh, batch):
    """This host's rows -> global arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_row(mesh), x), batch)


def make_driver(parallel: str, step: Callable, mesh: Mesh, state) -> Driver:
    """`step(state, frozen, batch, play, axis=None)` under config.parallel = "jit" or "pmap"."""
    if parallel == "jit":
        return jit_driver(step, mesh, state)
    if parallel != "pmap":
        raise ValueError(f"parallel {parallel!r} is neither 'jit' nor 'pmap'")
    if mesh.shape["fsdp"] != 1:
        raise ValueError("parallel='pmap' replicates the weights: use fsdp=1, or parallel='jit' to shard them")
    return pmap_driver(functools.partial(step, axis="devices"), mesh)

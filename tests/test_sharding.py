"""Devices and hosts: sharding by shape, rows per host, and two real processes that agree with one."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hosts import together
from jax.sharding import PartitionSpec as P

from cddistill import sharding
from cddistill.collectives import collectives

HERE = pathlib.Path(__file__).parent


def test_weights_are_sharded_along_their_largest_divisible_axis():
    mesh = sharding.make_mesh(4)
    tree = {"kernel": jnp.zeros((3, 3, 64, 128)), "odd": jnp.zeros((1023, 513)), "small": jnp.zeros((8, 8))}
    got = sharding.by_shape(mesh, tree, min_elements=4096)
    assert got["kernel"].spec == P(None, None, None, "fsdp")
    assert got["odd"].spec == P()
    assert got["small"].spec == P()
    assert sharding.by_shape(sharding.make_mesh(1), tree)["kernel"].spec == P()


def test_fsdp_shards_weights_and_moments():
    """With fsdp = 8 a device holds an eighth of a large kernel, and of its Adam moments."""
    d = tiny.driver("codi", devices=8, fsdp=8)
    state = d.put_state(tiny.start("codi"))
    kernel = state.nets["backbone"].params["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    moment = state.opt["student"][0].mu["backbone"].params["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert moment.addressable_shards[0].data.size == kernel.size // 8


def test_indivisible_batches_are_refused():
    with pytest.raises(ValueError, match=r"batch_size 12 is not divisible by 8 devices.*8"):
        sharding.local_rows(12)
    with pytest.raises(ValueError, match="2 micro-batches"):
        sharding.local_rows(24, accumulate=2)
    assert sharding.local_rows(24) == slice(0, 24)


def test_impossible_meshes_and_drivers_are_refused():
    with pytest.raises(ValueError, match="fsdp=3 does not divide the 8 devices"):
        sharding.make_mesh(3)
    with pytest.raises(ValueError, match="pmap"):
        sharding.make_driver("pmap", print, sharding.make_mesh(8), None)
    with pytest.raises(ValueError, match="neither"):
        sharding.make_driver("xmap", print, sharding.make_mesh(), None)


# Data and weights cross processes in the same way for every loss: the simplest one shows it.
REPEATED = [pytest.param(name, marks=pytest.mark.slow) for name in ("codi", "dmd2", "dmd2_lora", "d2g", "judge")]


@pytest.mark.parametrize("name", ["diffusion", *REPEATED])
def test_two_processes_of_four_devices_equal_one_of_eight(name):
    """The same losses and weights in real processes. Tolerance as in test_methods: the order of sums."""
    out = together(HERE / "two_hosts.py", name, hosts=2, devices=8)
    said = [line.split() for line in out[0].splitlines() if line.startswith(("LOSS", "WEIGHTS"))]
    state, logs = tiny.run(name, devices=8)
    loss = f"{[*tiny.parts(name)[1]][-1]}/loss"
    np.testing.assert_allclose([float(v) for k, v in said if k == "LOSS"], [x[loss] for x in logs], rtol=2e-4)
    total = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(state.nets))
    np.testing.assert_allclose(float(said[-1][1]), total, rtol=1e-5)


@pytest.mark.parametrize(("fsdp", "each"), [(8, 100), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_collectives_carry_weights_and_no_activations(fsdp, each):
    """Twice the rows, the same bytes, but for a label and its embedding, which come from a sharded table. An activation
    of this network has 2 kB. benchmarks/growth.py has larger networks and meshes."""
    driver, turns = tiny.driver("finetune", fsdp=fsdp), tiny.parts("finetune")[1]
    state, frozen = driver.put_state(tiny.start("finetune")), driver.put_frozen(tiny.frozen())
    moved = []
    for rows in (16, 32):
        batch = driver.put_batch(tiny.make_batch(size=rows))
        program = driver.step.lower(state, frozen, batch, tuple(turns)).compile().as_text()
        moved.append(sum(total for _, total in collectives(program).values()))
    assert sum(x.nbytes for x in jax.tree.leaves(tiny.start("finetune").nets)) < moved[0]
    assert 0 <= moved[1] - moved[0] <= each * 16


def test_hosts_that_differ_are_named(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    hosts = lambda *odd: lambda mine: np.stack([mine + (host in odd) for host in range(3)])
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", hosts())
    sharding.check_alike(lambda: "0f", "names of images")
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", hosts(2))
    with pytest.raises(ValueError, match="names of images of host 2 are others than those of host 0"):
        sharding.check_alike(lambda: "0f", "names of images")


def test_whole_gathers_what_is_sharded_and_keeps_what_is_not():
    mesh = sharding.make_mesh(fsdp=8)
    tree = {"large": np.arange(16.0), "small": np.ones(3)}
    placed = sharding.put(tree, sharding.by_shape(mesh, tree, min_elements=8))
    assert not placed["large"].is_fully_replicated
    found = sharding.whole(mesh, placed)
    assert all(isinstance(x, np.ndarray) for x in found.values())
    jax.tree.map(np.testing.assert_array_equal, found, tree)

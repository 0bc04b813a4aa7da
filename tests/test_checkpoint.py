"""Checkpoints: exact resume, kill -9, other meshes, retention, damage, full disks; the workdir's config; signals."""

import errno
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hosts import together
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cddistill import config, data
from cddistill.checkpoint import (
    CheckpointMismatch,
    Checkpoints,
    changed,
    check_config,
    data_or_example,
    write_config,
    write_example,
)
from cddistill.data import DataConfig, digests
from cddistill.log import JsonlWriter
from cddistill.models.fingerprint import host_sum, leaf_sum
from cddistill.net import Net
from cddistill.signals import Preemption
from cddistill.step import TrainState, init_state


def initial(width=64) -> TrainState:
    """Two nets, one EMA and two optimisers, one of them a chain with empty states."""
    kernel = jnp.arange(64.0 * width).reshape(64, width)
    student = Net({"conv": {"kernel": kernel, "bias": jnp.zeros(width, jnp.bfloat16)}}, jnp.dot)
    fake = Net({"layers": [{"kernel": kernel + 1}, {"kernel": kernel - 1}]}, jnp.dot)
    turns = {"critic": SimpleNamespace(moves=("fake",)), "student": SimpleNamespace(moves=("student",))}
    optimizers = {"critic": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), "student": optax.sgd(0.1)}
    return init_state({"student": student, "fake": fake}, turns, optimizers, {"student": 0.9})


@functools.partial(jax.jit, donate_argnums=0)
def advance(state: TrainState) -> TrainState:
    """A step that depends on all earlier steps and gives the same bits under any sharding."""
    return jax.tree.map(
        lambda x: x // 2 + 1 if x.dtype == jnp.int32 else 0.5 * x + state.step.astype(x.dtype), state
    ).replace(step=state.step + 1)


def run(steps, state=None) -> TrainState:
    state = initial() if state is None else state
    for _ in range(steps):
        state = advance(state)
    return state


def abstract(state, devices=1):
    """Shapes, sharded by rows over the devices where they divide."""
    mesh = Mesh(np.array(jax.devices()[:devices]), "fsdp")

    def place(x):
        rows = x.ndim > 0 and x.shape[0] % devices == 0
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("fsdp") if rows else P()))

    return jax.tree.map(place, state)


def assert_same(a, b):
    """Equal to the last bit, in structure and values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture
def opened(tmp_path):
    """opened(...) makes Checkpoints in the test's folder, closed when the test ends."""
    made = []

    def make(**kwargs):
        made.append(Checkpoints(tmp_path / "checkpoints", **kwargs))
        return made[-1]

    yield make
    for checkpoints in made:
        checkpoints.close()


def saved(checkpoints, *steps):
    """The checkpoints, after saving these steps of `run`."""
    for step in steps:
        checkpoints.save(step, run(step))
    checkpoints.wait()
    return checkpoints


def steps_on_disk(checkpoints):
    return sorted(int(p.name) for p in checkpoints.folder.iterdir() if p.name.isdigit())


def test_resuming_is_bit_exact_when_saved_buffers_are_donated(opened):
    checkpoints = opened()
    state = run(3)
    checkpoints.save(3, state)
    state = run(4, state)  # donates the buffers being written
    checkpoints.save(3, state)  # exists already: ignored
    checkpoints.wait()
    restored = opened().restore(abstract(initial()))
    assert opened().best_step() == 3
    assert_same(restored, run(3))
    assert_same(run(4, restored), state)


@pytest.mark.parametrize("devices", [1, 2])
def test_restoring_on_another_mesh_is_bit_exact(opened, devices):
    layout = jax.tree.map(lambda x: x.sharding, abstract(initial(), devices=4))
    checkpoints = opened()
    checkpoints.save(3, jax.device_put(run(3), layout))
    checkpoints.wait()
    wanted = abstract(initial(), devices)
    restored = opened().restore(wanted)
    assert_same(restored, run(3))
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == want.sharding
    assert len(restored.nets["student"].params["conv"]["kernel"].addressable_shards) == devices


def test_weights_are_restored_without_an_optimiser(opened):
    saved(opened(), 3)
    shapes = jax.eval_shape(initial)
    other = shapes.replace(
        opt={"student": (jax.ShapeDtypeStruct((3,), jnp.float32),)}
    )  # no saved optimiser has this structure
    checkpoints = opened(read_only=True)
    weights = checkpoints.restore_weights(other)
    assert_same(weights, run(3).replace(opt={}))
    assert isinstance(weights.nets["student"].params["conv"]["kernel"], np.ndarray)
    student = checkpoints.restore_weights(abstract(initial()), names=["student"])
    assert student.nets.keys() == student.ema.keys() == {"student"}
    fake = checkpoints.restore_weights(shapes, names=["fake"])
    assert_same(fake.nets["fake"], run(3).nets["fake"])
    assert fake.ema == {}
    with pytest.raises(ValueError, match="no net is called 'disc'; this run trains fake, student"):
        checkpoints.restore_weights(shapes, names=["disc"])


def test_newest_and_best_checkpoints_are_kept(opened):
    checkpoints = opened(keep=2, best_metric="kid")
    kid = {1: 5.0, 2: 1.0, 3: 7.0, 4: None, 5: 3.0}
    for step, value in kid.items():
        checkpoints.save(step, run(step), metrics=value and {"kid": value})
    checkpoints.wait()
    assert steps_on_disk(checkpoints) == [2, 4, 5]
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 2)
    again = opened(keep=1, best_metric="kid")  # a restart remembers what was best
    again.save(6, run(6), metrics={"kid": 0.5})
    again.wait()
    assert steps_on_disk(again) == [6]
    with pytest.raises(ValueError, match=r"best_metric 'kid' is not among the metrics \['fid'\]"):
        again.save(7, run(7), metrics={"fid": 1.0})


def test_best_mode_max_keeps_the_largest_metric(opened):
    checkpoints = opened(keep=1, best_metric="psnr", best_mode="max")
    for step, value in {1: 20.0, 2: 30.0, 3: 25.0}.items():
        checkpoints.save(step, run(step), metrics={"psnr": value})
    checkpoints.wait()
    assert steps_on_disk(checkpoints) == [2, 3]
    assert checkpoints.best_step() == 2


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"null", b'{"kid": "x"}', b'{"kid": null}', b'{"fid": 1}'])
def test_a_checkpoint_whose_metrics_are_damaged_is_not_ranked(opened, content, caplog):
    checkpoints = opened(keep=2, best_metric="kid")
    for step in (1, 2, 3):
        checkpoints.save(step, run(step), metrics={"kid": 3.0 - step})
    checkpoints.wait()
    (checkpoints.folder / "3" / "metrics" / "metrics").write_bytes(content)
    reader = opened(best_metric="kid", read_only=True)
    assert reader.best_step() == 2
    assert int(reader.restore(abstract(initial())).step) in (2, 3)  # orbax reads no checkpoint with metrics like "{"
    again = opened(keep=1, best_metric="kid")
    assert "3/metrics/metrics is damaged: this checkpoint is not ranked" in caplog.text
    again.save(4, run(4))
    again.wait()
    assert (again.best_step(), steps_on_disk(again)) == (2, [2, 4])


def test_missing_checkpoints_are_reported(opened):
    checkpoints = opened()
    assert checkpoints.latest_step() is None
    assert checkpoints.best_step() is None
    assert checkpoints.last_good() == "none yet"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: train first"):
        checkpoints.restore(abstract(initial()))
    checkpoints.save(3, run(3))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 4 in .*there are \[3\]"):
        checkpoints.restore(abstract(initial()), step=4)


def wider(state):
    return initial(width=32)


def without_bias(state):
    conv = {k: v for k, v in state.nets["student"].params["conv"].items() if k != "bias"}
    return state.replace(nets=state.nets | {"student": state.nets["student"].replace(params={"conv": conv})})


def with_disc(state):
    return state.replace(nets=state.nets | {"disc": Net({"kernel": jnp.zeros(3)}, jnp.dot)})


def in_bf16(state):
    return state.replace(ema=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ema))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            wider,
            r"ema.student.params.conv.kernel is float32\[64, 64\] in the checkpoint, float32\[64, 32\] here; "
            r".*and \d+ more",
        ),
        (without_bias, r"nets.student.params.conv.bias is bfloat16\[64\] in the checkpoint, absent here"),
        (with_disc, r"nets.disc.params.kernel is absent in the checkpoint, float32\[3\] here"),
        (in_bf16, r"ema.student.params.conv.kernel is float32\[64, 64\] in the checkpoint, bfloat16\[64, 64\] here"),
    ],
)
def test_restoring_another_model_names_the_difference(opened, other, sentence):
    saved(opened(), 3)
    checkpoints = opened()
    with pytest.raises(CheckpointMismatch, match=sentence):
        checkpoints.restore(abstract(other(initial())))
    with pytest.raises(CheckpointMismatch):
        checkpoints.restore_weights(abstract(other(initial())))
    assert steps_on_disk(checkpoints) == [3]


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut(folder):
    for path in Path(folder).glob("default/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    for path in Path(folder).glob("default/**/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)


def headless(folder):
    (folder / "default/_METADATA").unlink()


@pytest.mark.parametrize("damage", [empty, cut, flip, headless])
def test_unreadable_checkpoint_is_renamed_and_the_previous_one_restored(opened, damage, caplog):
    checkpoints = saved(opened(), 1, 2, 3)
    damage(checkpoints.folder / "3")
    assert_same(opened(read_only=True).restore(abstract(initial())), run(2))
    assert steps_on_disk(checkpoints) == [1, 2, 3]
    again = opened()
    with caplog.at_level(logging.WARNING):
        assert_same(again.restore(abstract(initial())), run(2))
    assert "checkpoints/3 cannot be read" in caplog.text
    assert "continuing from" in caplog.text
    assert steps_on_disk(again) == [1, 2]
    assert list(again.folder.glob("3.unreadable-*"))
    saved(again, 3)
    assert_same(opened().restore(abstract(initial())), run(3))


def flipped(file, moment):
    """Flip one random bit of a file."""
    data = bytearray(file.read_bytes())
    data[moment.randrange(len(data))] ^= 1 << moment.randrange(8)
    file.write_bytes(data)


def test_a_flipped_bit_anywhere_in_a_checkpoint_never_restores_other_weights(opened, caplog):
    """The state is incompressible, so that nothing but the checksums notices most of these."""
    checkpoints, moment = opened(), random.Random(0)
    for step in (1, 2):
        checkpoints.save(step, noise(step))
    checkpoints.wait()
    folder, wrong = checkpoints.folder / "2", 0
    kept = shutil.copytree(folder, folder.parent.parent / "kept")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    large = max(files, key=lambda p: p.stat().st_size)
    reader = opened(read_only=True)
    for file in [large] * 10 + files:
        flipped(file, moment)
        restored = reader.restore(abstract(noise(1)))
        same = np.array_equal(restored.opt["x"], noise(2).opt["x"])
        assert_same(restored, noise(2 if same else 1))
        wrong += "checksum of opt.x is wrong" in caplog.text
        caplog.clear()
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    assert wrong >= 5  # of the ten in the largest file; some hit other arrays


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(opened):
    checkpoints = saved(opened(), 1, 2)
    tamper(checkpoints.folder / "2", "step")
    said = r"2 cannot be read \(it is damaged: the checksum of step is wrong\): choose another --checkpoint of \[1\]"
    with pytest.raises(OSError, match=said):
        checkpoints.restore_weights(abstract(initial()), step=2)
    assert steps_on_disk(checkpoints) == [1, 2]


def tamper(folder, name):
    """Change a recorded checksum."""
    path = folder / "checksums" / "00000.json"
    content = json.loads(path.read_text())
    content["sums"][name] = f"{int(content['sums'][name], 16) ^ 1:016x}"
    path.write_text(json.dumps(content))


def test_a_checkpoint_without_checksums_is_restored_and_one_with_a_part_of_them_is_not(opened):
    checkpoints = saved(opened(), 1, 2, 3)
    shutil.rmtree(checkpoints.folder / "2" / "checksums")  # as those of older versions
    assert_same(checkpoints.restore(abstract(initial()), step=2), run(2))
    path = checkpoints.folder / "3" / "checksums" / "00000.json"
    path.write_text(path.read_text().replace('"hosts": 1', '"hosts": 2'))
    with pytest.raises(OSError, match="it has checksums of 1 hosts, not of all"):
        checkpoints.restore(abstract(initial()), step=3)


def test_no_readable_checkpoint_is_an_error_and_renames_nothing(opened):
    checkpoints = saved(opened(), 1)
    headless(checkpoints.folder / "1")
    with pytest.raises(OSError, match="no checkpoint in .* can be read .*move it away to start again"):
        checkpoints.restore(abstract(initial()))
    assert steps_on_disk(checkpoints) == [1]


CHILD = """
import sys, jax
sys.path.insert(0, sys.argv[2])
from test_checkpoint import Checkpoints, JsonlWriter, abstract, advance, initial
assert jax.device_count() == 1
checkpoints = Checkpoints(sys.argv[1] + "/checkpoints", keep=2)
state = checkpoints.restore(abstract(initial()))
log = JsonlWriter(sys.argv[1], first_step=int(state.step))
while True:
    state = advance(state)
    log.write_scalars(int(state.step), {"student/loss": float(state.step)})
    checkpoints.save(int(state.step), state)
    print(int(state.step), flush=True)
"""


def test_kill_9_loses_at_most_the_save_in_progress(tmp_path, opened):
    """Each child resumes on 1 device (the first save is from 4), saves every step, and is killed at random."""
    layout = jax.tree.map(lambda x: x.sharding, abstract(initial(), devices=4))
    checkpoints = opened()
    checkpoints.save(1, jax.device_put(run(1), layout))
    checkpoints.wait()
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    args = [sys.executable, "-c", CHILD, str(tmp_path), os.path.dirname(__file__)]
    moment = random.Random(0)
    for _ in range(2):
        child = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, text=True)
        printed = [int(child.stdout.readline()) for _ in range(3)]
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=moment.uniform(0.0, 0.3))
        child.kill()
        printed += [int(line) for line in child.communicate()[0].split("\n")[:-1]]

        checkpoints = opened(read_only=True)
        step = checkpoints.latest_step()
        assert step >= printed[-1] - 1  # only the last save can have been in flight
        state = checkpoints.restore(abstract(initial(), devices=4))
        assert int(state.step) == step
        assert_same(state, run(step))
    JsonlWriter(tmp_path, first_step=step).close()
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(2, step + 1))  # no step twice, missing or after the restored one


def noise(step):
    """A state with 60,000 incompressible numbers."""
    return initial().replace(opt={"x": jax.random.normal(jax.random.key(step), (60_000,))})


def test_a_folder_that_was_removed_is_named_by_the_next_save(opened):
    checkpoints = saved(opened(), 1)
    shutil.rmtree(checkpoints.folder)
    with pytest.raises(
        OSError, match=r"cannot write a checkpoint to .*checkpoints: the folder, or a part of it, has be"
    ):
        checkpoints.save(2, run(2))
    assert not checkpoints.folder.exists()


def test_full_disk_is_reported_and_keeps_earlier_checkpoints(small_disk):
    checkpoints = Checkpoints(small_disk / "run")
    sentence = "cannot write a checkpoint to .*run: the disk is full; the last good one is"
    with pytest.raises(OSError, match=sentence) as error:
        [checkpoints.save(step, noise(step)) for step in range(1, 9)]
    assert error.value.errno == errno.ENOSPC
    last = checkpoints.latest_step()
    assert str(error.value).endswith(f"run/{last}")
    checkpoints.close()
    again = Checkpoints(small_disk / "run")  # removes the half-written one
    assert_same(again.restore(abstract(noise(last))), noise(last))
    again.close()
    assert not list(again.folder.glob("*tmp*"))
    assert steps_on_disk(again) == list(range(1, last + 1))[-3:]


def test_background_write_error_is_raised_by_the_next_save(opened, monkeypatch):
    checkpoints = saved(opened(), 1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.manager, "_finalize_checkpoint", fail)
    checkpoints.save(2, run(2))
    with pytest.raises(OSError, match="the disk is full; the last good one is"):
        checkpoints.save(3, run(3))
    monkeypatch.undo()


def test_restarting_with_another_config_names_the_changed_keys(tmp_path):
    config = {"seed": 0, "optim": {"lr": 1e-3, "betas": (0.0, 0.99)}, "method": {"name": "mine"}, "steps": 100}
    check_config(tmp_path / "new", config)  # no recorded config: no error
    write_config(tmp_path, config)
    check_config(tmp_path, config)
    check_config(tmp_path, config | {"steps": 200}, free=("steps",))
    check_config(tmp_path, config | {"method": {"name": "codi"}}, free=("method",))
    with pytest.raises(ValueError, match="steps: 100 in the workdir, 200 now"):
        check_config(tmp_path, config | {"steps": 200}, free=("step", "steps.a"))
    other = {"seed": 0, "optim": {"lr": 0.01, "betas": (0.0, 0.99), "clip": 1.0}, "steps": 200}
    with pytest.raises(ValueError, match="holds another run") as error:
        check_config(tmp_path, other, free=("steps",))
    assert "optim.lr: 0.001 in the workdir, 0.01 now" in str(error.value)
    assert "optim.clip: absent in the workdir, 1.0 now" in str(error.value)
    assert "method.name: mine in the workdir, absent now" in str(error.value)
    assert "steps" not in str(error.value)
    assert "betas" not in str(error.value)


def test_an_option_that_is_newer_than_the_run_had_its_default(tmp_path):
    now = config.plain(config.defaults("codi"))
    then = now | {"data": {k: v for k, v in now["data"].items() if k != "hole"}}
    write_config(tmp_path, then)
    check_config(tmp_path, now)
    with pytest.raises(ValueError, match="data.hole: rectangles in the workdir, brush now"):
        check_config(tmp_path, now | {"data": now["data"] | {"hole": "brush"}})
    write_config(tmp_path, then | {"gone": 1})
    with pytest.raises(ValueError, match="gone: 1 in the workdir, absent now"):
        check_config(tmp_path, now)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("data", "./data", True),
        ("data", "{cwd}/data", True),
        ("{cwd}/data/", "data", True),
        ("~/data", "{home}/data", True),
        ("link", "data", True),
        ("data", "date", False),
        ("", ".", False),
        ("", "{cwd}", False),
        (1, "1", False),
    ],
)
def test_two_ways_to_write_a_path_are_one_value(old, new, same, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    old, new = (x.format(cwd=tmp_path, home=home) if isinstance(x, str) else x for x in (old, new))
    write_config(tmp_path / "run", {"data": {"path": old}})
    assert changed(tmp_path / "run", {"data": {"path": new}}) == ({} if same else {"data.path": (old, new)})


def test_the_fingerprint_of_a_folder_is_that_of_its_copy_and_of_no_other(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "x.npy").write_bytes(bytes(5000))
    (tmp_path / "a" / "sub" / "y.txt").write_text("words")
    of = lambda name: digests.of_path(str(tmp_path / name))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / ".hidden").write_text("")
    assert of("a") == of("b")
    found = [of("a")]
    (tmp_path / "b" / "x.npy").write_bytes(b"1" + bytes(4999))  # content
    found.append(of("b"))
    (tmp_path / "b" / "x.npy").write_bytes(bytes(5001))  # size
    found.append(of("b"))
    (tmp_path / "b" / "sub" / "y.txt").rename(tmp_path / "b" / "y.txt")  # name
    found.append(of("b"))
    assert len({*found, of("a/x.npy")}) == 5
    assert (digests.of_path("cifar10"), digests.of_path("")) == ("cifar10", "")


@pytest.mark.parametrize("shape", [(), (3,), (5, 7, 2), (300, 301), (0, 4)])
def test_weights_have_one_fingerprint_on_a_host_that_has_all_and_on_one_that_has_a_part(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert host_sum(x) == int(leaf_sum(x))
    assert host_sum(jnp.asarray(x, jnp.bfloat16)) == int(leaf_sum(jnp.asarray(x, jnp.bfloat16)))
    if x.size:
        x.reshape(-1)[-1] += 1
        assert host_sum(x) == int(leaf_sum(x))


def test_an_example_stands_for_data_that_is_not_there(tmp_path):
    config = DataConfig(source="folder", path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone"):
        data_or_example(tmp_path, config)
    example = {"x0": np.ones((1, 4, 4, 3), np.float32), "text": {"class_labels": np.array([5], np.int32)}}
    write_example(tmp_path, example)
    kept = data_or_example(tmp_path, config)
    batch = next(data.batches(kept, batch_size=3, seed=0))
    assert batch["x0"].shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(batch["text"]["class_labels"], [5, 5, 5])
    here = DataConfig()
    assert data_or_example(tmp_path, here) is here


def test_config_is_written_atomically(tmp_path, monkeypatch):
    write_config(tmp_path, {"seed": 0})

    def half(path, content):
        path.write_text(content.decode()[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        write_config(tmp_path, {"seed": 1})
    monkeypatch.undo()
    check_config(tmp_path, {"seed": 0})
    write_config(tmp_path, {"seed": 1})
    check_config(tmp_path, {"seed": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_requests_a_stop_and_second_interrupts(number):
    before = signal.signal(number, lambda *_: (_ for _ in ()).throw(InterruptedError))
    try:
        with Preemption() as stop:
            assert not stop.requested(1)
            os.kill(os.getpid(), number)
            assert stop.requested(2)
            assert stop.status == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


HOSTS = """
import sys, jax, numpy as np, logging
sys.path.insert(0, sys.argv[2])
from cddistill import sharding
sharding.initialize()
from test_checkpoint import Checkpoints, abstract, assert_same, initial, noise, tamper
assert (jax.process_count(), jax.device_count()) == (2, 4)
wanted = abstract(noise(1), devices=4)
checkpoints = Checkpoints(sys.argv[1], keep=3)
for step in (1, 2, 3):
    layout = jax.tree.map(lambda x: x.sharding, wanted)
    state = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i]),
                         noise(step), layout)
    checkpoints.save(step, state)
checkpoints.wait()
restored = checkpoints.restore(wanted)
assert len(restored.opt["x"].addressable_shards) == 2
if sharding.is_host0():
    tamper(checkpoints.folder / "3", "opt.x")
    (checkpoints.folder / "2" / "checksums" / "00001.json").write_text("{")
jax.experimental.multihost_utils.sync_global_devices("tampered")
again = Checkpoints(sys.argv[1], keep=3).restore(wanted)
for shard in again.opt["x"].addressable_shards:
    assert (np.asarray(shard.data) == np.asarray(noise(1).opt["x"])[shard.index]).all()
checkpoints.close()
print("SAME", flush=True)
"""


@pytest.mark.slow
def test_two_hosts_agree_on_which_checkpoint_is_damaged(tmp_path):
    args = ("-c", HOSTS, tmp_path, os.path.dirname(__file__))
    out = together(*args, hosts=2, devices=4, timeout=300)
    assert all("SAME" in said and "continuing from" in said for said in out), out

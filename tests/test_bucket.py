"""Checkpoints on object stores, of one host and of several: complete or not there, whatever is killed when."""

import contextlib
import itertools
import json
import pathlib
import time

import bucket_hosts
import jax
import numpy as np
import pytest
import test_object_store
from hosts import start, together
from test_several_hosts import close, places, trained  # noqa: F401  (one is a fixture)

from cddistill import checkpoint, io, remote, storage

pytestmark = test_object_store.needs_servers
proxies, bucket = test_object_store.proxies, test_object_store.bucket  # fixtures
HERE = pathlib.Path(__file__).parent
SCRIPT, DEVICES = HERE / "bucket_hosts.py", 4


def read(hosts, folder, *args):
    """The steps that the hosts have read, which are one. They have compared every part of every array."""
    said = together(SCRIPT, folder, *(args or ["check"]), hosts=hosts, devices=DEVICES, timeout=300)
    found = {int(line.split()[1]) for text in said for line in text.splitlines() if line.startswith("READ ")}
    assert len(found) < 2
    return [*found, None][0]


def opened(folder, **options):
    """The checkpoints of this process."""
    return contextlib.closing(checkpoint.Checkpoints(folder, keep=2, best_metric="val/x", **options))


def save(folder, *steps):
    with opened(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, bucket_hosts.state(step), metrics={"val/x": float(step != 2)})


def read_here(folder):
    """The step that this process reads."""
    with opened(folder, read_only=True) as checkpoints:
        found = checkpoints.restore(bucket_hosts.abstract())
    bucket_hosts.check(int(found.step), found)
    return int(found.step)


def test_what_is_left_of_a_copy_is_not_read_and_is_gone_when_its_step_is_saved_again(bucket, one_device):
    save(bucket, 1, 2)
    assert storage.steps(bucket) == [1, 2]
    (bucket / "2" / storage.COMMITTED).unlink()
    (bucket / "2" / "_CHECKPOINT_METADATA").unlink()
    io.write_atomic(bucket / "2" / "default" / "ocdbt.process_1" / "manifest.ocdbt", b"of a host that was killed")
    assert read_here(bucket) == 1
    save(bucket, 2, 3)
    assert not [name for name in io.sizes(bucket) if "process_1" in name]
    assert read_here(bucket) == 3
    assert storage.steps(bucket) == [2, 3]


def test_a_copy_that_fails_is_one_sentence_and_no_checkpoint(bucket, one_device, monkeypatch):
    save(bucket, 1)
    upload = remote.upload

    def fail(folder, place, **how):
        upload(folder, place, **how | {"only": dict(itertools.islice(how["only"].items(), 3))})
        raise OSError(5, "the store is gone", str(place))

    monkeypatch.setattr(remote, "upload", fail)
    with pytest.raises(OSError, match=r"cannot write a checkpoint to .*the store is gone.*; the last good one is .*/1"):
        save(bucket, 2)
    assert read_here(bucket) == 1


# ---- several hosts


@pytest.mark.slow
def test_each_host_copies_its_own_part_and_any_number_of_hosts_reads_them(bucket, proxies):
    proxies[str(bucket)[:5]].inject(503, 429, 503)
    assert read(2, bucket, "save", 4) is None
    assert storage.steps(bucket) == [2, 3, 4]  # the best one, and the newest two
    names = [name.removeprefix("4/") for name in io.sizes(bucket) if name.startswith("4/")]
    assert "default/manifest.ocdbt" not in names
    for host in (0, 1):
        assert [name for name in names if name.startswith(f"default/ocdbt.process_{host}/d/")]
        assert f"checksums/{host:05}.json" in names
    for hosts in (1, 2, 4):
        assert read(hosts, bucket) == 4
    (bucket / "4" / "default" / "ocdbt.process_1" / "manifest.ocdbt").unlink()  # damaged: the one before it is read
    assert read(2, bucket) == 3
    (bucket / "3" / storage.COMMITTED).unlink()
    assert read(4, bucket, "save", 5) == 2
    assert [name for name in io.sizes(bucket) if name.startswith("4.unreadable-")]
    assert read(1, bucket) == 5


@pytest.mark.slow
def test_nothing_that_was_committed_is_lost_whenever_all_hosts_are_killed(bucket):
    rng, last, hosts = np.random.default_rng(0), 0, itertools.cycle((2, 4, 2, 1))
    for n in itertools.islice(hosts, 4):
        started = start(SCRIPT, bucket, "save", 1000, hosts=n, devices=DEVICES)
        try:
            end = time.monotonic() + 200
            while (checkpoint.latest_step(bucket) or 0) < last + 2 and time.monotonic() < end:
                time.sleep(0.2)
            time.sleep(rng.uniform(0, 2))
            known = checkpoint.latest_step(bucket)
        finally:
            [host.kill() for host in started]
        said = ["".join(host.communicate()) for host in started]
        assert known >= last + 2, "\n".join(text[-2000:] for text in said)
        assert (found := read_here(bucket)) >= known
        last = found


def killed(folder, places, modes):  # noqa: F811
    """Two hosts that work until there is a checkpoint."""
    started = start(HERE / "several_hosts.py", folder, *places, *modes, hosts=2, devices=2, HOME=str(places[1]))
    try:
        end = time.monotonic() + 300
        while checkpoint.latest_step(folder / "run" / "checkpoints") is None and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        [host.kill() for host in started]
    return ["".join(host.communicate()) for host in started]


def logged(run):
    """What a run has logged, without times."""
    lines = map(json.loads, io.read_appended(run / "metrics.jsonl").splitlines())
    return [{name: x for name, x in line.items() if not name.startswith("time")} for line in lines]


@pytest.mark.slow
def test_a_run_of_two_hosts_on_a_store_is_killed_and_resumed_as_a_local_one(bucket, places, tmp_path):  # noqa: F811
    """Bit for bit by two hosts; the metrics, too."""
    args = {"hosts": 2, "devices": 2, "timeout": 400, "HOME": str(places[1])}
    said = killed(bucket, places, ["train"])
    assert checkpoint.latest_step(bucket / "run" / "checkpoints") in (2, 4), "\n".join(x[-3000:] for x in said)
    together(HERE / "several_hosts.py", bucket, *places, "train", "export", **args)
    together(HERE / "several_hosts.py", tmp_path, *places, "train", "export", **args)
    weights = "export/unet/diffusion_pytorch_model.safetensors"
    assert (bucket / weights).read_bytes() == (tmp_path / weights).read_bytes()
    assert logged(bucket / "run") == logged(tmp_path / "run")
    assert not [name for name in io.sizes(bucket / "run") if ".lock" in name]


PARTS = {2: 1, 4: 2, 6: 1}  # the last step of a part of a run: the number of hosts that trains it


def in_parts(folder, places, parts):  # noqa: F811
    """{step: the images that were decoded for it, host after host} of a run whose parts other hosts trained."""
    found = {}
    for steps, hosts in parts.items():
        args = (HERE / "several_hosts.py", folder, *places, f"train:{steps}")
        together(*args, hosts=hosts, devices=2, timeout=400, HOME=str(places[1]))
        own = [io.read_json(folder / f"decoded-{host}.json")[f"train:{steps}"] for host in range(hosts)]
        here = range(max(found, default=-1) + 1, steps)
        found |= {step: sum((numbers[str(step)] for numbers in own), []) for step in here}
    return found


@pytest.fixture(scope="module")
def undisturbed(places, tmp_path_factory):  # noqa: F811
    """(folder, images by step) of local runs: of one host; in parts."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "parts")]
    return [(folder, in_parts(folder, places, x)) for folder, x in zip(folders, ({6: 1}, PARTS), strict=True)]


@pytest.mark.slow
def test_a_run_on_a_store_goes_on_with_another_number_of_hosts(bucket, places, undisturbed):  # noqa: F811
    """One host, then two, then one: the images of every step, the weights and all that is logged are bit for bit those
    of a local run of these hosts; with one host all along, images are the same and weights are to the order of sums."""
    (one, expected), (local, images) = undisturbed
    found = in_parts(bucket, places, PARTS)
    assert found == images == expected
    assert [*found] == [*range(6)]
    assert logged(bucket / "run") == logged(local / "run")
    steps, *weights = trained(places, bucket)
    assert steps == 6
    for folder, compare in ((local, np.testing.assert_array_equal), (one, close)):
        jax.tree.map(compare, [steps, *weights], [*trained(places, folder)])

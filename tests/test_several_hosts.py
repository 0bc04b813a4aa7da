"""Every mode on two hosts, training and pairs also on four, gives what one process with as many devices gives, and no
host reads another's rows. Real processes, so all of it is slow; tests of what each part does are in the parts' files.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_encode
import test_indexed
import test_object_store
from hosts import together
from PIL import Image
from several_hosts import BATCH, ROWS, STEPS, settings

from cddistill import config, data, io
from cddistill.build import build, open_checkpoints
from cddistill.data.ode_pairs import OdePairs

pytestmark = pytest.mark.slow
proxies, bucket = test_object_store.proxies, test_object_store.bucket  # fixtures
HERE = pathlib.Path(__file__).parent
ALL = ("train", "buckets", "evaluate", "sample", "export", "encode", "rows", "pairs")
MODES = {2: ALL, 4: ("train", "pairs")}
all_modes = pytest.mark.parametrize("runs", [2], indirect=True, ids=["2 hosts"])


@pytest.fixture(scope="module")
def places(teacher, tmp_path_factory):
    """A teacher of pixels, one of latents, and pictures in shards."""
    folder = tmp_path_factory.mktemp("places")
    return teacher, test_encode.make_teacher(folder / "vae"), test_indexed.write(folder / "shards")


def run(hosts, devices, folder, places, modes):
    """Run modes in processes that share some devices."""
    args = (HERE / "several_hosts.py", folder, *places, *modes)
    together(*args, hosts=hosts, devices=devices, timeout=1200, HOME=str(places[1]))
    return folder


@pytest.fixture(scope="module", params=MODES, ids=lambda n: f"{n} hosts")
def runs(request, places, tmp_path_factory):
    """(number of hosts, the folder of one process, that of as many hosts as it has devices)."""
    n = request.param
    return n, *(run(hosts, n, tmp_path_factory.mktemp(f"{hosts}-of-{n}"), places, MODES[n]) for hosts in (1, n))


def decoded(folder, n, mode):
    """What each of n hosts has decoded in a mode."""
    return [json.loads((folder / f"decoded-{host}.json").read_text())[mode] for host in range(n)]


def trained(places, folder, mode="train"):
    """The last checkpoint's weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", jax.local_devices)
        experiment = config.resolve(settings(mode, *places, folder))
        checkpoints = open_checkpoints(folder / {"train": "run"}.get(mode, mode), experiment, read_only=True)
        state = checkpoints.restore_weights(build(experiment).abstract)
        checkpoints.close()
    return jax.device_get((state.step, state.nets, state.ema))


def close(a, b):
    """Weights are equal to the order of sums, of gradients over devices."""
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_weights_are_those_of_one_process(runs, places):
    n, one, several = runs
    jax.tree.map(close, *(trained(places, folder) for folder in (several, one)))


def test_no_host_decodes_rows_of_another(runs):
    n, one, several = runs
    (whole,), parts = decoded(one, 1, "train"), decoded(several, n, "train")
    for step in map(str, range(STEPS)):
        rows = [part[step] for part in parts]
        assert [len(x) for x in rows] == [BATCH // n] * n
        assert sum(rows, []) == whole[step]


def test_pairs_are_those_of_one_process_bit_for_bit(runs):
    n, one, several = runs
    check_pairs(several, one)
    (whole, *parts) = (len(sum(x.values(), [])) for x in decoded(one, 1, "pairs") + decoded(several, n, "pairs"))
    assert parts == [whole - ROWS + ROWS // n] * n  # the rest are checks


def check_pairs(several, one):
    """The pairs below two folders are equal."""
    found, expected = (OdePairs(str(folder / "pairs")) for folder in (several, one))
    assert len(found) == len(expected) == ROWS
    for i in range(ROWS):
        jax.tree.map(np.testing.assert_array_equal, found.item(i), expected.item(i))


def check_encoded(several, one):
    """The encoded rows below two folders are equal."""
    for split in ("train", "validation", "test"):
        found, expected = (
            data.load(data.configure(source="arrays", path=str(folder / "encode"), size=8, num_classes=9), split)
            for folder in (several, one)
        )
        assert len(found) == len(expected) > 0
        for i in range(len(found)):
            jax.tree.map(np.testing.assert_array_equal, found.item(i, None), expected.item(i, None))


@all_modes
def test_buckets_are_those_of_one_process(runs, places):
    """Batches of two shapes, each of which all hosts have at the same step."""
    n, one, several = runs
    jax.tree.map(close, *(trained(places, folder, "buckets") for folder in (several, one)))
    (whole,), parts = decoded(one, 1, "buckets"), decoded(several, n, "buckets")
    assert [sum((part[str(k)] for part in parts), []) for k in range(STEPS)] == [whole[str(k)] for k in range(STEPS)]
    experiment = config.resolve(settings("buckets", *places))
    stream = data.batches(experiment.data, batch_size=BATCH, seed=experiment.run.seed)
    assert len({next(stream)["x0"].shape for _ in range(STEPS)}) == 2


@all_modes
def test_encoded_rows_are_those_of_one_process_bit_for_bit(runs):
    n, one, several = runs
    check_encoded(several, one)
    assert io.read_json(one / "encode" / "train" / "manifest.json")["buckets"].keys() == {"16x16", "32x16"}
    whole, *parts = (sum(x.values(), []) for x in decoded(one, 1, "encode") + decoded(several, n, "encode"))
    assert sorted(sum(parts, [])) == sorted(whole)
    assert min(map(len, parts)) >= len(whole) // (2 * n)  # a bucket's last shard is smaller, and its first one host 0's


@all_modes
def test_training_on_encoded_buckets_is_that_of_one_process(runs, places):
    """Of the folder that as many hosts have encoded: the same rows at each step, of two shapes, each read by one."""
    n, one, several = runs
    jax.tree.map(close, *(trained(places, folder, "rows") for folder in (several, one)))
    (whole,), parts = decoded(one, 1, "rows"), decoded(several, n, "rows")
    for step in map(str, range(STEPS)):
        read = [part[step] for part in parts]
        assert [len(x) for x in read] == [BATCH // n] * n
        assert sum(read, []) == whole[step]
    experiment = config.resolve(settings("rows", *places, several))
    stream = data.batches(experiment.data, batch_size=BATCH, seed=experiment.run.seed)
    assert {next(stream)["x0"].shape[1:3] for _ in range(STEPS)} == {(8, 8), (8, 16)}


@all_modes
def test_scores_are_those_of_one_process(runs):
    n, *folders = runs
    one, several = (json.loads((folder / "run" / "scores.json").read_text()) for folder in folders)
    assert one.keys() == several.keys()
    for row in one:
        assert one[row]["n"] == several[row]["n"] == 4
        for column, found in one[row]["metrics"].items():  # null for FD, which needs more images
            value = several[row]["metrics"][column]
            assert (found is None) == (value is None)
            np.testing.assert_allclose(value or 0.0, found or 0.0, rtol=1e-3, err_msg=f"{row} {column}")
    whole, *parts = (
        len(sum(x.values(), [])) for x in decoded(folders[0], 1, "evaluate") + decoded(folders[1], n, "evaluate")
    )
    assert parts == [whole - 4 + 4 // n] * n  # the rest are checks


@all_modes
def test_sampled_images_are_those_of_one_process(runs):
    one, several = (np.asarray(Image.open(folder / "sample.png"), np.int16) for folder in runs[1:])
    assert np.abs(one - several).max() <= 1  # of 255: weights agree to the order of sums


@all_modes
def test_an_export_is_that_of_one_process(runs):
    names = [
        sorted(p.relative_to(folder / "export").as_posix() for p in (folder / "export").rglob("*"))
        for folder in runs[1:]
    ]
    assert names[0] == names[1]
    file = "export/unet/diffusion_pytorch_model.safetensors"
    one, several = (safetensors.numpy.load_file(folder / file) for folder in runs[1:])
    for name, x in one.items():  # float16
        np.testing.assert_allclose(np.float32(several[name]), np.float32(x), rtol=2e-3, atol=1e-5, err_msg=name)


@test_object_store.needs_servers
@all_modes
def test_two_hosts_work_on_shards_pairs_and_encoded_rows_in_a_bucket(runs, places, bucket):
    """They build the index of the shards together, in the bucket, write to it, and train on what they wrote."""
    teacher, vae, shards = places
    for path in shards.glob("*.tar"):
        io.write_atomic(bucket / "shards" / path.name, path.read_bytes())
    run(2, 2, bucket, (teacher, vae, bucket / "shards"), ("encode", "pairs", "rows"))
    assert "shards/.cddistill/index.tar.json" in io.sizes(bucket)
    check_pairs(bucket, runs[1])
    check_encoded(bucket, runs[1])
    jax.tree.map(close, trained(places, bucket, "rows"), trained(places, runs[1], "rows"))

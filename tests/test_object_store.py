"""Paths on object stores, against servers on this machine: operations, faults, and a run that is killed and resumed."""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from io import BytesIO

import jax
import numpy as np
import object_stores
import pytest
import test_indexed
import test_published
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from cddistill import checkpoint, commands, config, data, io, lock, remote, train
from cddistill.build import build, open_checkpoints
from cddistill.data import SOURCES, digests, indexed, loader
from cddistill.data.ode_pairs import OdePairs
from cddistill.data.sources import parquet
from cddistill.evals import grids, published
from cddistill.log import JsonlWriter

PACKAGES = ("gcsfs", "s3fs", "moto", "flask", "gcp_storage_emulator")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
STORES = ("gs://", "s3://")
needs_servers = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -e '.[test-storage]'"
)


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    """Both servers, and clients that wait three seconds for a stalled connection."""

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        found = stack.enter_context(object_stores.served())
        patch.setenv("CDDISTILL_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        patch.setattr(remote, "STALLED", 3.0)
        import fsspec

        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield found


@pytest.fixture(params=STORES)
def bucket(request, proxies):
    """An empty folder on each of the stores."""
    folder = io.path(f"{request.param}bucket/{request.node.name.partition('[')[0]}")
    yield folder
    with contextlib.suppress(FileNotFoundError):
        folder.rmtree()


@needs_servers
def test_an_object_is_written_whole_created_once_and_rewritten_only_if_it_is_there(bucket):
    io.ensure_writable(bucket)
    io.write_json(bucket / "a" / "x.json", {"a": "ä"})
    assert io.read_json(bucket / "a" / "x.json") == {"a": "ä"}
    assert io.size(bucket / "a" / "x.json") == len((bucket / "a" / "x.json").read_bytes())
    assert io.create(bucket / "b", b"1")
    assert not io.create(bucket / "b", b"2")
    assert io.read_changed(bucket / "b")[0] == b"1"
    io.rewrite(bucket / "b", b"3")
    assert (bucket / "b").read_bytes() == b"3"
    (bucket / "b").unlink()
    with pytest.raises(FileNotFoundError):
        io.rewrite(bucket / "b", b"4")
    io.move(bucket / "a", bucket / "c")
    assert [*io.sizes(bucket)] == ["c/x.json"]


@needs_servers
def test_a_precondition_decides_between_two_that_create_at_once(proxies, monkeypatch):
    """On S3: the emulator of GCS knows none, so that there what is read back decides."""
    file = io.path("s3://bucket/precondition")
    io.write_atomic(file, b"theirs")
    monkeypatch.setattr(type(file), "exists", lambda self: False)
    assert not io.create(file, b"mine")
    assert file.read_bytes() == b"theirs"


@needs_servers
def test_a_lock_on_a_store_is_held_once_and_taken_over_from_the_dead(bucket, monkeypatch):
    with (
        lock.held(bucket),
        pytest.raises(lock.InUse, match=f"{bucket} is in use by process {os.getpid()}"),
        lock.held(bucket),
    ):
        pass
    assert not (bucket / ".lock").exists()
    gone = json.loads(lock.content("gone")) | {"pid": 2**22 + 1}
    io.write_atomic(bucket / ".lock", json.dumps(gone))
    with lock.held(bucket):
        assert json.loads((bucket / ".lock").read_bytes())["pid"] == os.getpid()
    assert list(io.sizes(bucket)) == []


@needs_servers
def test_metrics_are_appended_in_parts_which_are_read_resumed_and_joined(bucket, monkeypatch):
    monkeypatch.setattr(remote, "MOST_PARTS", 3)
    steps = lambda: [json.loads(line)["step"] for line in io.read_appended(bucket / "metrics.jsonl").splitlines()]
    killed = JsonlWriter(bucket)
    for step in (1, 2):
        killed.write_scalars(step, {"student/loss": 0.5})
        killed.flush()
    killed.write_scalars(3, {"student/loss": 0.5})  # lost: neither flushed nor closed
    assert steps() == [1, 2]
    assert len(io.sizes(bucket)) == 3
    again = JsonlWriter(bucket, first_step=1)
    assert steps() == [1]
    for step in (2, 3, 4):
        again.write_scalars(step, {"student/loss": 0.5})
        again.flush()
    assert steps() == [1, 2, 3, 4]
    again.write_scalars(5, {"student/loss": 0.5})
    again.close()
    assert list(io.sizes(bucket)) == ["metrics.jsonl"]
    assert steps() == [1, 2, 3, 4, 5]
    assert io.joined(bucket / "metrics.jsonl").read_bytes() == (bucket / "metrics.jsonl").read_bytes()


@needs_servers
def test_a_folder_is_read_from_a_copy_that_follows_its_changes_and_has_its_digest(bucket, tmp_path):
    for name, content in {"x.bin": b"1" * 9000, "sub/y.txt": b"2", "sub/.hidden": b"3"}.items():
        io.write_atomic(bucket / "data" / name, content)
        io.write_atomic(tmp_path / "data" / name, content)
    copy = io.local(bucket / "data")
    assert io.sizes(copy) == io.sizes(bucket / "data") == io.sizes(tmp_path / "data")
    assert io.local(bucket / "data") == copy
    assert io.local(bucket / "data" / "x.bin").read_bytes() == b"1" * 9000
    assert digests.of_path(str(bucket / "data")) == digests.of_path(str(tmp_path / "data"))
    io.write_atomic(bucket / "data" / "x.bin", b"4" * 9000)
    assert (io.local(bucket / "data") / "x.bin").read_bytes() == b"4" * 9000
    with pytest.raises(ValueError, match="there is nothing at .*nowhere: check its name"):
        io.local(bucket / "nowhere")


@needs_servers
def test_what_is_made_in_scratch_is_uploaded_whole_and_goes_on_from_what_is_there(bucket):
    def fail(folder, **how):
        with io.made_for(bucket / folder, **how) as made:
            (made / "rows").write_text("12")
            raise RuntimeError

    for folder, how in {"export": {}, "rows": {"keep": True}}.items():
        with pytest.raises(RuntimeError):
            fail(folder, **how)
    assert [*io.sizes(bucket)] == ["rows/rows"]
    with io.made_for(bucket / "rows", keep=True) as folder:
        assert (folder / "rows").read_text() == "12"
        (folder / "manifest.json").write_text("{}")
    assert io.sizes(bucket / "rows") == {"manifest.json": 2, "rows": 2}


@needs_servers
def test_shards_are_uploaded_while_others_are_made(bucket, monkeypatch):
    monkeypatch.setattr(remote, "WHOLE_EVERY", 0.05)
    with io.made_for(bucket, keep=True) as folder:
        (folder / "0.safetensors").write_text("0")
        (folder / "rows.npy").write_text("1")
        while "0.safetensors" not in io.sizes(bucket):
            time.sleep(0.05)
        assert [*io.sizes(bucket)] == ["0.safetensors"]
    assert [*io.sizes(bucket)] == ["0.safetensors", "rows.npy"]


@needs_servers
def test_busy_answers_and_stalled_connections_are_survived(bucket, proxies):
    proxy = proxies[str(bucket)[:5]]
    io.write_atomic(bucket / "x", b"0")
    for faults in ([503, 429], ["stall"]):
        proxy.inject(*faults)
        io.write_atomic(bucket / "x", str(faults).encode())
        assert proxy.hit == faults
        proxy.inject(*faults)
        assert (bucket / "x").read_bytes() == str(faults).encode()
        assert proxy.hit == faults
    proxy.inject(503)
    assert io.read_range(bucket / "x", 1, 3) == str(faults).encode()[1:4]
    assert proxy.hit == [503]


@needs_servers
@pytest.mark.parametrize("store", STORES)
def test_a_bucket_that_is_not_there_is_one_sentence(store, proxies):
    with pytest.raises(
        ValueError, match=r"folder .*absent/run cannot be written \(.*\); choose another with --workdir"
    ):
        io.ensure_writable(f"{store}absent/run")


@pytest.mark.parametrize(
    ("text", "package", "sentence"),
    [
        ("gs://b/run", "gcsfs", r"gs://b/run needs gcsfs: pip install 'cddistill\[gcs\]'"),
        ("s3://b/run", "s3fs", r"s3://b/run needs s3fs: pip install 'cddistill\[s3\]'"),
        ("hdfs://b/run", "", r"hdfs://b/run is on hdfs://, and paths are local or on gs:// or s3://"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_sentence_and_makes_no_folder(text, package, sentence, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        io.ensure_writable(text)
    assert list(tmp_path.iterdir()) == []


# ---- data in shards


@pytest.fixture
def opened_anew(tmp_path, monkeypatch):
    """opened_anew(path, source) -> its training split, as another host opens it: with empty scratch and home."""
    numbers = itertools.count()

    def opened(path, source):
        own = tmp_path / f"host{next(numbers)}"
        own.mkdir()
        monkeypatch.setenv("CDDISTILL_SCRATCH", str(own / "scratch"))
        monkeypatch.setenv("HOME", str(own))
        indexed.scan.cache_clear()
        loader.open_source.cache_clear()
        getattr(SOURCES[source].format, "groups", parquet.Groups()).clear()
        return data.load(data.configure(source=source, path=str(path), size=8), "train"), own

    return opened


@needs_servers
@pytest.mark.parametrize("source", test_indexed.FORMATS)
def test_shards_are_read_in_place_by_an_index_that_is_built_once(bucket, source, tmp_path, opened_anew, monkeypatch):
    """ArrayRecord's reader takes local files only, so these shards are copied when they are used."""
    (here := tmp_path / "here").mkdir()
    test_indexed.write(here, source)
    remote.upload(here, bucket / "data", last=".json")
    expected, _ = opened_anew(here, source)
    local = expected.source.sides()
    first, _ = opened_anew(bucket / "data", source)
    sides = first.source.sides()
    assert {*map(tuple, sides.tolist())} == {(8, 10), (20, 10)}
    index = [name for name in io.sizes(bucket / "data") if name.startswith(".cddistill/")]
    assert len([name for name in index if "/shard." not in name]) == 4  # .json and .npy, of samples and sides
    for read in ("scan", "sides"):
        monkeypatch.setattr(type(SOURCES[source].format), read, lambda *_: pytest.fail("its index is there"))
    second, scratch = opened_anew(bucket / "data", source)
    for found in (local, second.source.sides()):
        np.testing.assert_array_equal(found, sides)
    for i in (0, len(expected) - 1):
        items = [found.item(i, np.random.default_rng(i)) for found in (expected, first, second)]
        assert len({item["caption"] for item in items}) == 1
        for item in items[1:]:
            np.testing.assert_array_equal(item["x0"], items[0]["x0"])
    copied = {p.name for p in scratch.rglob("*") if p.is_file()}
    assert all(name.startswith("rows.") or source == "array_record" for name in copied)
    assert not any(name.startswith("test-") for name in copied)


@needs_servers
def test_a_shard_that_is_written_again_is_indexed_again_and_a_bucket_that_is_only_read_needs_no_index(
    bucket, tmp_path, opened_anew, monkeypatch, caplog
):
    remote.upload(test_indexed.write(tmp_path / "here"), bucket / "data", last=".json")
    monkeypatch.setattr(remote, "put", lambda file, content: (_ for _ in ()).throw(OSError(13, "no right", str(file))))
    assert len(opened_anew(bucket / "data", "webdataset")[0]) == 12
    assert "the index of the shards goes to" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    before = len(opened_anew(bucket / "data", "webdataset")[0])
    shard = "train-00001.tar"
    test_indexed.webdataset(tmp_path / "new", "train-00001", range(7, 12))
    io.write_atomic(bucket / "data" / shard, (tmp_path / "new" / shard).read_bytes())
    assert len(opened_anew(bucket / "data", "webdataset")[0]) == before - 1
    assert f"{shard}: changed since it was indexed: read again" in caplog.text


@needs_servers
def test_copies_have_the_times_of_their_objects_so_that_digests_are_those_of_every_host(bucket, tmp_path, monkeypatch):
    io.write_atomic(bucket / "data" / "x", b"1")
    found = set()
    for host in ("a", "b"):
        monkeypatch.setenv("CDDISTILL_SCRATCH", str(tmp_path / host))
        found.add(digests.of_files(io.local(bucket / "data"), ["x"]))
    assert len(found) == 1
    assert (io.local(bucket / "data") / "x").stat().st_mtime > 1e9


@needs_servers
def test_compiled_programs_are_kept_on_a_store(bucket, monkeypatch):
    """JAX writes and reads them itself, through the file systems that a path on the store makes known to it."""
    hits, before, shortest = [], jax.config.jax_compilation_cache_dir, "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, shortest)
    noted = lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    jax.monitoring.register_event_listener(noted)
    program = lambda x: x * 3.25 + str(bucket).count("gs")  # of no other test
    try:
        jax.config.update("jax_compilation_cache_dir", str(io.path(f"{bucket}/programs")))
        jax.config.update(shortest, 0.0)  # `train.cache_programs` of another test may have set it
        for _ in range(2):
            compilation_cache.reset_cache()
            jax.jit(program).lower(np.ones(3, np.float32)).compile()
            jax.clear_caches()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update(shortest, seconds)
        compilation_cache.reset_cache()
        jax.monitoring.unregister_event_listener(noted)
    assert len(hits) == 1
    assert any(name.endswith("-cache") for name in io.sizes(bucket / "programs"))


@needs_servers
def test_an_image_is_written_to_a_store(bucket):
    """As by --mode=sample --output."""
    image, given = np.arange(48, dtype=np.uint8).reshape(4, 4, 3), str(bucket / "out.png")
    for place in (given, *grids.outputs([pathlib.Path("in.png")], given, False)):
        grids.save_image(place, image)
        np.testing.assert_array_equal(Image.open(BytesIO((bucket / "out.png").read_bytes())), image)
        (bucket / "out.png").unlink()


# ---- a whole run


def settings(teacher):
    """A class-conditional model of 8 px emoji in 6 steps, three of them with a checkpoint and its evaluation."""
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher), steps=6, batch_size=8, log_every=1, checkpoint_every=2, eval_every=2)
    c.update(eval_images=8, sample_steps=(1,), keep=1)
    c.data.size = 8
    return c


def child(folder, teacher, workdir):
    """A process that trains, with an empty folder as its own and as its home."""
    script = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import conftest, test_object_store as t\n"
    script += "with conftest.first_devices(1):\n"  # as in this process, by the same flags: bits are compared
    script += f"    t.train.train(t.settings({str(teacher)!r}), t.io.path({str(workdir)!r}))"
    env = os.environ | {"XLA_FLAGS": "", "HOME": str(folder)}
    env |= {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    }
    folder.mkdir(exist_ok=True)
    log = folder.with_name(f"{folder.name}.log").open("w")
    return subprocess.Popen([sys.executable, "-c", script], env=env, cwd=folder, stdout=log, stderr=log)


def trained(teacher, workdir):
    """The state at the end of a run, and what it has logged, without times."""
    experiment = config.resolve(settings(teacher))
    with contextlib.closing(open_checkpoints(workdir, experiment, read_only=True)) as checkpoints:
        state = checkpoints.restore(build(experiment).abstract)
    lines = [json.loads(line) for line in io.read_appended(workdir / "metrics.jsonl").splitlines()]
    return jax.device_get(state), [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, teacher, one_device):
    """The same run in a local folder, and its export."""
    folder = tmp_path_factory.mktemp("local")
    train.train(settings(teacher), folder / "run")
    commands.export_run(settings(teacher), folder / "run", str(folder / "export"))
    return folder


@needs_servers
@pytest.mark.slow
def test_a_run_on_a_store_is_killed_resumed_evaluated_and_exported_as_a_local_one(
    bucket, proxies, tmp_path, teacher, undisturbed
):
    remote.upload(pathlib.Path(teacher), bucket / "teacher", last=".json")
    run, cwd, there = bucket / "run", tmp_path / "cwd", str(bucket / "teacher")
    killed = child(cwd, there, run)
    while checkpoint.latest_step(run / "checkpoints") is None and killed.poll() is None:
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    said = cwd.with_name("cwd.log").read_text()[-2000:]
    assert checkpoint.latest_step(run / "checkpoints") in (2, 4, 6), said
    assert [p.name for p in cwd.iterdir() if p.name != ".cache"] == []  # nothing but scratch
    proxies[str(bucket)[:5]].inject(503, 429, 503)
    train.train(settings(there), run)
    jax.tree.map(np.testing.assert_array_equal, trained(there, run), trained(teacher, undisturbed / "run"))
    (run / "report.html").unlink()
    commands.evaluate_run(settings(there), run)
    names = set(io.sizes(run))
    assert {"config.json", "inputs.json", "example.npz", "scores.json", "report.html", "metrics.jsonl"} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert "samples/000006.png" in names
    assert not any(".lock" in name or ".part-" in name for name in names)
    commands.export_run(settings(there), run, str(bucket / "export"))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (bucket / "export" / weights).read_bytes() == (undisturbed / "export" / weights).read_bytes()


@needs_servers
@pytest.mark.slow
def test_pairs_and_their_reader_work_on_a_store(bucket, teacher):
    c = config.defaults("dmd2")
    c.update(teacher=str(teacher), num_pairs=16, pairs_shard=8, teacher_steps=(2,))
    c.data.size = 8
    commands.make_pairs(c, bucket / "pairs")
    there = {"manifest.json", "null.safetensors", "00000000.safetensors", "00000001.safetensors"}
    assert {*io.sizes(bucket / "pairs")} == there
    assert len(OdePairs(str(bucket / "pairs"))) == 16


@needs_servers
@pytest.mark.slow
def test_a_published_evaluation_with_its_files_and_workdir_on_a_store_gives_the_numbers_of_a_local_one(
    bucket, teacher, tmp_path, tmp_path_factory, monkeypatch, one_device
):
    test_published.register(monkeypatch)
    here, sampled = test_published.data.__wrapped__(tmp_path_factory), []
    commands.evaluate_run(test_published.settings_of(teacher, here), tmp_path / "run")
    remote.upload(here, bucket / "protocol", last=".json")
    settings = test_published.settings_of(teacher, bucket / "protocol", protocol_png=True)
    commands.evaluate_run(settings, bucket / "run")
    for column, (value, _) in test_published.metrics(tmp_path / "run").items():
        np.testing.assert_allclose(test_published.metrics(bucket / "run")[column][0], value, rtol=1e-5)
    names = [*io.sizes(bucket / "run")]
    assert len([name for name in names if name.endswith(".png")]) == test_published.N
    rows = published.own_rows
    monkeypatch.setattr(published, "own_rows", lambda x: sampled.append(1) or rows(x))
    next(p for p in (bucket / "run/protocols/tiny/step-0").glob("*/00000004.safetensors")).unlink()
    commands.evaluate_run(settings, bucket / "run")
    assert len(sampled) == 1  # one of three files
    assert [*io.sizes(bucket / "run")] == names

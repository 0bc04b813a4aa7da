"""Pairs of noise and the teacher's ODE sample: how they are made, stored, resumed, read and refused."""

import concurrent.futures
import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from cddistill import build, checks, commands, config, data, generate, models, pipeline, sampling, sharding
from cddistill.data import configure, loader, ode_pairs, shards
from cddistill.data.ode_pairs import OdePairs
from cddistill.data.sources.folder import scan
from cddistill.diffusion import EDM
from cddistill.methods.pretrained import Pretrained
from cddistill.models import lora
from cddistill.models.fingerprint import fingerprint
from cddistill.net import Denoiser
from cddistill.precompute import pairs as making

SHARDS = [f"{k:08}.safetensors" for k in range(3)]  # of 8, 8 and 4 rows


def settings(teacher, **changes):
    c = config.defaults("dmd2")
    c.update(
        teacher=str(teacher), batch_size=8, teacher_steps=(5, 3), teacher_guidance=1.5, num_pairs=20, pairs_shard=8
    )
    c.data.update(size=8)
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def pairs(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    commands.make_pairs(settings(teacher), folder)
    return folder


@pytest.fixture
def copy(pairs, tmp_path):
    return shutil.copytree(pairs, tmp_path / "copy")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def whole(folder):
    """All rows, stacked."""
    opened = OdePairs(folder)
    return loader.stack([opened.item(i) for i in range(len(opened))])


# --- generation


def ode(net, rows, sampler=sampling.ddim, steps=3, scale=1.5):
    """Sample x0 from the rows' noise."""
    denoise = sampling.guided(net, jax.tree.map(jnp.asarray, rows["text"]), rows["null"], scale)
    return jax.jit(lambda z: sampler(denoise, net.schedule, z, net.schedule.grid(steps)))(rows["noise"])


def test_x0_is_the_teachers_ode_sample_of_the_noise(pairs, teacher):
    assert sorted(p.name for p in pairs.iterdir()) == [*SHARDS, "manifest.json", "null.safetensors"]
    rows = whole(pairs)
    assert {x.dtype for x in (rows["noise"], rows["x0"])} == {np.dtype(np.float32)}
    assert rows["noise"].shape == rows["x0"].shape == (20, 8, 8, 3)
    np.testing.assert_array_equal(rows["null"]["class_labels"], [9] * 20)
    source = data.load(configure(size=8), "train", augment=False)
    labels = [source.item(i, np.random.default_rng(0))["text"]["class_labels"] for i in range(20)]
    np.testing.assert_array_equal(rows["text"]["class_labels"], labels)
    np.testing.assert_allclose(rows["x0"], ode(models.load(teacher), rows), rtol=1e-3, atol=1e-3)  # float16


def test_noise_does_not_depend_on_sampler_or_shard_size(pairs, teacher, tmp_path):
    """One shard of all rows, sampled with DPM-Solver++."""
    c = settings(teacher, pairs_shard=100, teacher_sampler="dpm_solver_pp", teacher_steps=(4,))
    commands.make_pairs(c, tmp_path)
    rows, others = whole(tmp_path), whole(pairs)
    np.testing.assert_array_equal(rows["noise"], others["noise"])
    want, ddim = (ode(models.load(teacher), rows, f, 4) for f in (sampling.dpm_solver_pp, sampling.ddim))
    np.testing.assert_allclose(rows["x0"], want, rtol=1e-3, atol=1e-3)
    assert np.abs(ddim - want).max() > 1e-2
    with pytest.raises(ValueError, match=r"heun divides by alpha.*alpha = 0: use ddim or dpm_solver_pp"):
        commands.make_pairs(settings(teacher, teacher_sampler="heun"), tmp_path / "heun")
    with pytest.raises(ValueError, match="teacher_sampler='lcm' must be one of ddim, heun, dpm_solver_pp"):
        commands.make_pairs(settings(teacher, teacher_sampler="lcm"), tmp_path / "lcm")


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpm_solver_pp", 2)])
def test_samplers_converge_with_their_order(name, order):
    """For x0 ~ N(0, 1/4) the ODE scales the noise, in closed form; half the step size divides the error by 2^order."""
    net = Denoiser({}, lambda params, z, t, text: z / (1 + 4 * t.reshape(-1, 1, 1, 1) ** 2), EDM(), "x0")
    student = generate.Student(None, None, {}, {}, {})
    method = generate.teacher_as_student(config.Run(teacher_sampler=name), student).method
    assert isinstance(method, Pretrained)
    assert method.nfe(18) == (35 if name == "heun" else 18)
    noise, batch = tiny.randn(0, 2, 4, 4, 3), {"text": {}, "null": {}, "index": jnp.arange(2)}
    exact = noise * 80 * 0.5 / np.sqrt(0.25 + 80.0**2)
    generated = lambda n: method.sample(SimpleNamespace(teacher=net), noise, batch, None, n)
    errors = [float(jnp.abs(jax.jit(generated, static_argnums=0)(n) - exact).max()) for n in (16, 32)]
    assert errors[1] < errors[0] / 2 ** (order - 0.4)


def test_pairs_are_sampled_from_the_teacher_with_its_lora(teacher, tmp_path):
    net = models.load(teacher)
    made = lora.make_lora(net, jax.random.key(0), 1, targets=("conv1",))
    made = made.replace(params=jax.tree.map(lambda x: x + 0.3, made.params))
    file = lora.save_lora(tmp_path / "lora", {"unet": made}, np.float32)
    c = settings(teacher, num_pairs=8, teacher_guidance=1.0, lora=str(file))
    commands.make_pairs(c, tmp_path / "pairs")
    rows = whole(tmp_path / "pairs")
    np.testing.assert_allclose(rows["x0"], ode(lora.adapt(net, made), rows, scale=1.0), rtol=5e-3, atol=5e-3)
    c.data.pairs = str(tmp_path / "pairs")
    for change in ({}, {"lora_scale": 0.5}, {"lora": ""}):
        run = settings(teacher, data=c.data, lora=str(file))
        run.update(change)
        experiment = config.resolve(run)
        used = pipeline.of_run(experiment.run)
        if not change:
            checks.check_pairs(experiment, used)
            continue
        with pytest.raises(ValueError, match=r"with 1 of .*safetensors \(weights \w{16}\), and this run's teacher is"):
            checks.check_pairs(experiment, used)


def test_each_row_has_its_own_noise():
    """Golden: Philox with key 3 and counter [0, 0, 5, 0]. The noise of neighbouring rows does not overlap."""
    np.testing.assert_allclose(ode_pairs.noise(3, 5, (4,)), GOLDEN, rtol=1e-6)
    near, next_to_it = ode_pairs.noise(0, 0, (64, 64, 4)), ode_pairs.noise(0, 1, (64, 64, 4))
    assert np.intersect1d(near, next_to_it).size < 20  # some of 16,384 float32 numbers coincide by chance
    assert abs(np.corrcoef(near.ravel(), next_to_it.ravel())[0, 1]) < 0.03
    np.testing.assert_array_equal(ode_pairs.noise(0, 1, (2, 2, 1)).ravel(), next_to_it.ravel()[:4])


GOLDEN = [0.2622267007827759, 0.4752792418003082, -1.1798605918884277, 0.4803639054298401]


# --- resuming, several hosts


def test_resuming_generates_only_incomplete_shards(pairs, teacher, copy, capsys):
    """After a missing and a truncated shard and temporary files; complete shards are not written again."""
    kept = copy / SHARDS[0]
    before = kept.stat()
    (copy / SHARDS[1]).unlink()
    with (copy / SHARDS[2]).open("r+b") as file:
        file.truncate(1000)
    (copy / f".{SHARDS[1]}.77.tmp").write_bytes(b"half a sha")
    commands.make_pairs(settings(teacher), copy)
    assert contents(copy) == contents(pairs)
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert "generated again" not in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    commands.make_pairs(settings(teacher), copy)
    printed = capsys.readouterr().out
    assert "all 20 rows exist; 4 of them generated again" in printed
    assert float(printed.split("at most ")[1].split()[0]) < 1e-3
    assert times == {path: path.stat().st_mtime_ns for path in copy.iterdir()}


@pytest.mark.slow
def test_a_kill_loses_one_shard_at_most(pairs, teacher, tmp_path, monkeypatch):
    write_atomic, written = making.io.write_atomic, []

    def killed(path, content):
        written.append(path.name)
        return 1 / 0 if path.name == SHARDS[1] else write_atomic(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(making.io, "write_atomic", killed)
        with pytest.raises(ZeroDivisionError):
            commands.make_pairs(settings(teacher), tmp_path)
    assert written == ["manifest.json", "null.safetensors", *SHARDS[:2]]
    assert sorted(contents(tmp_path)) == sorted([*written[:3]])
    commands.make_pairs(settings(teacher), tmp_path)
    assert contents(tmp_path) == contents(pairs)


def test_hosts_share_the_shards(pairs, teacher, tmp_path, monkeypatch):
    """Two hosts, one after the other; of three hosts that resume, each writes its own missing shards."""
    monkeypatch.setattr(making.multihost_utils, "sync_global_devices", lambda name: None)

    def host(i, n):
        monkeypatch.setattr(jax, "process_count", lambda: n)
        monkeypatch.setattr(jax, "process_index", lambda: i)
        before = contents(tmp_path)
        commands.make_pairs(settings(teacher), tmp_path)
        assert before.items() <= contents(tmp_path).items()
        return sorted({*contents(tmp_path)} - {*before} - {"manifest.json", "null.safetensors"})

    assert host(1, 2) == SHARDS[1:2]
    assert host(1, 3) == []
    assert host(2, 3) == SHARDS[2:]
    assert host(0, 2) == SHARDS[:1]
    assert contents(tmp_path) == contents(pairs)


def test_resuming_with_other_settings_is_refused(teacher, copy, capsys):
    before = contents(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    with pytest.raises(
        ValueError, match=r"made by another command \(guidance: 1.5 there, 2.0 now; seed: 0 there, 1 now"
    ):
        commands.make_pairs(settings(teacher, teacher_guidance=2.0, seed=1), copy)
    other = settings(teacher)
    other.data.size = 16
    with pytest.raises(ValueError, match=r"\(data.size: 8 there, 16 now; x0: \[8, 8, 3\] there, \[16, 16, 3\] now\)"):
        commands.make_pairs(other, copy)
    with pytest.raises(ValueError, match="teacher's number of steps"):
        commands.make_pairs(settings(teacher, teacher_steps=()), copy)
    with pytest.raises(ValueError, match="num_pairs=0 must be at least 1"):
        commands.make_pairs(settings(teacher, num_pairs=0), copy)
    assert contents(copy) == before
    (copy / "manifest.json").write_text(json.dumps(manifest | {"made_by": "cddistill 0.0.9"}))  # the version may differ
    commands.make_pairs(settings(teacher), copy)
    assert "all 20 rows exist" in capsys.readouterr().out


def labelled(root, labels):
    """A folder of pictures with these labels."""
    (root / "train").mkdir(parents=True)
    rows = []
    for i, label in enumerate(labels):
        Image.new("RGB", (8, 8), (255, 9 * i, 0)).save(root / "train" / f"{i}.png")
        rows.append({"file_name": f"train/{i}.png", "label": label})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def of_folder(teacher, tmp_path):
    """(settings, teacher's folder, pictures, pairs made from them)."""
    pictures, copied = labelled(tmp_path / "pictures", [0, 1, 2]), shutil.copytree(teacher, tmp_path / "teacher")
    c = settings(copied, num_pairs=8, teacher_steps=(2,))
    c.data.update(source="folder", path=str(pictures))
    commands.make_pairs(c, tmp_path / "pairs")
    for cached in (loader.open_source, scan):  # as in a new process
        cached.cache_clear()
    return c, copied, pictures, tmp_path / "pairs"


def relabel(copied, pictures):
    text = (pictures / "metadata.jsonl").read_text()
    (pictures / "metadata.jsonl").write_text(text.replace('"label": 2', '"label": 5'))


def reschedule(copied, pictures):
    path = copied / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "linear"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (relabel, r"fingerprints.captions and labels: 3 values \(\w+\) there, 3 values \(\w+\) now"),
        (
            lambda copied, pictures: (pictures / "train" / "2.png").unlink(),
            r"fingerprints.pictures: 3 files .* 2 files",
        ),
        (reschedule, r"fingerprints.schedule: v at sigma/alpha .* there, v at sigma/alpha .* now"),
        (lambda copied, pictures: tiny.save_teacher(copied, seed=1), r"weights: \w+ there, \w+ now"),
    ],
)
def test_pairs_of_what_changed_are_not_continued(of_folder, change, said):
    c, copied, pictures, made = of_folder
    change(copied, pictures)
    with pytest.raises(ValueError, match=rf"was made by another command \(.*{said}"):
        commands.make_pairs(c, made)


def test_pairs_of_what_moved_are_continued(of_folder, tmp_path):
    """Also their shards name the same manifest."""
    c, copied, pictures, made = of_folder
    before = contents(made)
    c.update(teacher=str(copied.rename(tmp_path / "renamed")))
    c.data.path = str(pictures.rename(tmp_path / "elsewhere"))
    (made / "00000000.safetensors").unlink()
    commands.make_pairs(c, made)
    assert contents(made) == before


def test_pairs_of_another_schedule_are_refused(pairs, teacher, copy):
    c, path = settings(teacher), copy / "manifest.json"
    c.data.pairs = str(copy)
    experiment, manifest = config.resolve(c), json.loads(path.read_text())
    other = manifest["fingerprints"] | {"schedule": "eps at sigma/alpha 1, 2, 3, 4"}
    path.write_text(json.dumps(manifest | {"fingerprints": other}))
    with pytest.raises(
        ValueError, match=r"was made with eps at sigma/alpha 1, 2, 3, 4, and this run's teacher has v at"
    ):
        checks.check_pairs(experiment, pipeline.of_run(experiment.run))


def test_old_pairs_serve_for_training_only(teacher, tmp_path, monkeypatch):
    """Those without fingerprints."""
    made, c = making.manifest_of, settings(teacher, num_pairs=8)
    without = lambda *args: {name: x for name, x in made(*args).items() if name != "fingerprints"}
    with monkeypatch.context() as patch:
        patch.setattr(making, "manifest_of", without)
        commands.make_pairs(c, tmp_path)
    c.data.pairs = str(tmp_path)
    checks.check_pairs(config.resolve(c), pipeline.of_run(config.resolve(c).run))
    with pytest.raises(ValueError, match="kept no fingerprints of the data, so it may serve for training but not be"):
        commands.make_pairs(c, tmp_path)


def as_before(folder):
    """Write the shards of a folder as versions did that had no checksums of rows."""
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "numpy") as opened:
            header = json.loads(opened.metadata()["pairs"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no dict)
        del header["row_crc32"]
        file.write_bytes(safetensors.numpy.save(arrays, {"pairs": json.dumps(header, sort_keys=True)}))


def test_shards_without_checksums_of_rows_are_read_and_continued(pairs, teacher, copy):
    """Those of older versions are compared in whole when one of their rows is first read."""
    as_before(copy)
    jax.tree.map(np.testing.assert_array_equal, whole(copy), whole(pairs))
    old = contents(copy)
    (copy / SHARDS[1]).unlink()
    commands.make_pairs(settings(teacher), copy)
    assert contents(copy) == old | {SHARDS[1]: contents(pairs)[SHARDS[1]]}
    opened = OdePairs(copy)
    opened.opened.clear()
    flip(copy / SHARDS[2])
    opened.item(8)
    with pytest.raises(ValueError, match=r"00000002.safetensors is damaged \(the checksum of its x0 is wrong\)"):
        opened.item(16)


# --- reading


def test_a_row_is_compared_with_its_checksum_whenever_it_is_read(copy):
    opened = OdePairs(copy)
    flip(copy / SHARDS[1])
    opened.item(14)
    with pytest.raises(
        ValueError, match=r"row 7 of .*00000001.safetensors is damaged \(its checksum is wrong\): delete"
    ):
        opened.item(15)


def test_few_of_many_shards_are_read_when_a_folder_is_opened(pairs, teacher, tmp_path, monkeypatch):
    """And all of them if bad ones are to be skipped: hosts must agree which."""
    commands.make_pairs(settings(teacher, pairs_shard=1), tmp_path)
    monkeypatch.setattr(shards, "CHECKED", 5)
    read, check = [], shards.check_bytes
    monkeypatch.setattr(shards, "check_bytes", lambda file, *rest: read.append(file.name) or check(file, *rest))
    opened = OdePairs(tmp_path)
    assert sorted(opened.opened) == [0, 4, 9, 14, 19]
    assert sorted(read) == [f"{k:08}.safetensors" for k in (0, 9, 19)] + ["null.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, opened.item(7), OdePairs(pairs).item(7))
    read.clear()
    OdePairs(tmp_path, skip_bad=True)
    assert len(read) == 21


def test_rows_are_read_one_by_one_and_by_several_threads(pairs, monkeypatch):
    opened, sizes, read = OdePairs(pairs), [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *x, **kw: sizes.append((y := read(*x, **kw)).nbytes) or y)
    opened.item(17)
    assert sorted(sizes) == [4, 8 * 8 * 3 * 2]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        items = list(pool.map(opened.item, [*range(20)] * 5))
    for a, b in zip(items, itertools.cycle([opened.item(i) for i in range(20)]), strict=False):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_batches_have_pairs(pairs):
    c = data.configure(size=8, pairs=str(pairs))
    batch = next(data.batches(c, batch_size=4, seed=0))
    assert batch["pairs"]["noise"].shape == batch["x0"].shape == (4, 8, 8, 3)
    host = next(data.batches(c, batch_size=4, seed=0, rows=slice(2, 4)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), batch, host)
    assert len({noise.tobytes() for noise in batch["pairs"]["noise"]}) == 4
    for name in ("noise", "x0"):  # a pair's partner is the next one, not itself
        np.testing.assert_array_equal(batch["others"][name], np.roll(batch["pairs"][name], -1, 0))
    alone = next(data.batches(c, batch_size=4, seed=0, pairs_only=True))
    jax.tree.map(np.testing.assert_array_equal, alone, {name: batch[name] for name in ("index", "pairs", "others")})


@pytest.mark.parametrize("method", ["diffusion2gan", "dmd2"])
def test_rows_that_no_loss_takes_are_not_read(method, teacher, pairs, monkeypatch):
    """Of Diffusion2GAN all, as it trains on pairs alone."""
    c = config.defaults(method)
    c.update(teacher=str(teacher), batch_size=8, sample_steps=(1,))
    c.data.update(size=8, pairs=str(pairs))
    c.method.update({"regression_weight": 0.25} if method == "dmd2" else {"regression": "teacher"})
    parts, read, item = build.build(config.resolve(c)), [], loader.Pixels.item
    monkeypatch.setattr(loader.Pixels, "item", lambda self, i, rng: read.append(i) or item(self, i, rng))
    batch = next(parts.batches(parts.driver(), parts.frozen))
    assert ("x0" in batch, bool(read)) == (method == "dmd2",) * 2
    assert {"index", "pairs", "others"} <= batch.keys()


def test_embeddings_and_sizes_round_trip(tmp_path):
    """SDXL's text: float16, sizes in pixels exactly; the null text has the sizes of its row."""
    rng = np.random.default_rng(0)
    arrays = {"x0": rng.normal(size=(5, 4, 4, 4)), "text": rng.normal(size=(5, 3, 6)), "null": rng.normal(size=(3, 6))}
    arrays |= {"text_embeds": rng.normal(size=(5, 7)), "null_text_embeds": np.zeros(7)}
    arrays |= {"time_ids": 2049 + np.arange(30).reshape(5, 6)}  # float16 cannot hold it
    (tmp_path / "arrays" / "train").mkdir(parents=True)
    for name, x in arrays.items():
        np.save(tmp_path / "arrays" / "train" / f"{name}.npy", np.float32(x))
    dataset = data.load(configure(source="arrays", path=str(tmp_path / "arrays")), "train")
    run = config.resolve({"method": {"name": "dmd2"}, "num_pairs": 8, "pairs_shard": 5, "teacher_steps": (3,)}).run
    manifest, row = making.manifest_of(run, {}, "", (4, 4, 4)), lambda i: making.row(dataset, 0, i)
    making.prepare_folder(tmp_path, manifest, row(0)["null"])
    generate_x0 = lambda rows: np.stack([r["noise"] for r in rows]).astype(np.float16)
    for k in range(2):
        making.make_shard(tmp_path, manifest, k, row, generate_x0, 3, lambda n: None)
    opened = OdePairs(tmp_path)
    for i in (4, 5, 7):
        got, want = opened.item(i), dataset.item(i % 5, None)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, {name: got[name] for name in ("text", "null")}, {n: want[n] for n in ("text", "null")})
        np.testing.assert_array_equal(got["null"]["added_cond_kwargs"]["time_ids"], 2049 + np.arange(6) + 6 * (i % 5))
        close(got["x0"], got["noise"])
    for rows in (dataset, opened):  # a batch holds the null text once
        items = [rows.item(i, None) for i in (4, 3)]
        null, nulls = loader.stack(items)["null"], [item["null"] for item in items]
        assert (null["encoder_hidden_states"].shape, null["encoder_hidden_states"].strides[0]) == ((2, 3, 6), 0)
        assert null["added_cond_kwargs"]["time_ids"].strides[0] > 0
        jax.tree.map(lambda x, *rows: np.testing.assert_array_equal(x, np.stack(rows)), null, *nulls)


def flip(file):
    """Flip one bit of the last number."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(file, count=1):
    file.write_bytes(file.read_bytes()[:-count])


SHARD_FAULTS = {
    "lost": (lambda f: f.unlink(), r"lacks 00000001.safetensors of 4 files: resume with the same --mode=pairs"),
    "cut off": (cut, r"00000001.safetensors is truncated or not a file of pairs: delete it and make it again with"),
    "flipped": (flip, r"00000001.safetensors is damaged \(the checksum of its x0 is wrong\): delete it"),
    "another's": (lambda f: shutil.copy(f.with_name(SHARDS[0]), f), r"00000001.safetensors does not hold rows 8 to 15"),
}
FAULTS = SHARD_FAULTS | {
    "no manifest": (
        lambda f: f.with_name("manifest.json").unlink(),
        r"there is no manifest.json in .*copy: data.pairs must be a folder written by --mode=pairs",
    ),
    "half a manifest": (lambda f: cut(f.with_name("manifest.json"), 99), r"manifest.json is not valid JSON"),
    "no null": (lambda f: f.with_name("null.safetensors").unlink(), r"lacks null.safetensors of 4 files"),
    "flipped null": (lambda f: flip(f.with_name("null.safetensors")), r"null.safetensors is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_folders_are_refused(copy, name):
    harm, sentence = FAULTS[name]
    harm(copy / SHARDS[1])
    with pytest.raises(ValueError, match=sentence):
        next(data.batches(configure(size=8, pairs=str(copy)), batch_size=4, seed=0))


@pytest.mark.parametrize("name", SHARD_FAULTS)
def test_bad_shards_may_be_skipped(copy, pairs, name, capsys):
    SHARD_FAULTS[name][0](copy / SHARDS[1])
    opened, every = OdePairs(copy, skip_bad=True), OdePairs(pairs)
    assert capsys.readouterr().out.startswith("skipped: ")
    assert len(opened) == 12
    for i, row in ((7, 7), (8, 16), (11, 19)):
        jax.tree.map(np.testing.assert_array_equal, opened.item(i), every.item(row))
    for shard in (SHARDS[0], SHARDS[2]):
        flip(copy / shard)
    with pytest.raises(ValueError, match="has no usable shard"):
        OdePairs(copy, skip_bad=True)


def test_a_shard_of_another_folder_is_refused_and_generated_again(pairs, teacher, copy, tmp_path):
    commands.make_pairs(settings(teacher, teacher_steps=(2,)), tmp_path / "other")
    shutil.copy(tmp_path / "other" / SHARDS[0], copy)
    with pytest.raises(ValueError, match="does not hold rows 0 to 7 of the pairs that manifest.json describes"):
        OdePairs(copy)
    commands.make_pairs(settings(teacher), copy)
    assert contents(copy) == contents(pairs)


def test_other_noise_and_format_versions_are_refused(copy, monkeypatch):
    path = copy / "manifest.json"
    with monkeypatch.context() as patch:
        patch.setattr(ode_pairs, "noise", lambda seed, row, shape: np.zeros(shape, np.float32))
        with pytest.raises(
            ValueError, match=r"numpy .* does not generate the noise that .*0.safetensors was made from \(cdd"
        ):
            OdePairs(copy)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="holds pairs of format 2, not 1: make them again"):
        OdePairs(copy)


def test_rows_generated_again_equal_the_stored_ones(pairs, teacher):
    run = config.resolve(settings(teacher)).run
    generate_x0 = making.sampler(run, models.load(teacher), 8)
    assert making.check_regenerated(OdePairs(pairs), generate_x0) == (pytest.approx(0.0, abs=1e-3), 4)
    other = making.sampler(run, models.init(tiny.UNET | {"num_class_embeds": 10}, 1, tiny.teacher().schedule, "v"), 8)
    assert making.check_regenerated(OdePairs(pairs), other)[0] > 0.1
    with pytest.raises(FloatingPointError, match="x0 of row 3 is not finite in float16"):
        other([OdePairs(pairs).item(0) | {"row": 3, "noise": np.full((8, 8, 3), np.inf, np.float32)}])


# --- pairs of another teacher


def test_a_run_refuses_pairs_of_another_teacher(pairs, teacher, tmp_path):
    other = settings(tiny.save_teacher(tmp_path / "other", seed=1)[0])
    other.data.pairs = str(pairs)
    sentence = (
        r"data.pairs .* was made by .*teacher0 \(weights \w+\), and this run's teacher is .*other \(weights \w+\)"
    )
    with pytest.raises(ValueError, match=sentence):
        build.build(config.resolve(other))
    larger = settings(teacher)
    larger.data.update(pairs=str(pairs), size=16)
    with pytest.raises(ValueError, match=r"x0 of data.pairs .* is \(8, 8, 3\), and that of the data is \(16, 16, 3\)"):
        build.build(config.resolve(larger))
    nowhere = settings(teacher)
    nowhere.data.pairs = str(tmp_path)
    with pytest.raises(ValueError, match="there is no manifest.json in"):
        build.build(config.resolve(nowhere))


def test_fingerprints_depend_on_every_bit_and_name_but_not_on_sharding():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(16, 24)).astype("f"), "bias": np.zeros(24, "f")},
              "b": {"kernel": rng.normal(size=(16, 24)).astype("f")}}  # fmt: skip
    base, seen = fingerprint(params), set()

    def changed(f):
        copy = jax.tree.map(np.copy, params)
        f(copy)
        return fingerprint(copy)

    def flip_bit(at, bit):
        return lambda p: p["b"]["kernel"].reshape(-1).view(np.uint32).__setitem__(at, view[at] ^ np.uint32(1 << bit))

    view = params["b"]["kernel"].reshape(-1).view(np.uint32)
    seen |= {changed(flip_bit(at, bit)) for at in (0, 200, 383) for bit in (0, 22, 31)}
    seen.add(changed(lambda p: p["a"]["kernel"].__setitem__(slice(0, 2), -p["a"]["kernel"][:2])))  # only signs
    seen.add(changed(lambda p: p["a"]["bias"].__setitem__(3, -0.0)))
    seen.add(changed(lambda p: p.update(a=p["a"] | {"kernel": p["b"]["kernel"]}, b={"kernel": p["a"]["kernel"]})))
    seen.add(changed(lambda p: p.update(c=p.pop("b"))))
    seen.add(changed(lambda p: p["b"].update(kernel=p["b"]["kernel"].T)))
    seen.add(changed(lambda p: p["b"].update(kernel=p["b"]["kernel"][::-1])))
    seen.add(changed(lambda p: p["b"].update(kernel=p["b"]["kernel"].reshape(24, 16))))
    assert len(seen - {base}) == 16
    assert changed(lambda p: p.update(b=p.pop("b"), a=p.pop("a"))) == base
    mesh = sharding.make_mesh(4)
    for spec in (P("fsdp"), P(None, "fsdp"), P("data", "fsdp"), P(None, ("data", "fsdp"))):
        put = lambda x, spec=spec: jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else P()))
        assert fingerprint(jax.tree.map(put, params)) == base
    assert fingerprint(jax.tree.map(jnp.asarray, params)) == base

"""Encoded data are what their pictures, captions and weights give: what changed is refused, what moved is not."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_latent
import tiny
from PIL import Image

from cddistill import build, checksums, commands, config, data, io, models, pipeline
from cddistill.data import configure, digests
from cddistill.data.sources.folder import scan
from cddistill.diffusion import DDPM
from cddistill.models import tokenizer
from cddistill.models.clip import CLIPTextModel
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.models.schedulers import write_scheduler
from cddistill.models.vae import AutoencoderKL
from cddistill.precompute import encode

pytestmark = pytest.mark.usefixtures("two_devices")

VAE = {"block_out_channels": [4, 4], "norm_num_groups": 2, "mid_block_add_attention": False,
       "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip


def save_vae(folder, gain=1.0, seed=0, **changes):
    module = AutoencoderKL.from_config(VAE | changes)
    params = jax.tree.map(lambda x: x * gain, init_params_numpy(weight_shapes(module), seed))
    models.save(folder, "vae", params, module.to_config(), np.float32)


def make_teacher(folder):
    """A latent teacher without text."""
    net = models.init(tiny.UNET | {"in_channels": 4, "out_channels": 4, "num_class_embeds": 10}, 0)
    models.save(folder, "unet", net.params, net.module.to_config())
    write_scheduler(folder, DDPM(), "eps")
    save_vae(folder)
    return folder


def make_pictures(folder):
    """Two pictures in each split, with captions in files and labels in metadata.jsonl."""
    rng, rows = np.random.default_rng(0), []
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / split / f"{i}.png")
            (folder / split / f"{i}.txt").write_text(f"number {i}")
            rows.append({"file_name": f"{split}/{i}.png", "label": i})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(teacher, pictures, **changes):
    c = config.defaults("diffusion")
    c.update({"teacher": str(teacher), "batch_size": 2} | changes)
    c.data.update(source="folder", path=str(pictures), size=16)
    return c


@pytest.fixture(scope="module")
def made(two_devices, tmp_path_factory):
    """A folder with a teacher, pictures and what was encoded from them; tests change copies of these."""
    root = tmp_path_factory.mktemp("made")
    teacher, pictures = make_teacher(root / "teacher"), make_pictures(root / "pictures")
    commands.encode_data(settings(teacher, pictures), root / "out")
    return root


@pytest.fixture
def teacher(made, tmp_path):
    return shutil.copytree(made / "teacher", tmp_path / "teacher")


@pytest.fixture
def pictures(made, tmp_path):
    return shutil.copytree(made / "pictures", tmp_path / "pictures")


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "out")


def x0(out, split="train"):
    return stored_rows(out / split)["x0"]


def stored_rows(folder):
    """The arrays of a split, by name, as its shards have them."""
    shards = [safetensors.numpy.load_file(file) for file in sorted(folder.glob("0*.safetensors"))]
    return {name: np.concatenate([x[name] for x in shards]) for name in shards[0]}


def old_part(out, split="train"):
    return out / split / "00000-of-00001"


@pytest.fixture
def old(out, tmp_path):
    """The same rows as versions before shards wrote them: a .npy file for each array, and other manifests."""
    for split in ("train", "validation", "test"):
        folder = old_part(tmp_path / "old", split)
        folder.mkdir(parents=True)
        rows, manifest = stored_rows(out / split), io.read_json(out / split / "manifest.json")
        captions = json.dumps([x.tobytes().rstrip(b"\0").decode() for x in rows.pop("caption")])
        for name, x in rows.items():
            np.save(folder / f"{name}.npy", x)
            np.save(folder / f"{name}.crc32.npy", checksums.crc32_rows(x))
        (folder / "captions.json").write_text(captions)
        made = ("teacher", "lora", "lora_scale", "data", "dtype", "encode_dtype", "seed")
        io.write_json(folder / "manifest.json", {
            "made": {name: manifest[name] for name in made}, "fingerprints": manifest["fingerprints"],
            "rows": len(rows["x0"]), "total": len(rows["x0"]),
            "crc32": {"captions.json": checksums.crc32_file(folder / "captions.json")},
        })  # fmt: skip
    return tmp_path / "old"


def repaint(folder):
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "train" / "0.png")


def relabel(folder):
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('train/0.png", "label": 0', 'train/0.png", "label": 3'))


def reload(folder):
    for cached in (data.loader.open_source, scan):  # as in a new process
        cached.cache_clear()


CHANGES = {  # what is done to (pictures, teacher), and what is said
    "a picture": (lambda p, t: repaint(p), "pictures: 2 files .* there, 2 files .* now"),
    "one more": (lambda p, t: shutil.copy(p / "test" / "0.png", p / "train" / "2.png"), "pictures: 2 files.*3 files"),
    "one less": (lambda p, t: (p / "train" / "1.png").unlink(), "pictures: 2 files .* there, 1 file .* now"),
    "another name": (lambda p, t: (p / "train" / "1.png").rename(p / "train" / "7.png"), "pictures: 2 files"),
    "a caption": (lambda p, t: (p / "train" / "0.txt").write_text("number 9"), "captions and labels: 2 values "),
    "no caption": (lambda p, t: (p / "train" / "0.txt").unlink(), "captions and labels: 2 values "),
    "a label": (lambda p, t: relabel(p), "captions and labels: 2 values "),
    "test only": (lambda p, t: (p / "test" / "0.txt").write_text("number 9"), "captions and labels: "),
    "the VAE": (lambda p, t: save_vae(t, seed=1), "vae: weights .* there, weights .* now"),
    "its scale": (lambda p, t: save_vae(t, scaling_factor=0.3), "vae: weights .* there, weights .* now"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_refused(teacher, pictures, out, name):
    change, said = CHANGES[name]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    change(pictures, teacher)
    reload(pictures)
    with pytest.raises(ValueError, match=rf"was encoded from something else \(.*{said}.*another --output"):
        commands.encode_data(settings(teacher, pictures), out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_change_is_found_before_the_first_row(teacher, pictures, out, tmp_path):
    """Formerly of the last split, after all others had been encoded."""
    shutil.rmtree(out / "train")
    (pictures / "test" / "0.txt").write_text("another")
    reload(pictures)
    with pytest.raises(ValueError, match="was encoded from something else"):
        commands.encode_data(settings(teacher, pictures), out)
    assert not (out / "train").exists()
    shutil.rmtree(pictures / "test")
    reload(pictures)
    with pytest.raises(ValueError, match="the test split of folder .* is empty"):
        commands.encode_data(settings(teacher, pictures), tmp_path / "new")
    assert not any((tmp_path / "new").rglob("*.safetensors"))


def test_the_same_again_keeps_every_row(teacher, pictures, out):
    before = out / "train" / "00000000.safetensors"
    stamp = before.stat().st_mtime_ns
    reload(pictures)
    commands.encode_data(settings(teacher, pictures), out)
    assert before.stat().st_mtime_ns == stamp


def test_no_more_rows_are_encoded_at_a_time_than_there_are(teacher, pictures, tmp_path, monkeypatch):
    """Two in a split, of a batch for thousands: a multiple of the eight devices."""

    def program_of(encode, nets, size):
        raise InterruptedError(f"{size} at a time")

    monkeypatch.setattr(encode, "program_of", program_of)
    with pytest.raises(InterruptedError, match="^8 at a time"):
        commands.encode_data(settings(teacher, pictures, batch_size=256), tmp_path / "new")


def test_latents_are_the_posteriors_mean_or_samples_from_it(teacher, pictures, tmp_path):
    """A row's sample depends on its number and the seed, not on the batches."""
    rows = {}
    for name, changes in {"mean": {}, "a": {"encode_sample": True}, "b": {"encode_sample": True, "batch_size": 1},
                          "c": {"encode_sample": True, "seed": 1}}.items():  # fmt: skip
        commands.encode_data(settings(teacher, pictures, **changes), tmp_path / name)
        rows[name] = x0(tmp_path / name).astype(np.float32)
    vae = models.load(teacher, "vae")
    images = data.examples(configure(source="folder", path=str(pictures), size=16), "train")["x0"]
    mean, logvar = vae.encoder.posterior(vae.params, images)
    noise = (rows["a"] - rows["mean"]) / (vae.encoder.module.scaling_factor * np.exp(0.5 * logvar))
    assert noise.std() == pytest.approx(1.0, abs=0.15)
    assert np.abs(noise[0] - noise[1]).min() > 0
    np.testing.assert_allclose(rows["a"], rows["b"], atol=2e-3)
    assert np.abs(rows["a"] - rows["c"]).mean() > 1e-3
    with pytest.raises(ValueError, match="made by another command .*encode_sample"):
        commands.encode_data(settings(teacher, pictures, encode_sample=True), tmp_path / "mean")


def test_what_moved_is_the_same(teacher, pictures, out, tmp_path, monkeypatch):
    """Also where paths are relative; another option is still another command."""
    pictures.rename(tmp_path / "elsewhere")
    shutil.copytree(teacher, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    commands.encode_data(settings("copy", "elsewhere"), out)
    for changes, said in (
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"encode_dtype": "float32"}, "encode_dtype: float16"),
    ):
        with pytest.raises(ValueError, match=rf"was made by another command \({said}"):
            commands.encode_data(settings("copy", "elsewhere", **changes), out)


def test_rows_of_versions_before_shards_serve_for_training_only(teacher, pictures, out, old):
    """With or without fingerprints of what they are from; they give the items that shards give."""
    ours, theirs = (data.load(configure(source="arrays", path=str(x))) for x in (out, old))
    assert len(ours) == len(theirs) == 2
    for i in range(2):
        jax.tree.map(np.testing.assert_array_equal, ours.item(i, None), theirs.item(i, None))
    for split in ("train", "validation", "test"):
        path = old_part(old, split) / "manifest.json"
        io.write_json(path, {k: v for k, v in io.read_json(path).items() if k != "fingerprints"})
        with pytest.raises(ValueError, match=r"wrote \.npy .*may serve for training .*: encode again, to another"):
            commands.encode_data(settings(teacher, pictures), old)
    reload(pictures)
    assert len(data.load(configure(source="arrays", path=str(old)))) == 2


def test_text_encoders_and_tokenizers_count(teacher, monkeypatch):
    monkeypatch.setattr(tokenizer, "load", lambda path: test_latent.Letters())
    module = CLIPTextModel.from_config(test_latent.CLIP)
    (teacher / "tokenizer").mkdir()
    index = {"text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (teacher / "model_index.json").write_text(json.dumps(index))

    def found(seed, merges):
        models.save(teacher, "text_encoder", init_params_numpy(weight_shapes(module), seed), module.to_config())
        (teacher / "tokenizer" / "merges.txt").write_text(merges)
        return encode.weights_of(pipeline.Pipeline(str(teacher)))

    first = found(0, "a")
    assert {*first} == {"vae", "text_encoder", "tokenizers"}
    assert found(0, "a") == first
    assert [name for name, x in found(1, "a").items() if x != first[name]] == ["text_encoder"]
    assert [name for name, x in found(0, "b").items() if x != first[name]] == ["tokenizers"]


def test_training_on_latents_of_another_vae_is_said(teacher, pictures, out, caplog):
    c = settings(teacher, pictures)
    c.batch_size = 8
    c.data.update(source="arrays", path=str(out))
    build.build(config.resolve(c))
    assert not caplog.text
    save_vae(teacher, seed=1)
    build.build(config.resolve(c))
    assert "was encoded by another VAE (weights" in caplog.text


def test_labels_stay_where_there_is_no_text_encoder(teacher, pictures):
    """In training on the pictures themselves, whose latents are the VAE's."""
    c = settings(teacher, pictures, batch_size=8)
    parts = build.build(config.resolve(c))
    driver = parts.driver()
    batch = jax.tree.map(np.asarray, next(parts.batches(driver, driver.put_frozen(parts.frozen))))
    assert {*batch["text"]} == {*batch["null"]} == {"class_labels"}
    assert {*batch["text"]["class_labels"].tolist()} == {0, 1}
    assert batch["x0"].shape == (8, 8, 8, 4)


# --- numbers that float16 cannot hold


def test_latents_too_large_for_float16_are_refused_and_stored_in_float32(teacher, pictures, tmp_path):
    save_vae(teacher, scaling_factor=1e6)
    said = (
        r"x0 of row \d of train \(number \d\) has numbers up to .*e\+\d+, too large for float16: set --config.encode_d"
    )
    with pytest.raises(ValueError, match=said):
        commands.encode_data(settings(teacher, pictures), tmp_path / "out")
    commands.encode_data(settings(teacher, pictures, encode_dtype="float32"), tmp_path / "float32")
    assert x0(tmp_path / "float32").dtype == np.float32
    assert 65504 < np.abs(x0(tmp_path / "float32")).max() < np.inf
    item = data.load(configure(source="arrays", path=str(tmp_path / "float32"))).item(0, None)
    np.testing.assert_array_equal(item["x0"], x0(tmp_path / "float32")[0])


def test_latents_that_are_not_finite_are_refused(teacher, pictures, tmp_path):
    save_vae(teacher, gain=np.nan)
    for dtype in ("float16", "float32"):
        with pytest.raises(ValueError, match=r"x0 of row 0 of train .* is not finite \(NaN or infinity\): check the w"):
            commands.encode_data(settings(teacher, pictures, encode_dtype=dtype), tmp_path / dtype)
        assert not (tmp_path / dtype / "train" / "manifest.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_types_cannot_be_stored(dtype):
    with pytest.raises(ValueError, match=f"encode_dtype='{dtype}' must be one of float16, float32"):
        config.resolve(settings("emoji", "", encode_dtype=dtype))


def test_the_row_that_is_too_large_is_named():
    x = np.ones((3, 2, 2), np.float32)
    x[1, 0, 1] = -7e4
    with pytest.raises(ValueError, match=r"text of the second has numbers up to 7e\+04, too large for float16"):
        encode.stored("text", x, np.float16, ["the first", "the second", "the third"])
    sizes = encode.stored("added_cond_kwargs.time_ids", x, np.float16, [""])
    assert sizes.dtype == np.float32
    assert encode.stored("input_ids", np.array([[70000]]), np.float16, [""]).max() == 70000


# --- damage


def flip(path):
    """Flip a bit in the last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_damaged_row_is_named_before_the_first_step(out):
    flip(out / "train" / "00000000.safetensors")
    with pytest.raises(ValueError, match=r"/train/00000000\.safetensors is damaged .*: delete it and make it again"):
        data.load(configure(source="arrays", path=str(out)))
    data.load(configure(source="arrays", path=str(out)), "test")


def test_a_row_that_is_damaged_later_is_named_when_it_is_read(out):
    read = data.load(configure(source="arrays", path=str(out)))
    flip(out / "train" / "00000000.safetensors")
    read.item(0, None)
    with pytest.raises(ValueError, match=r"row 1 of .*/train/00000000\.safetensors is damaged .*: delete it and make"):
        read.item(1, None)


def test_damage_of_versions_before_shards_is_named(old):
    """Of a row, before the first step, and of captions."""
    flip(old_part(old) / "x0.npy")
    with pytest.raises(ValueError, match=r"row 1 of .*/train/.*/x0\.npy is damaged .*: delete its folder and enc"):
        data.load(configure(source="arrays", path=str(old)))
    path = old_part(old, "test") / "captions.json"
    path.write_text(path.read_text().replace("number 1", "number 2"))
    with pytest.raises(ValueError, match=r"captions\.json is damaged \(its checksum is wrong\)"):
        data.load(configure(source="arrays", path=str(old)), "test")


# --- fingerprints


def test_fingerprints_of_files_are_of_names_sizes_and_times(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    seen = [
        digests.of_files(tmp_path, ["a", "b"]),
        digests.of_files(tmp_path, ["b", "a"]),
        digests.of_files(tmp_path, ["a"]),
    ]
    os.utime(tmp_path / "a", (1, 1))
    still = digests.of_files(tmp_path, ["a", "b"], times=False)
    seen += [digests.of_files(tmp_path, ["a", "b"]), still]
    os.utime(tmp_path / "a", (2, 2))
    assert digests.of_files(tmp_path, ["a", "b"], times=False) == still
    (tmp_path / "a").write_text("12")
    seen.append(digests.of_files(tmp_path, ["a", "b"], times=False))
    assert len({*seen}) == len(seen)
    assert seen[0].startswith("2 files (")


def test_fingerprints_of_values_are_of_their_content():
    same = [digests.of_values(x) for x in ([{"a": 1, "b": "ä"}], [{"b": "ä", "a": 1}], iter([{"a": 1, "b": "ä"}]))]
    assert len({*same}) == 1
    others = [digests.of_values(x) for x in ([], [""], ["", ""], ["a\nb"], ["a", "b"], [{"a": 1}], [{"a": "1"}])]
    assert len({*others, *same}) == 8


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ({"source": "emoji"}, ["pictures"]),
        ({"source": "icons"}, ["pictures"]),
        ({"source": "scenes", "num_classes": 24}, []),
        ({"source": "mixture", "num_classes": 33, "mixture": ("icons", "scenes")}, ["icons's pictures"]),
    ],
)
def test_packs_change_with_their_files(source, kinds):
    found = data.fingerprint(configure(size=8, **source), "test")
    assert [*found] == kinds
    assert found == data.fingerprint(configure(size=8, **source), "train")


def test_arrays_change_with_their_files_and_captions(tmp_path):
    np.save(tmp_path / "x0.npy", np.random.default_rng(0).normal(size=(40, 4, 4, 4)).astype("f4"))
    seen = []
    for captions in (["a"] * 40, ["b"] * 40):
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        reload(tmp_path)
        seen.append(data.fingerprint(configure(source="arrays", path=str(tmp_path))))
    assert seen[0]["arrays"] == seen[1]["arrays"]
    assert seen[0]["captions"] != seen[1]["captions"]

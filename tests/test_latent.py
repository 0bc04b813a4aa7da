"""A latent text-to-image teacher, from its pipeline folder to a student in a folder: encode, train, sample, export."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import cddistill
from cddistill import api, build, commands, config, data, export, generate, io, models, train
from cddistill.checkpoint import Checkpoints
from cddistill.data import configure
from cddistill.data.sources.arrays import Arrays
from cddistill.diffusion import DDPM
from cddistill.evals import fidelity
from cddistill.models import lora, tokenizer
from cddistill.models.clip import CLIPTextModel
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.models.prompt import load_prompts
from cddistill.models.schedulers import write_scheduler
from cddistill.models.vae import AutoencoderKL
from cddistill.precompute import encode

pytestmark = pytest.mark.usefixtures("two_devices")

UNET = {
    "sample_size": 8, "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 0,
    "down_block_types": ["DownBlock2D"], "attention_head_dim": 2, "cross_attention_dim": 8,  # attention in the middle
    "up_block_types": ["UpBlock2D"],
}  # fmt: skip
VAE = {
    "block_out_channels": [4, 8], "norm_num_groups": 4, "scaling_factor": 0.5,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
CLIP = {
    "architectures": ["CLIPTextModel"], "vocab_size": 30, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16, "hidden_act": "quick_gelu",
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


class Letters:
    """A tokenizer of letters, called as those of transformers are."""

    model_max_length = 16

    def __call__(self, texts, padding, max_length, truncation):
        ids = [[0, *(ord(c) % 28 + 2 for c in text)] for text in texts]
        return {"input_ids": [(row + [1] * max_length)[:max_length] for row in ids]}


@pytest.fixture(scope="module", autouse=True)
def letters():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load", lambda path: Letters())
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline folder with random weights, as diffusers lays it out."""
    folder = tmp_path_factory.mktemp("pipeline")
    unet = models.init(UNET, 0, zero_out=False)
    models.save(folder, "unet", unet.params, unet.apply.module.to_config())
    for name, module in {
        "vae": AutoencoderKL.from_config(VAE),
        "text_encoder": CLIPTextModel.from_config(CLIP),
    }.items():
        models.save(folder, name, init_params_numpy(weight_shapes(module), 1), module.to_config())
    write_scheduler(folder, DDPM(), "eps")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pictures(teacher, folder, write=True):
    """Settings for CoDi on the sixteen noisy pictures with captions that are written to a folder."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("validation", 4), ("test", 4)) if write else ():
        (folder / split).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / split / f"{i}.png")
            (folder / split / f"{i}.txt").write_text("ab c"[: i % 3 + 1])
    c = config.defaults("codi")
    c.update(teacher=str(teacher), batch_size=8, steps=2, log_every=1, eval_every=2, checkpoint_every=2)
    c.update(sample_steps=(2,))
    c.data.update(source="folder", path=str(folder), task="sr", size=16, scale=2)
    return c


@pytest.fixture(scope="module")
def encoded(teacher, tmp_path_factory):
    """(settings for training on them, folder of latents)."""
    settings, out = pictures(teacher, teacher / ".." / "x"), tmp_path_factory.mktemp("latents")
    commands.encode_data(settings, out)
    settings.data.update(source="arrays", path=str(out))
    return settings, out


@pytest.fixture(scope="module")
def on_pictures(encoded, teacher):
    """Settings for training on the pictures themselves, which `encoded` has written."""
    settings = pictures(teacher, teacher / ".." / "x", write=False)
    settings.update(encode_sample=True, checkpoint_every=1, eval_every=9)
    return settings


@pytest.fixture(scope="module")
def run(on_pictures, tmp_path_factory):
    """A finished run on pictures; test_the_text_encoder_is_trained_and_exported has one on what is encoded."""
    workdir = tmp_path_factory.mktemp("run")
    train.train(on_pictures, workdir)
    return workdir


def test_latents_and_embeddings_are_the_teachers(encoded, teacher):
    settings, _ = encoded
    item = data.load(configure(source="arrays", path=settings.data.path, task="sr"), "test").item(1, None)
    vae, prompts = models.load(teacher, "vae"), load_prompts(teacher)
    source = data.load(configure(source="folder", path=str(teacher / ".." / "x"), task="sr", size=16, scale=2), "test")
    assert item["caption"] == source.item(1, np.random.default_rng(0))["caption"]
    pixels = source.item(1, np.random.default_rng([0, 1]))
    half = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)
    half(item["x0"], vae.encode(jnp.asarray(pixels["x0"][None]))[0])
    half(item["cond"], pixels["cond"])
    half(item["text"]["encoder_hidden_states"], prompts([pixels["caption"]])["encoder_hidden_states"][0])
    half(item["null"]["encoder_hidden_states"], prompts.null(1)["encoder_hidden_states"][0])


def test_encoding_resumes_where_it_stopped(encoded, teacher, tmp_path):
    """In shards of three rows: those that are whole are neither decoded nor written again."""
    settings, whole = encoded
    pixels = pictures(teacher, tmp_path / "x", write=False)
    pixels.data.path = str(teacher / ".." / "x")
    pixels.update(batch_size=2, encode_shard=3)
    folder, out = tmp_path / "out" / "train", str(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        done, write = [], io.write_atomic
        patch.setattr(io, "write_atomic", lambda *x: write(*x) if not done.append(x) and len(done) < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):  # after the manifest, the null text and the first shard
            commands.encode_data(pixels, tmp_path / "out")
    with pytest.raises(ValueError, match=r"lacks 00000001.safetensors, .* of 4 files: resume with the same --mode"):
        data.load(configure(source="arrays", path=out, task="sr"), "train")
    stamp = lambda: (x := (folder / "00000000.safetensors").stat()) and (x.st_mtime_ns, x.st_ino)
    first, numbers, item = stamp(), [], encode.item_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "item_of", lambda *x: numbers.append(x[-1]) or item(*x))
        commands.encode_data(pixels, tmp_path / "out")
    assert sorted(numbers) == sorted([*range(3, 8), *range(4), *range(4)])
    assert stamp() == first
    ours, theirs = (data.load(configure(source="arrays", path=x, task="sr")) for x in (out, str(whole)))
    assert len(ours) == len(theirs) == 8
    for i in range(8):  # other batches round otherwise
        got, want = (x.item(i, None) for x in (ours, theirs))
        assert got.pop("caption") == want.pop("caption")
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), got, want)
    pixels.seed = 1
    with pytest.raises(ValueError, match="made by another command"):
        commands.encode_data(pixels, tmp_path / "out")


def test_any_number_of_hosts_encodes_and_any_other_reads(encoded, teacher, tmp_path, monkeypatch):
    """Host 1 of 2, then 2 of 3, then 0 of 1: every shard is written once, with the bytes that one host gives it."""
    pixels = pictures(teacher, tmp_path / "x", write=False)
    pixels.data.path = str(teacher / ".." / "x")
    pixels.update(batch_size=2, encode_shard=2)
    commands.encode_data(pixels, tmp_path / "whole")
    contents = lambda out: {x.name: x.read_bytes() for x in sorted((tmp_path / out / "train").iterdir())}
    for host, hosts, new in ((1, 2, "13"), (2, 3, "2"), (0, 1, "0")):
        monkeypatch.setattr(jax, "process_count", lambda n=hosts: n)
        monkeypatch.setattr(jax, "process_index", lambda i=host: i)
        before = contents("out") if (tmp_path / "out").exists() else {}
        commands.encode_data(pixels, tmp_path / "out")
        added = {*contents("out")} - {*before} - {"manifest.json", "null.safetensors"}
        assert added == {f"0000000{k}.safetensors" for k in new}
        assert before.items() <= contents("out").items()
    assert contents("out") == contents("whole")
    read = configure(source="arrays", path=str(tmp_path / "out"), task="sr", window=3)
    rows = [next(data.batches(read, batch_size=8, seed=0, rows=x)) for x in (slice(0, 3), slice(3, 8), slice(None))]
    jax.tree.map(lambda a, b, both: np.testing.assert_array_equal(np.concatenate([a, b]), both), *rows)
    assert len({x.tobytes() for x in rows[2]["x0"]}) == 8


def test_parts_of_several_hosts_are_one_data_set(tmp_path):
    """As versions before shards wrote them."""
    rows = np.random.default_rng(0).normal(size=(8, 8, 8, 4)).astype(np.float16)
    for split, (first, second) in {"train": (5, 3)}.items():
        for i, x in enumerate((rows[:first], rows[first:])):
            part = tmp_path / split / f"{i:05}-of-00002"
            part.mkdir(parents=True)
            np.save(part / "x0.npy", x)
            (part / "manifest.json").write_text(json.dumps({"rows": len(x), "total": len(x)}))
        read = data.load(configure(source="arrays", path=str(tmp_path)), split)
        assert len(read) == first + second
        np.testing.assert_array_equal(read.item(6, None)["x0"], np.float32(rows[6]))
    config = configure(source="arrays", path=str(tmp_path))
    (tmp_path / "train" / "00001-of-00002" / "manifest.json").write_text('{"rows": 1, "total": 3}')
    with pytest.raises(ValueError, match="has 1 of 3 rows"):
        Arrays().open(config, "train")
    shutil.rmtree(tmp_path / "train" / "00001-of-00002")
    with pytest.raises(ValueError, match="holds 1 of 2 parts"):
        Arrays().open(config, "train")


def test_a_student_of_latents_draws_pictures(on_pictures, run, tmp_path):
    """Scores and samples are of decoded pictures, at the size of the condition."""
    assert json.loads((run / "scores.json").read_text())["student, 2 steps"]["n"] == 4
    Image.new("RGB", (40, 50), (200, 30, 30)).save(tmp_path / "in.png")
    commands.sample(on_pictures, run, str(tmp_path / "in.png"), str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (16, 16)


def test_scores_are_of_true_pixels(on_pictures, run, teacher):
    """And a row says what the VAE loses of them."""
    scores, name = json.loads((run / "scores.json").read_text()), "VAE's reconstruction of the target"
    examples, vae = data.examples(config.resolve(on_pictures).data, "test"), models.load(teacher, "vae")
    reconstruction = np.asarray(vae.images(vae.encode(examples["x0"])))
    expected = float(fidelity.psnr(reconstruction, examples["x0"] * 0.5 + 0.5).mean())
    assert scores[name]["metrics"]["PSNR"][0] == pytest.approx(expected, abs=0.01)
    assert "VAE&#39;s reconstruction of the target" in (run / "report.html").read_text()


@pytest.mark.slow  # test_encoders.py has its batches
def test_a_resumed_run_is_the_same_bit_by_bit(on_pictures, run, tmp_path):
    """Also the samples from the VAE's posterior, which is why encode_sample may not change."""
    settings = on_pictures.copy_and_resolve_references()
    settings.update(report=False, eval_every=9)
    train.train(settings, tiny.until(1, run, tmp_path / "run"))
    shapes = build.build(config.resolve(settings)).abstract
    first, again = (
        Checkpoints(workdir / "checkpoints", read_only=True).restore_weights(shapes, step=2)
        for workdir in (run, tmp_path / "run")
    )
    jax.tree.map(np.testing.assert_array_equal, first.nets, again.nets)
    settings.encode_sample = False
    with pytest.raises(ValueError, match="encode_sample"):
        train.train(settings, tiny.until(1, run, tmp_path / "other"))


@pytest.mark.slow
def test_a_run_is_used_where_its_pictures_are_not(run, tmp_path):
    """The example that is kept with it is encoded."""
    copy = shutil.copytree(run, tmp_path / "run")
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "in.png")
    (copy / "inputs.json").unlink()
    there = json.loads((copy / "config.json").read_text())
    there["data"]["path"] = str(tmp_path / "nowhere")
    (copy / "config.json").write_text(json.dumps(there))
    sample = lambda workdir: cddistill.sample(cddistill.load(workdir), image=tmp_path / "in.png", prompt="ab")
    np.testing.assert_array_equal(sample(run), sample(copy))


@pytest.fixture(scope="module")
def concat(encoded, teacher, tmp_path_factory):
    """Settings of CoDi with input channels for the condition, on what --mode=encode writes for it."""
    folder, settings = tmp_path_factory.mktemp("concat"), pictures(teacher, teacher / ".." / "x", write=False)
    settings.update(report=False, eval_every=9, sample_steps=(1,))  # `run` has scores; here --mode=sample draws
    settings.method.adapter = "concat"
    commands.encode_data(settings, folder / "latents")
    settings.data.update(source="arrays", path=str(folder / "latents"))
    return settings


def test_a_condition_is_encoded_for_latent_space(concat, teacher):
    """Encoding writes the condition's latent beside its pixels; formerly pixels met x0's latent and were refused."""
    settings = concat
    assert build.build(config.resolve(settings)).abstract.nets["backbone"].module.in_channels == 8
    item = data.load(configure(source="arrays", path=settings.data.path, task="sr"), "test").item(0, None)
    assert (item["cond"].shape, item["cond_latent"].shape) == ((16, 16, 3), (8, 8, 4))
    latent = models.load(teacher, "vae").encode(jnp.asarray(item["cond"][None]) * 2 - 1)[0]
    np.testing.assert_allclose(item["cond_latent"], latent, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_condition_is_concatenated_in_latent_space(concat, tmp_path):
    """A run with it is trained, sampled from a person's picture and exported."""
    settings, workdir = concat, tmp_path / "run"
    train.train(settings, workdir)
    Image.new("RGB", (40, 50), (200, 30, 30)).save(tmp_path / "in.png")
    commands.sample(settings, workdir, str(tmp_path / "in.png"), str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (16, 16)
    commands.export_run(settings, workdir, str(tmp_path / "student"))
    assert models.load(tmp_path / "student").module.in_channels == 8


def test_a_pipeline_is_exported(on_pictures, run, teacher, tmp_path, capsys):
    commands.export_run(on_pictures, run, str(tmp_path / "student"))
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1].split()[0]) < 2e-2, said
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "ControlNetModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    for name in ("vae/config.json", "text_encoder/config.json", "tokenizer/merges.txt"):
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
    scheduler = json.loads((tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_timesteps"] == [999, 499]
    assert models.load(tmp_path / "student").schedule == DDPM()
    text = (tmp_path / "student" / "README.md").read_text()
    assert "(999, 499)" in text
    assert "student, 2 steps, 4 images" in text


def test_a_lora_reaches_the_text_encoder_and_what_is_exported(encoded, teacher, tmp_path):
    """A file for both networks: prompts are encoded, and the pipeline is written, with it."""
    nets = {name: models.load(teacher, name) for name in ("unet", "text_encoder")}
    targets = {"unet": ("conv1",), "text_encoder": ("q_proj",)}
    loras = {name: lora.make_lora(net, jax.random.key(0), 1, targets=targets[name]) for name, net in nets.items()}
    loras = {name: x.replace(params=jax.tree.map(lambda x: x + 0.3, x.params)) for name, x in loras.items()}
    file = lora.save_lora(tmp_path / "lora", loras, np.float32)
    prompts, adapted = load_prompts(teacher), load_prompts(teacher).with_lora(file, 0.5)
    expected = loras["text_encoder"](nets["text_encoder"].params, 0.5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), adapted.nets[0].params, expected)
    assert not np.allclose(prompts.null(1)["encoder_hidden_states"], adapted.null(1)["encoder_hidden_states"])
    settings = config.defaults("pretrained")
    settings.update(teacher=str(teacher), lora=str(file), lora_scale=0.5, batch_size=8, sample_steps=(2,))
    settings.data = encoded[0].data.copy_and_resolve_references()
    settings.data.task = "none"
    commands.export_run(settings, tmp_path / "run", str(tmp_path / "out"))
    for name, net in nets.items():
        written, wanted = models.load(tmp_path / "out", name).params, loras[name](net.params, 0.5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3), written, wanted)
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "text_encoder" / models.convert.TORCH_FILE).exists()


@pytest.mark.slow
def test_stablehlo_takes_any_batch(on_pictures, run, tmp_path, capsys):
    commands.export_run(on_pictures, run, str(tmp_path / "student.stablehlo"))
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1].split()[0]) < 1e-5, said
    back = jax.export.deserialize(bytearray((tmp_path / "student.stablehlo").read_bytes()))
    text = {"encoder_hidden_states": np.zeros((3, 16, 8), np.float32)}
    inputs = {"noise": np.zeros((3, 1, 8, 8, 4), np.float32), "cond": np.zeros((3, 16, 16, 3), np.float32)}
    images = np.asarray(back.call(inputs | {"text": text, "null": text}))
    assert images.shape == (3, 16, 16, 3)
    assert back.platforms == ("cpu", "cuda", "tpu")


def test_a_folder_in_use_is_left_alone(on_pictures, run, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is not empty: choose another --output"):
        commands.export_run(on_pictures, run, str(tmp_path))
    with pytest.raises(ValueError, match=r"mine/student cannot be written .*another with --output"):
        commands.export_run(on_pictures, run, str(tmp_path / "mine" / "student"))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_folder_may_have_a_dot_in_its_name(on_pictures, run, tmp_path):
    """It is no file: what is in it is safe."""
    (tmp_path / "v1.5").mkdir()
    (tmp_path / "v1.5" / "mine").write_text("")
    with pytest.raises(ValueError, match="is not empty: choose another --output"):
        commands.export_run(on_pictures, run, str(tmp_path / "v1.5"))


def test_a_pipeline_without_its_vae_is_refused(teacher, tmp_path):
    settings, part = pictures(teacher, teacher / ".." / "x", write=False), tmp_path / "part"
    settings.teacher = str(part)
    shutil.copytree(teacher, part)
    shutil.rmtree(part / "text_encoder")
    with pytest.raises(ValueError, match="part lacks text_encoder/, which its model_index.json names: download"):
        commands.encode_data(settings, tmp_path / "out")
    shutil.rmtree(part / "vae")
    with pytest.raises(ValueError, match="part lacks vae/, which its model_index.json names: download"):
        commands.encode_data(settings, tmp_path / "out")
    (part / "model_index.json").unlink()
    with pytest.raises(ValueError, match="part has neither vae/ nor text_encoder/"):
        commands.encode_data(settings, tmp_path / "out")
    shutil.copytree(part / "unet", part / "vae")
    with pytest.raises(ValueError, match="vae holds a UNet2DConditionModel, not an AutoencoderKL or AutoencoderTiny"):
        commands.encode_data(settings, tmp_path / "out")


@pytest.mark.timeout(900)  # jax2onnx takes minutes
def test_onnx_draws_the_same_pictures(on_pictures, run, tmp_path, capsys):
    """The file against the student itself, on inputs that the exporter has not seen."""
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    with jax.numpy_rank_promotion("allow"):  # jax2onnx adds biases without reshaping them
        commands.export_run(on_pictures, run, str(tmp_path / "student.onnx"))
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1].split()[0]) < 1e-3, said
    parts, state = commands.finished(on_pictures, run)
    rng, batch = np.random.default_rng(7), jax.tree.map(lambda x: x[:1], export.example_inputs(parts))
    example, program = export.program(generate.student_of(parts, state), batch, parts.experiment.run)
    inputs = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), example)
    session = runtime.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
    names = [".".join(key.key for key in keys) for keys, _ in jax.tree.leaves_with_path(inputs)]
    assert [x.name for x in session.get_inputs()] == names
    (image,) = session.run(["image"], dict(zip(names, jax.tree.leaves(inputs), strict=True)))
    expected = jax.jit(program)(inputs)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(image, expected, atol=1e-3)


def test_onnx_says_what_it_needs(on_pictures, run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'cddistill\[onnx\]'"):
        commands.export_run(on_pictures, run, str(tmp_path / "student.onnx"))
    assert not (tmp_path / "student.onnx").exists()


def test_a_prompt_is_sampled_without_data(teacher, tmp_path, capsys):
    """As `cddistill.sample` does it, with the method's guidance scale."""
    c = config.defaults("pretrained")
    c.update(teacher=str(teacher), sample_steps=(3,))
    c.method.update(scheduler=str(teacher), guidance=3.0)
    c.data.path = str(tmp_path / "nowhere")
    api.sample_prompts(c, tmp_path / "run", ["ab c"], str(tmp_path / "out.png"))
    assert "1 generated in 3 steps (6 network evaluations each)" in capsys.readouterr().out
    expected = cddistill.sample(cddistill.load(teacher), prompt="ab c", steps=3, guidance=3.0)
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "out.png")) / 255, expected[0], atol=0.6 / 255)


def test_a_negative_prompt_replaces_the_empty_one_where_guidance_is_used(teacher, tmp_path):
    model = cddistill.load(teacher)
    sample = lambda **given: cddistill.sample(model, prompt="ab", steps=2, guidance=3.0, **given)
    np.testing.assert_array_equal(sample(negative_prompt=""), sample())
    one, many = sample(negative_prompt="cad"), sample(negative_prompt=["cad", ""])
    assert np.abs(one - sample()).max() > 1e-3
    np.testing.assert_allclose(many[0], one[0], atol=1e-5)
    for guidance in (None, 1.0):
        with pytest.raises(ValueError, match="a negative prompt has no effect at guidance scale 1: set guidance="):
            cddistill.sample(model, prompt="ab", negative_prompt="c", guidance=guidance)
    c = config.defaults("pretrained")
    c.update(teacher=str(teacher), sample_steps=(2,))
    c.method.update(scheduler=str(teacher), guidance=3.0)
    api.sample_run(c, tmp_path, str(tmp_path / "out.png"), prompts=["ab"], negative_prompt="cad")
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "out.png")) / 255, one[0], atol=0.6 / 255)


def test_a_student_without_guidance_takes_no_negative_prompt(teacher, tmp_path):
    c = config.defaults("dmd2")
    c.teacher = str(teacher)
    with pytest.raises(ValueError, match="sampled without guidance, so it takes no negative prompt: leave it out"):
        api.sample_run(c, tmp_path, str(tmp_path / "out.png"), prompts=["ab"], negative_prompt="c")


def test_a_network_on_latents_without_its_vae_asks_for_both(teacher, tmp_path):
    shutil.copytree(teacher / "unet", tmp_path / "unet")
    c = config.defaults("pretrained")
    c.teacher = str(tmp_path)
    with pytest.raises(ValueError, match="works on 4 channels, not on RGB, .* give a folder that also has vae/"):
        commands.sample(c, tmp_path, None, str(tmp_path / "out.png"))


# ---- the text encoder, trained along


def with_text_encoder(teacher, path):
    """Settings for plain training of denoiser and text encoder."""
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher), batch_size=8, steps=2, log_every=1, eval_every=2, checkpoint_every=2, eval_images=4)
    c.update(sample_steps=(2,), encode_epochs=2)
    c.method.update(train_text_encoder=True, ema_decay=0.5, guidance=2.0)
    c.data.update(source="folder", path=str(path), size=16)
    return c


@pytest.fixture(scope="module")
def token_ids(teacher, encoded, tmp_path_factory):
    """(settings for training on them, folder of latents and token ids); `encoded` has written the pictures."""
    settings, out = with_text_encoder(teacher, teacher / ".." / "x"), tmp_path_factory.mktemp("ids")
    commands.encode_data(settings, out)
    settings.data.update(source="arrays", path=str(out))
    return settings, out


def test_captions_become_token_ids_and_later_passes_are_augmented(token_ids, encoded):
    train_rows = data.load(configure(source="arrays", path=str(token_ids[1])), "train")
    assert len(train_rows) == 16
    ids = train_rows.item(2, None)["text"]["input_ids"]
    assert ids.dtype == np.int32
    assert ids.tolist() == Letters()([train_rows.item(2, None)["caption"]], "max_length", 16, True)["input_ids"][0]
    assert train_rows.item(2, None)["null"]["input_ids"].tolist() == [0, *[1] * 15]
    first, again = (np.stack([train_rows.item(i, None)["x0"] for i in rows]) for rows in (range(8), range(8, 16)))
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(first, again, strict=True)])
    assert 0 < mirrored.sum() < 8
    once = data.load(configure(source="arrays", path=encoded[0].data.path, task="sr"), "train")
    np.testing.assert_array_equal(first[3], once.item(3, None)["x0"])


@pytest.mark.slow  # token ids are encoded and trained on in test_encoders
def test_the_text_encoder_is_trained_and_exported(token_ids, teacher, tmp_path, capsys):
    settings = token_ids[0]
    train.train(settings, tmp_path / "run")
    assert "text_encoder" in capsys.readouterr().out
    commands.export_run(settings, tmp_path / "run", str(tmp_path / "out"))
    difference = float(capsys.readouterr().out.split("at most ")[1].split()[0])
    assert difference < 1e-2
    old, new = (models.load(folder, "text_encoder").params for folder in (teacher, tmp_path / "out"))
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
    assert np.mean(moved) > 0.5
    api.sample_prompts(settings, tmp_path / "run", ["ab", "c"], str(tmp_path / "grid.png"))
    assert Image.open(tmp_path / "grid.png").size == (2 * 16 + 12, 16 + 8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher_steps": (4,)}, r"teacher_steps must be \(\) while the text encoder is trained"),
        ({"teacher": "emoji"}, "emoji has 0 text encoders; this method trains the one of its teacher"),
    ],
)
def test_what_training_a_text_encoder_needs(changes, sentence, token_ids, tmp_path):
    settings = token_ids[0].copy_and_resolve_references()
    for name, value in changes.items():
        setattr(settings.data if name in settings.data else settings, name, value)
    with pytest.raises(ValueError, match=sentence):
        train.train(settings, tmp_path)

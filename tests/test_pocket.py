"""The pocket pipeline, and the folder that its training starts from: tokenizer, sizes, and that both load."""

import functools

import jax
import numpy as np
import pytest

import cddistill
from cddistill import commands, config, generate, models, train
from cddistill.methods import METHODS
from cddistill.models import folders, tokenizer
from cddistill.net import Autoencoder, count
from cddistill.perceptual import latent_lpips
from cddistill.pipeline import Pipeline
from cddistill.precompute import make_pocket

TEXTS = ["a big red ball and a small blue cube", "red apple, noto style", "green apple, twemoji style"] * 4
PROMPTS = ["a red cube", "Green ball, noto style!", "zebra ünïcode 日本 it's 2024", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder made with few captions and a small VAE."""
    vae, output = (tmp_path_factory.mktemp(name) for name in ("vae", "pocket"))
    batch = {"x0": np.zeros((1, 64, 64, 3), np.float32)}
    net = METHODS["autoencoder"]().init(jax.random.key(0), {"autoencoder": Autoencoder()}, batch)["vae"]
    models.save(vae, "vae", net.params, net.encoder.module.to_config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_pocket, "captions", lambda: TEXTS)
        make_pocket.make(vae, output)
    return output


def test_the_folder_loads_as_a_pipeline_of_the_stated_size(folder):
    pipeline = Pipeline(str(folder))
    unet, vae, (text_encoder,) = pipeline.denoiser, pipeline.autoencoder, pipeline.prompts.nets
    assert (unet.predicts, unet.schedule.zero_snr, pipeline.x0_shape) == ("v", True, (16, 16, 4))
    weights = [sum(x.size for x in jax.tree.leaves(net.params)) for net in (unet, vae, text_encoder)]
    assert weights[0] < 10e6, count(unet.params)
    assert weights[1] < 2e6
    assert weights[2] < 3e6
    assert 2 * sum(weights) < 28e6  # bytes in float16


def test_the_shipped_pipeline_has_the_stated_size_and_was_trained():
    pipeline = Pipeline("pocket")
    assert (pipeline.denoiser.predicts, pipeline.denoiser.schedule.zero_snr) == ("v", True)
    assert pipeline.x0_shape == (16, 16, 4)
    assert sum(path.stat().st_size for path in pipeline.root.rglob("*")) < 28e6
    text = pipeline.prompts(["a big red ball", "a big blue cube"])["encoder_hidden_states"]
    assert np.abs(np.diff(text, axis=0)).max() > 0.1  # the text encoder tells colours apart


def test_its_latent_lpips_grows_with_distance():
    z = np.random.default_rng(0).normal(size=(3, 2, 16, 16, 4)).astype(np.float32)
    net, judge = latent_lpips.load("pocket"), jax.jit(lambda net, a, b: net(a, b))
    metric, x, noise = functools.partial(judge, net), 0.5 * z[0] + 0.5 * z[1], z[2]
    distances = [metric(x, x + scale * noise).mean() for scale in (0.0, 0.1, 0.5)]
    assert distances[0] == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < distances[1] < distances[2]


@pytest.mark.slow
def test_the_shipped_pipeline_draws_what_the_prompt_says():
    prompts = ["a big red cube", "a big green cube", "a big blue cube"]
    images = cddistill.sample(cddistill.load("pocket"), prompt=prompts, steps=8, guidance=4.0, seed=0)
    assert images.shape == (3, 64, 64, 3)
    purity = images - (images.sum(-1, keepdims=True) - images) / 2  # of each pixel in red, green and blue
    assert purity.reshape(3, -1, 3).max(1).argmax(1).tolist() == [0, 1, 2]


def test_the_shipped_lora_draws_what_the_prompt_says_in_four_steps():
    """pocket_dmd2, without guidance."""
    prompts = ["a big red cube", "a big green cube", "a big blue cube"]
    model = cddistill.load("pocket", lora="pocket_dmd2")
    assert model.steps == 4
    adapted, stored = (jax.tree.leaves(net.params) for net in (model.pipeline.denoiser, model.pipeline.stored))
    assert sum(bool((a != b).any()) for a, b in zip(adapted, stored, strict=True)) > 100
    images = cddistill.sample(model, prompt=prompts, seed=0)
    purity = images - (images.sum(-1, keepdims=True) - images) / 2  # of each pixel in red, green and blue
    assert purity.reshape(3, -1, 3).max(1).argmax(1).tolist() == [0, 1, 2]


def test_what_the_shipped_lora_is_not(tmp_path):
    with pytest.raises(ValueError, match="is a LoRA, not a whole network; pass it as config.lora"):
        cddistill.sample(cddistill.load("pocket_dmd2"), prompt="a ball")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="task= and lora= are for a folder"):
        cddistill.load(tmp_path, lora="pocket_dmd2")


def test_a_prompt_of_unknown_words_is_no_error_and_a_long_one_is_truncated(caplog):
    prompts = Pipeline("pocket").prompts
    assert np.isfinite(prompts(["zebra ünïcode 日本 flurble"])["encoder_hidden_states"]).all()
    with caplog.at_level("WARNING"):
        prompts(["red " * 100])
    assert "is truncated to 75" in caplog.text


def test_the_tokenizer_splits_unknown_words_into_bytes(folder):
    bpe = tokenizer.load(folder / "tokenizer")
    tokens = lambda text: bpe.bpe.encode(text).tokens[1:-1]
    assert tokens("Red  apple, noto") == ["red</w>", "apple</w>", ",</w>", "noto</w>"]
    (ids,) = bpe(["zebra 日本"])["input_ids"]
    assert len(ids) == 77
    assert bpe.bpe.token_to_id(tokenizer.END) not in ids[: ids.index(bpe.pad)]  # which is also the unknown token


def test_the_tokenizer_is_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    assert tokenizer.load(folder / "tokenizer")(PROMPTS, **options)["input_ids"] == theirs(PROMPTS, **options).input_ids


def test_prompts_are_embedded(folder):
    text = Pipeline(str(folder)).prompts(PROMPTS)["encoder_hidden_states"]
    assert text.shape == (4, 77, make_pocket.WIDTH)
    assert np.isfinite(text).all()


@pytest.mark.slow
def test_it_generates_as_pytorchs_stable_diffusion_pipeline(folder):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model = cddistill.load(str(folder))
    images = cddistill.sample(model, prompt=PROMPTS, steps=4, guidance=3.0, seed=5)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    noise = np.moveaxis(np.asarray(generate.noises(5, np.arange(4), model.shape, 1))[:, 0], -1, 1)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    theirs = pipe(PROMPTS, latents=torch.from_numpy(noise.copy()), **options).images
    assert np.abs(images - theirs).max() < 1e-4
    assert np.abs(images[0] - images[1]).max() > 1e-3  # the prompt matters


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "LoRA over the base"])
def test_a_student_generates_as_in_pytorch(student, form):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    if form != "folder":
        pytest.importorskip("peft")
    run, exported = student
    noise = np.moveaxis(np.asarray(generate.noises(5, np.arange(4), (16, 16, 4), 1))[:, 0], -1, 1)
    base = diffusers.StableDiffusionPipeline.from_pretrained(folders.ASSETS / "pocket", torch_dtype=torch.float32)
    options = {"latents": torch.from_numpy(noise.copy()), "guidance_scale": 1.0, "output_type": "np"}
    base.scheduler = diffusers.LCMScheduler.from_pretrained(exported, subfolder="scheduler")
    before, pipe = base(PROMPTS, timesteps=[999], **options).images, base
    if form == "folder":
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(exported, torch_dtype=torch.float32)
    else:
        base.load_lora_weights(exported)
    theirs = pipe(PROMPTS, timesteps=[999], **options).images
    ours = cddistill.sample(cddistill.load(str(run)), prompt=PROMPTS, steps=1, seed=5)
    difference = np.abs(ours - theirs).max()
    print(f"{form}: images differ by at most {difference:.2g}")
    assert difference < 5e-3  # exported weights are float16
    assert np.abs(before - theirs).max() > 10 * difference  # the LoRA has an effect


@pytest.fixture(scope="module")
def student(one_device, tmp_path_factory):
    """(workdir, exported folder) of a one-step student of the shipped pipeline, a LoRA after three updates."""
    run, exported = (tmp_path_factory.mktemp(name) for name in ("run", "exported"))
    c = config.defaults("dmd2")
    c.update(teacher="pocket", steps=3, batch_size=8, sample_steps=(1,), report=False, eval_every=9)
    c.data.update(source="icons", size=64, num_classes=33)
    c.method.update(student_timesteps=(999,), ratio=1, student_lora="blocks", fake_lora="attention", lora_rank=4)
    c.optim.lr = 1e-2
    train.train(c, run)
    commands.export_run(c, run, str(exported / "student"))
    return run, exported / "student"

"""The folder that the pocket teacher starts from: its tokenizer, its sizes, and that it loads as a pipeline."""

import jax
import numpy as np
import pytest

import cddistill
from cddistill import generate, models
from cddistill.methods import METHODS
from cddistill.models import tokenizer
from cddistill.net import Autoencoder, count
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

"""CLIP's image encoder and the CLIP score: parity with PyTorch transformers, from a folder of a whole CLIPModel."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from golden import make_clip
from golden import make_clip_vision as golden
from golden.make_models import weights
from PIL import Image

from cddistill.evals import clip_score
from cddistill.models import convert
from cddistill.models.clip import CLIPTextModelWithProjection
from cddistill.models.clip_vision import Apply, CLIPVisionModelWithProjection
from cddistill.models.init import weight_shapes
from cddistill.perceptual.lpips import WeightsMissing

RECORDED = np.load(Path(golden.__file__).parent / "clip_vision.npz")
ENCODERS = {"text_config": CLIPTextModelWithProjection, "vision_config": CLIPVisionModelWithProjection}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel as the hub has it, with the weights that make_clip_vision.py gave to transformers."""
    import flax.traverse_util

    path, tensors = tmp_path_factory.mktemp("clip") / "clip", {}
    make_clip.write_tokenizer(path, make_clip.END)
    for key, cls in ENCODERS.items():
        shapes = flax.traverse_util.flatten_dict(
            weight_shapes(cls.from_config(golden.CONFIG[key] | {"projection_dim": 20}))
        )
        theirs = {convert.torch_name(p): convert.to_torch(p, np.empty(x.shape)).shape for p, x in shapes.items()}
        tensors |= weights(theirs)
    assert sorted(tensors) == RECORDED["names"].tolist()
    tensors |= {"logit_scale": np.float32([4.6]), "vision_model.embeddings.position_ids": np.arange(10)[None]}
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps(golden.CONFIG))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return clip_score.load(folder)


def test_embeddings_equal_transformers(model, parity):
    params = (model.text.params, model.vision.params)
    given = clip_score.ids(model, golden.PROMPTS), golden.images()
    found = clip_score.embeddings(model.text.apply, model.vision.apply, params, *given)
    for network, ours, name in zip(ENCODERS.values(), found, ("text_embeds", "image_embeds"), strict=True):
        parity(f"{network.__name__}, of length 1", "output", ours, RECORDED[name])
    np.testing.assert_allclose(
        clip_score.cosines(model, golden.PROMPTS, golden.images()), RECORDED["cosines"], atol=1e-5
    )


def test_squares_are_prepared_as_by_transformers(monkeypatch):
    monkeypatch.setattr(clip_score.views, "square", lambda image, size: image)
    seen = clip_score.pixels(golden.picture()[:31], golden.VISION["image_size"])
    np.testing.assert_allclose(seen, RECORDED["seen"], atol=1e-5)


def test_score_is_that_of_each_image_and_its_prompt(model):
    """Images are first cropped and resized to 256 px, as in DMD2's evaluation."""
    pictures = [golden.picture(), golden.picture()[::-1].copy()]
    prepared = [np.asarray(Image.fromarray(x[4:35]).resize((256, 256), Image.Resampling.LANCZOS)) for x in pictures]
    both, swapped = (clip_score.score(model, golden.PROMPTS[::step], pictures) for step in (1, -1))
    assert both.shape == (2,)
    assert np.abs(both - swapped).min() > 1e-4
    np.testing.assert_allclose(clip_score.score(model, golden.PROMPTS, prepared), both, atol=1e-6)


def test_a_folder_without_clip_is_named(folder, tmp_path):
    with pytest.raises(WeightsMissing, match=r"clip/ is not there: download a CLIPModel in transformers' layout to it"):
        clip_score.load(tmp_path / "clip")
    config = golden.CONFIG | {"vision_config": golden.VISION | {"num_attention_heads": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hidden_size = 24 cannot be split into 5 attention heads"):
        clip_score.load(tmp_path)


def test_configs_are_read_and_written_as_by_transformers():
    assert CLIPVisionModelWithProjection.from_config({}) == CLIPVisionModelWithProjection()
    module = CLIPVisionModelWithProjection.from_config(golden.CONFIG)
    assert CLIPVisionModelWithProjection.from_config(module.to_config()) == module
    with pytest.raises(ValueError, match="patch_size = 14 is larger than image_size = 13"):
        CLIPVisionModelWithProjection.from_config(golden.VISION | {"patch_size": 14})
    with pytest.raises(ValueError, match=r"takes images \[b, 224, 224, 3\], not \(1, 8, 8, 3\)"):
        Apply(CLIPVisionModelWithProjection())({}, np.zeros((1, 8, 8, 3), np.float32))


@pytest.mark.slow
def test_weight_counts_of_the_published_models(parity):
    """OpenAI's ViT-L/14 with its projection, counted in transformers' class."""
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "patch_size": 14, "projection_dim": 768}  # fmt: skip
    shapes = weight_shapes(CLIPVisionModelWithProjection.from_config(large))
    parity.size("Image encoder of CLIP-L", shapes, 303_966_208)

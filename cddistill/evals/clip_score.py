"""CLIP score (Hessel et al. 2021, arXiv:2104.08718): the cosine between an image's and its prompt's CLIP embeddings.

Neither multiplied by 100 or 2.5 nor cut at 0, as papers on distillation print it (0.3 or so). The network is the user's
folder of a CLIPModel in transformers' layout, OpenAI's or OpenCLIP's.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from cddistill import io
from cddistill.data import images as pictures
from cddistill.evals import views
from cddistill.models import clip, clip_vision, convert, files, tokenizer
from cddistill.models.clip import CLIPTextModelWithProjection
from cddistill.models.clip_vision import CLIPVisionModelWithProjection
from cddistill.models.init import weight_shapes
from cddistill.net import Net
from cddistill.perceptual.lpips import WeightsMissing

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
BEFORE = 256  # px to which DMD2's and GigaGAN's evaluations resize images first


class Clip(NamedTuple):
    """Both encoders of a CLIP model, and the tokenizer."""

    text: Net  # token ids int [b, l] -> TextFeatures
    vision: Net  # normalised images [b, size, size, 3] -> [b, d]
    tokenize: tokenizer.ClipTokenizer


def load(folder: Path) -> Clip:
    """The CLIPModel in a folder: config.json, weights, and the tokenizer's files.

    Raises WeightsMissing if the folder is not there, ValueError naming what is missing or does not fit in it.
    """
    if not folder.is_dir():
        raise WeightsMissing(f"{folder}/ is not there: download a CLIPModel in transformers' layout to it")
    config = io.read_json(folder / "config.json", text_config=dict, vision_config=dict)
    shared = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    modules = {
        "text": CLIPTextModelWithProjection.from_config(config["text_config"] | shared),
        "vision": CLIPVisionModelWithProjection.from_config(config["vision_config"] | shared),
    }
    tensors, file = files.read(folder)
    nets = {}
    for kind, prefixes in (("text", ("text_",)), ("vision", ("vision_", "visual_"))):
        own = {name: x for name, x in tensors.items() if name.startswith(prefixes)}
        shapes = flax.traverse_util.flatten_dict(weight_shapes(modules[kind]))
        own = modules[kind].published(own, file)
        params = convert.match(own, shapes, convert.torch_name, convert.from_torch, file)
        nets[kind] = Net(convert.unflatten(params), {"text": clip, "vision": clip_vision}[kind].Apply(modules[kind]))
    return Clip(nets["text"], nets["vision"], tokenizer.load(folder))


def pixels(image: views.Pixels, size: int) -> Float[np.ndarray, "s s 3"]:
    """What CLIP sees: resized by Pillow's bicubic filter in 8 bits, cropped to size x size, normalised."""
    small = pictures.fit(Image.fromarray(views.square(image, BEFORE)), size)
    return (np.float32(small) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


def ids(model: Clip, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
    """Token ids of texts, cut at the encoder's length with the end token kept."""
    longest = model.text.module.max_position_embeddings
    return np.array(
        model.tokenize(texts, padding="max_length", max_length=longest, truncation=True)["input_ids"], np.int32
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def embeddings(text_apply, vision_apply, params, tokens, images) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """Those of texts and of images, of length 1."""
    found = text_apply(params[0], tokens).pooled, vision_apply(params[1], images)
    return tuple(x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in found)


def score(model: Clip, texts: Sequence[str], images: Sequence[views.Pixels]) -> Float[np.ndarray, " b"]:
    """The CLIP score of each image, uint8 [h, w, 3], and its text, in [-1, 1]."""
    return cosines(model, texts, np.stack([pixels(x, model.vision.apply.module.image_size) for x in images]))


def cosines(model: Clip, texts: Sequence[str], seen: Float[np.ndarray, "b h w c"]) -> Float[np.ndarray, " b"]:
    """The cosine of each text and its normalised image."""
    params = (model.text.params, model.vision.params)
    with jax.default_matmul_precision("highest"):
        a, b = embeddings(model.text.apply, model.vision.apply, params, ids(model, texts), seen)
    return np.asarray(a * b).sum(-1)

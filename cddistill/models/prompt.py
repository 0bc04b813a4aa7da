"""Prompt embeddings for Stable Diffusion's UNets: token features and, for SDXL, pooled feature and image sizes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import io
from cddistill.models import lora, tokenizer
from cddistill.models.families import FAMILIES, Family, family_of
from cddistill.net import Net


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to a UNet's `text`: prompts(["a cat"]), and prompts.null(1) as the negative of guidance.

    One tokenizer (called like transformers') and one CLIP text encoder for Stable Diffusion 1.x and 2.x, two of each
    for SDXL. Prompts longer than an encoder's positions (77 tokens) are truncated with a warning.
    """

    tokenizers: tuple[Callable, ...]
    nets: tuple[Net, ...]
    zero_null: bool = False  # SDXL's force_zeros_for_empty_prompt: the null text is zeros, not the empty prompt
    family: Family = FAMILIES["sd"]

    def __call__(self, texts, **sizes) -> dict:
        """{"encoder_hidden_states": float32 [b, 77, d]}; SDXL also has added_cond_kwargs: text_embeds and time_ids.

        sizes are keywords of `time_ids`; Stable Diffusion 1.x and 2.x ignore them. Raises ValueError for anything but a
        list of strings, and for a tokenizer that does not match its encoder.
        """
        return with_sizes(embed(self.family, self.nets, self.tokenize(texts)), **sizes)

    def null(self, n: int, **sizes) -> dict:
        """The text of n images for the empty prompt, with the same sizes as the prompt's; zeros if nets are shapes."""
        ids = self.tokenize([""])
        if self.zero_null or any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(self.nets)):
            shapes = jax.eval_shape(functools.partial(embed, self.family), self.nets, ids)
            one = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        else:
            one = embed(self.family, self.nets, ids)
        return with_sizes(jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), one), **sizes)

    def with_lora(self, path, scale: float = 1.0) -> "Prompts":
        """A copy with a LoRA file's text encoder part, if it has one, merged in at this scale."""
        names = self.family.text_encoders
        nets = lora.merge(path, dict(zip(names, self.nets, strict=True)), scale)
        return dataclasses.replace(self, nets=tuple(nets[name] for name in names))

    def tokenize(self, texts) -> tuple[np.ndarray, ...]:
        """Token ids for `embed`: int32 [b, 77] per encoder."""
        if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts are a list of at least one string, not {texts!r}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
            raise ValueError(f"the prompts {texts!r} are not valid Unicode: write them in UTF-8") from error
        return tuple(map(self.token_ids, self.tokenizers, self.nets, [list(texts)] * len(self.nets)))

    def token_ids(self, tokenize, net, texts):
        """One tokenizer's ids, int32 [b, l], padded or truncated to the positions of its encoder."""
        clip = net.module
        length = min(tokenize.model_max_length, clip.max_position_embeddings)
        tokens = tokenize(texts, padding="max_length", max_length=length, truncation=True)
        ids = np.array(tokens["input_ids"], np.int32)
        if ids.max() >= clip.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {ids.max()} but the text encoder has vocab_size = {clip.vocab_size}: "
                "load the tokenizer and the encoder of one pipeline"
            )
        return ids


@functools.partial(jax.jit, static_argnums=0)
def embed(family: Family, nets: tuple[Net, ...], ids: tuple[jax.Array, ...]) -> dict:
    """Token ids, [b, l] per text encoder, to a UNet's `text` without SDXL's time_ids."""
    return family.combine([net(i) for net, i in zip(nets, ids, strict=True)])


def embed_ids(text_encoder: Net, ids) -> dict:
    """Token ids [b, l] to a UNet's `text`, for teachers with one text encoder (Stable Diffusion 1.x and 2.x)."""
    return FAMILIES["sd"].combine([text_encoder(ids)])


def with_sizes(text: dict, **sizes) -> dict:
    """The text plus time_ids if it has a pooled feature (SDXL)."""
    if "added_cond_kwargs" not in text:
        return text
    ids = time_ids(len(text["encoder_hidden_states"]), **sizes)
    return text | {"added_cond_kwargs": text["added_cond_kwargs"] | {"time_ids": jnp.asarray(ids)}}


def time_ids(n: int, target_size=(1024, 1024), original_size=None, crop=(0, 0)) -> np.ndarray:
    """SDXL's size conditions, float32 [n, 6] (Podell et al. 2023, sec. 2.2).

    target_size is the (height, width) of the image, original_size its size before scaling (default target_size), crop
    the (top, left) corner of its crop, all in pixels: one pair for all images, or [n, 2].
    """
    parts = {"original_size": target_size if original_size is None else original_size}
    parts |= {"crop": crop, "target_size": target_size}
    for name, pair in parts.items():
        if np.shape(pair) not in ((2,), (n, 2)):
            raise ValueError(f"{name} must be one pair or one for each of {n} texts, not of shape {np.shape(pair)}")
    return np.concatenate([np.broadcast_to(np.asarray(pair, np.float32), (n, 2)) for pair in parts.values()], axis=1)


class Unworded:
    """Stands in for a tokenizer where only shapes count: every id is 0."""

    model_max_length = 2**30

    def __call__(self, texts, max_length: int, **how) -> dict:
        return {"input_ids": np.zeros((len(texts), max_length), np.int32)}


def load_prompts(folder, dtype=jnp.float32, shapes: bool = False) -> Prompts:
    """Load the tokenizers and text encoders of a diffusers pipeline: Stable Diffusion 1.x, 2.x or XL.

    folder is a path or a Hub id with model_index.json, tokenizer(_2)/ and text_encoder(_2)/; dtype is the compute type
    of the encoders' layers. shapes: as in `models.load`, and without tokenizers. Raises ValueError naming what is
    missing or unsupported.
    """
    from cddistill import models

    root = models.resolve(folder, "text_encoder")
    index = io.read_json(root / "model_index.json")
    encoders = sorted(k for k, v in index.items() if k.startswith("text_encoder") and v and v[-1])  # or [null, null]
    family = family_of(tuple(encoders), root)
    places = [root / name.replace("text_encoder", "tokenizer") for name in encoders]
    tokenizers = tuple(Unworded() if shapes else tokenizer.load(place) for place in places)
    nets = tuple(models.load(folder, name, dtype=dtype, shapes=shapes) for name in encoders)
    zero_null = family.zero_null and index.get("force_zeros_for_empty_prompt", True)
    return Prompts(tokenizers, nets, zero_null, family)

"""Prompts as Stable Diffusion's UNets take them: token features, and for SDXL a pooled feature and image sizes too."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cddistill.models import lora
from cddistill.net import Net

ENCODERS = (["text_encoder"], ["text_encoder", "text_encoder_2"])  # Stable Diffusion 1.x and 2.x; SDXL


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Texts to the `text` of a UNet: prompts(["a cat"]), and prompts.null(1) for guidance.

    One tokenizer (as transformers' are called) and one CLIP text encoder for Stable Diffusion 1.x and 2.x, two of each
    for SDXL. Texts of more tokens than an encoder has positions (77) are cut, as in diffusers.
    """

    tokenizers: tuple[Callable, ...]
    nets: tuple[Net, ...]
    zero_null: bool = False  # SDXL: the null text is zeros, not the empty prompt; force_zeros_for_empty_prompt

    def __call__(self, texts, **sizes) -> dict:
        """{"encoder_hidden_states": float32 [b, 77, d]}; SDXL also has added_cond_kwargs: text_embeds and time_ids.

        sizes are keywords of `time_ids`; Stable Diffusion 1.x and 2.x do not look at them. Raises ValueError for
        anything but a list of strings, and for a tokenizer that does not belong to its encoder.
        """
        return with_sizes(embed(self.nets, self.tokenize(texts)), **sizes)

    def null(self, n: int, **sizes) -> dict:
        """The text of n images without a prompt, with the sizes of those with one."""
        one = embed(self.nets, self.tokenize([""]))
        one = jax.tree.map(jnp.zeros_like, one) if self.zero_null else one
        return with_sizes(jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), one), **sizes)

    def adapted(self, path, scale: float = 1.0) -> "Prompts":
        """The same, with what a LoRA file holds for text encoders (nothing, if it is for UNets alone) merged in."""
        names = ENCODERS[len(self.nets) - 1]
        nets = lora.merge(path, dict(zip(names, self.nets, strict=True)), scale)
        return dataclasses.replace(self, nets=tuple(nets[name] for name in names))

    def tokenize(self, texts) -> tuple[np.ndarray, ...]:
        """What `embed` takes: int32 [b, 77] for each encoder."""
        if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts are a list of at least one string, not {texts!r}")
        return tuple(map(self.token_ids, self.tokenizers, self.nets, [list(texts)] * len(self.nets)))

    def token_ids(self, tokenizer, net, texts):
        """One tokenizer's ids: as many as its encoder has positions."""
        clip = net.module
        length = min(tokenizer.model_max_length, clip.max_position_embeddings)
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
        ids = np.array(tokens["input_ids"], np.int32)
        if ids.max() >= clip.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {ids.max()} but the text encoder has vocab_size = {clip.vocab_size}: "
                "they do not belong together"
            )
        return ids


@jax.jit
def embed(nets: tuple[Net, ...], ids: tuple[jax.Array, ...]) -> dict:
    """Token ids, one [b, l] per text encoder, to all of a UNet's `text` but SDXL's time_ids."""
    features = [net(i) for net, i in zip(nets, ids, strict=True)]
    if len(features) == 1:
        return {"encoder_hidden_states": features[0].last_hidden_state}
    hidden = jnp.concatenate([f.penultimate for f in features], -1)
    return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": features[-1].pooled}}


def with_sizes(text: dict, **sizes) -> dict:
    """The text with SDXL's time_ids where it has a pooled feature."""
    if "added_cond_kwargs" not in text:
        return text
    ids = time_ids(len(text["encoder_hidden_states"]), **sizes)
    return text | {"added_cond_kwargs": text["added_cond_kwargs"] | {"time_ids": jnp.asarray(ids)}}


def time_ids(n: int, target_size=(1024, 1024), original_size=None, crop=(0, 0)) -> np.ndarray:
    """SDXL's size conditions, float32 [n, 6] (Podell et al. 2023, sec. 2.2).

    target_size is the (height, width) of the image, original_size what it had before it was scaled (target_size if
    not given), crop the (top, left) corner it was cut at: each one pair, or a pair per image [n, 2].
    """
    parts = {"original_size": target_size if original_size is None else original_size}
    parts |= {"crop": crop, "target_size": target_size}
    for name, pair in parts.items():
        if np.shape(pair) not in ((2,), (n, 2)):
            raise ValueError(f"{name} must be one pair or one for each of {n} texts, not of shape {np.shape(pair)}")
    return np.concatenate([np.broadcast_to(np.asarray(pair, np.float32), (n, 2)) for pair in parts.values()], axis=1)


def load_prompts(folder, dtype=jnp.float32) -> Prompts:
    """The tokenizers and text encoders of a diffusers pipeline: Stable Diffusion 1.x, 2.x or XL.

    folder is a path or a Hub id with model_index.json, tokenizer(_2)/ and text_encoder(_2)/; dtype is what the
    encoders' layers compute in. Needs transformers (extra "text"). Raises ValueError naming what is missing or
    unsupported.
    """
    from cddistill import models
    from cddistill.models.convert import read_json

    root = models.resolve(folder, "text_encoder")
    index = read_json(root / "model_index.json")
    encoders = sorted(k for k, v in index.items() if k.startswith("text_encoder") and v and v[-1])  # or [null, null]
    if encoders not in ENCODERS:
        raise ValueError(f"{root} has the text encoders {encoders}; supported are {' and '.join(map(str, ENCODERS))}")
    tokenizers = tuple(load_tokenizer(root / name.replace("text_encoder", "tokenizer")) for name in encoders)
    nets = tuple(models.load(folder, name, dtype=dtype) for name in encoders)
    return Prompts(tokenizers, nets, len(nets) == 2 and index.get("force_zeros_for_empty_prompt", True))


def load_tokenizer(path: Path):
    """The CLIP tokenizer in a folder."""
    files = {file.name for file in path.glob("*.*")}
    if not ({"vocab.json", "merges.txt"} <= files or "tokenizer.json" in files):  # transformers would make an empty one
        raise ValueError(f"{path} holds neither vocab.json with merges.txt nor tokenizer.json")
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise ValueError("prompts need the tokenizers of transformers: pip install cddistill[text]") from error
    return CLIPTokenizer.from_pretrained(path)

"""CLIP's image encoder (Radford et al. 2021), a vision transformer, with the projection into the space of texts.

As in models/clip.py: parameter paths are transformers' names with ".3" written "_3", fields the keys of config.json.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cddistill.models import clip
from cddistill.models.configured import Configured, Entries, Epsilon, Layers, Size
from cddistill.typed import Width, brief

SUPPORTED = clip.SUPPORTED | {"model_type": ("clip_vision_model",)}


@dataclasses.dataclass(frozen=True)
class Apply:
    """An image encoder as a pure function of parameters and images. Equal when the modules are."""

    module: nn.Module

    def __call__(self, params, images):
        return self.module.apply({"params": params}, images)


class CLIPVisionEmbeddings(nn.Module):
    """A class token and the patches, plus learned position embeddings."""

    features: int
    patch: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        size, step = (self.patch, self.patch), (self.patch, self.patch)
        conv = nn.Conv(self.features, size, step, "VALID", use_bias=False, dtype=self.dtype, name="patch_embedding")
        patches = conv(images).reshape(len(images), -1, self.features)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (self.features,))
        first = jnp.broadcast_to(first.reshape(1, 1, -1).astype(patches.dtype), (len(images), 1, self.features))
        tokens = jnp.concatenate([first, patches], 1)
        n = tokens.shape[1]
        return tokens + nn.Embed(n, self.features, dtype=self.dtype, name="position_embedding")(jnp.arange(n))[None]


class CLIPVisionTransformer(nn.Module):
    """Embeddings, a norm, layers; the class token after the final norm."""

    embeddings: Any  # constructors, to be called with a name
    encoder: Any
    norm: Any

    @nn.compact
    def __call__(self, images):
        x = self.norm(name="pre_layrnorm")(self.embeddings(name="embeddings")(images))  # so spelt in every file
        return self.norm(name="post_layernorm")(self.encoder(name="encoder")(x)[1][:, 0])


class CLIPVisionModelWithProjection(Configured):
    """An image encoder; defaults are transformers'."""

    supported = SUPPORTED
    no_effect = clip.NO_EFFECT

    hidden_size: Width = 768
    intermediate_size: Entries = 3072
    projection_dim: Width = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 12
    num_channels: Width = 3
    image_size: Size = 224
    patch_size: Size = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    @classmethod
    def from_config(cls, config: dict, **run_options):
        """The module of a transformers config.json, or of the "vision_config" inside one."""
        inside = config.get("vision_config") or config
        if not isinstance(inside, dict):
            raise ValueError(f"vision_config = {brief(inside)} is no object {{...}}: download this config.json again")
        return super().from_config(inside, **run_options)

    def check(self):
        """Raise ValueError if hidden_size does not divide into the heads, or no patch fits into an image."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} cannot be split into {self.num_attention_heads} attention heads"
            )
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size = {self.patch_size} is larger than image_size = {self.image_size}")

    def to_config(self) -> dict:
        """This module's config.json, in transformers' format."""
        return {"architectures": [type(self).__name__], "model_type": "clip_vision_model", **self.options()}

    def published(self, tensors: dict, where) -> dict:
        """The weights among a file's tensors: old files hold the positions' numbers, too."""
        return {name: x for name, x in tensors.items() if not name.endswith("embeddings.position_ids")}

    def example(self):
        """Smallest inputs that use every weight, as (args, kwargs)."""
        return (jnp.zeros((1, self.image_size, self.image_size, self.num_channels)),), {}

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "b h w c"]) -> Float[Array, "b d"]:
        """Embeddings float32 [b, projection_dim] of normalised images [b, image_size, image_size, num_channels].

        Raises ValueError for images of another size.
        """
        expected = (self.image_size, self.image_size, self.num_channels)
        if images.shape[1:] != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"this image encoder takes images [b, {shape}], not {images.shape}")
        norm = partial(nn.LayerNorm, self.layer_norm_eps, dtype=self.dtype, use_fast_variance=False)
        layer = partial(
            nn.remat(clip.CLIPEncoderLayer) if self.remat else clip.CLIPEncoderLayer,
            partial(clip.CLIPAttention, self.num_attention_heads, self.dtype, causal=False),
            partial(clip.CLIPMLP, self.intermediate_size, self.hidden_act, self.dtype),
            norm,
        )
        embeddings = partial(CLIPVisionEmbeddings, self.hidden_size, self.patch_size, self.dtype)
        encoder = partial(clip.CLIPEncoder, self.num_hidden_layers, layer)
        pooled = CLIPVisionTransformer(embeddings, encoder, norm, name="vision_model")(images)
        out = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(pooled)
        return out.astype(jnp.float32)

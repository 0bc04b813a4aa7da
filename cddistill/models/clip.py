"""CLIP's text encoders (Radford et al. 2021): CLIP-L (SD 1.x, XL), OpenCLIP-H (SD 2.x), OpenCLIP-bigG (XL).

Parameter paths are transformers' names with ".3" written "_3"; fields are the keys of its config.json. Weights are
float32, `dtype` is the layers' compute type, and norms, softmax and outputs are float32.
"""

import dataclasses
from functools import partial
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.models.attention import attention
from cddistill.models.configured import Configured, Entries, Epsilon, Layers, rematerialised
from cddistill.typed import Width, brief, within


def quick_gelu(x):
    """The sigmoid approximation of GELU, used by OpenAI's CLIP; OpenCLIP uses the exact GELU."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": partial(nn.gelu, approximate=False)}
# Options of transformers and their supported values.
SUPPORTED = {
    "model_type": ("clip_text_model",),
    "hidden_act": tuple(ACTIVATIONS),
    "use_attention_mask": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
}
# Options of transformers without effect on a text encoder: names, training, token ids, generation.
NO_EFFECT = {
    "architectures", "tokenizer_class", "finetuning_task", "problem_type", "id2label", "label2id",
    "attention_dropout", "dropout", "initializer_factor", "initializer_range", "gradient_checkpointing",
    "use_bfloat16", "tf_legacy_loss", "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "prefix", "is_encoder_decoder", "tie_encoder_decoder",
    "tie_word_embeddings", "cross_attention_hidden_size", "task_specific_params", "torchscript", "return_dict",
    "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate", "use_cache",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip


class TextFeatures(NamedTuple):
    """Output of a text encoder, float32: features per token [b, l, d], and one vector per text."""

    last_hidden_state: jax.Array  # after the final norm
    penultimate: jax.Array  # transformers' hidden_states[-2]: input of the last layer, without the final norm
    pooled: jax.Array  # [b, d]: last_hidden_state at the end token, after text_projection if there is one


@dataclasses.dataclass(frozen=True)
class Apply:
    """A text encoder as a pure function of parameters and token ids. Equal when the modules are."""

    module: nn.Module

    def __call__(self, params, input_ids) -> TextFeatures:
        return self.module.apply({"params": params}, input_ids)


class CLIPAttention(nn.Module):
    """Multi-head self-attention, softmax in float32; causal in text encoders."""

    heads: int
    dtype: Any = jnp.float32
    causal: bool = True

    @nn.compact
    def __call__(self, x):
        b, n, d = x.shape
        q, k, v = (
            nn.Dense(d, dtype=self.dtype, name=f"{name}_proj")(x).reshape(b, n, self.heads, d // self.heads)
            for name in ("q", "k", "v")
        )
        h = attention(q, k, v, causal=self.causal).reshape(x.shape)
        return nn.Dense(d, dtype=self.dtype, name="out_proj")(h)


class CLIPMLP(nn.Module):
    """The MLP of a layer."""

    features: int
    hidden_act: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = ACTIVATIONS[self.hidden_act](nn.Dense(self.features, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each after a LayerNorm."""

    attention: Any  # constructors, to be called with a name
    mlp: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        x = x + self.attention(name="self_attn")(self.norm(name="layer_norm1")(x))
        return x + self.mlp(name="mlp")(self.norm(name="layer_norm2")(x))


class CLIPEncoder(nn.Module):
    """The layers; returns input and output of the last one."""

    num_layers: int
    layer: Any

    @nn.compact
    def __call__(self, x):
        before = x
        for i in range(self.num_layers):
            before, x = x, self.layer(name=f"layers_{i}")(x)
        return before, x


class CLIPTextEmbeddings(nn.Module):
    """Token embedding plus learned position embedding."""

    vocab_size: int
    positions: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids):
        tokens = nn.Embed(self.vocab_size, self.features, dtype=self.dtype, name="token_embedding")(input_ids)
        positions = nn.Embed(self.positions, self.features, dtype=self.dtype, name="position_embedding")
        return tokens + positions(jnp.arange(input_ids.shape[-1]))[None]


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers, final norm."""

    embeddings: Any
    encoder: Any
    norm: Any

    @nn.compact
    def __call__(self, input_ids):
        penultimate, last = self.encoder(name="encoder")(self.embeddings(name="embeddings")(input_ids))
        return penultimate, self.norm(name="final_layer_norm")(last)


class CLIPTextModel(Configured):
    """A text encoder; defaults are transformers'."""

    supported = SUPPORTED
    no_effect = NO_EFFECT

    vocab_size: Entries = 49408
    hidden_size: Width = 512
    intermediate_size: Entries = 2048
    projection_dim: Width = 512  # used by CLIPTextModelWithProjection only
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 8
    max_position_embeddings: Entries = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    eos_token_id: Annotated[int, within(least=0, most=2**24)] = 49407

    @classmethod
    def from_config(cls, config: dict, **run_options):
        """The module of a transformers config.json, or of the "text_config" inside one."""
        quantized = {k: v for k, v in config.items() if k == "quantization_config"}  # beside a text_config
        inside = config.get("text_config") or config
        if not isinstance(inside, dict):
            raise ValueError(f"text_config = {brief(inside)} is no object {{...}}: download this config.json again")
        return super().from_config(inside | quantized, **run_options)

    def check(self):
        """Raise ValueError if hidden_size does not divide into the heads."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} cannot be split into {self.num_attention_heads} attention heads"
            )

    def to_config(self) -> dict:
        """This module's config.json, in transformers' format."""
        return {"architectures": [type(self).__name__], "model_type": "clip_text_model", **self.options()}

    def published(self, tensors: dict, where) -> dict:
        """Tensors under transformers 4's names: 5 omits "text_model.", early versions store position_ids too."""
        prefix = "" if any(name.startswith("text_model.") for name in tensors) else "text_model."
        return {prefix + name: x for name, x in tensors.items() if not name.endswith("embeddings.position_ids")}

    def example(self):
        """Smallest inputs that use every weight, as (args, kwargs)."""
        return (jnp.zeros((1, 1), jnp.int32),), {}

    @nn.compact
    def __call__(self, input_ids) -> TextFeatures:
        """Features of integer token ids [b, l], l at most max_position_embeddings; ValueError otherwise."""
        self.check_inputs(input_ids)
        penultimate, last = self.transformer()(input_ids)
        at = end_of_text(input_ids, self.eos_token_id)[:, None, None]
        pooled = self.project(jnp.take_along_axis(last, at, axis=1)[:, 0])
        return TextFeatures(*(x.astype(jnp.float32) for x in (last, penultimate, pooled)))

    def project(self, pooled):
        """No projection in this class."""
        return pooled

    def transformer(self):
        """The submodule "text_model"."""
        norm = partial(nn.LayerNorm, self.layer_norm_eps, dtype=self.dtype, use_fast_variance=False)
        layer = partial(
            rematerialised(CLIPEncoderLayer, self.remat),
            partial(CLIPAttention, self.num_attention_heads, self.dtype),
            partial(CLIPMLP, self.intermediate_size, self.hidden_act, self.dtype),
            norm,
        )
        sizes = self.vocab_size, self.max_position_embeddings, self.hidden_size
        return CLIPTextTransformer(
            partial(CLIPTextEmbeddings, *sizes, self.dtype), partial(CLIPEncoder, self.num_hidden_layers, layer), norm,
            name="text_model",
        )  # fmt: skip

    def check_inputs(self, input_ids):
        """Raise ValueError for token ids of the wrong type or shape."""
        shape, longest = input_ids.shape, self.max_position_embeddings
        if len(shape) != 2 or not 1 <= shape[1] <= longest or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(
                f"input_ids must be integers [b, l] with 1 to {longest} tokens, not {input_ids.dtype} {shape}"
            )


class CLIPTextModelWithProjection(CLIPTextModel):
    """A text encoder with a projection of the pooled feature into CLIP's joint space: pooled [b, projection_dim]."""

    def project(self, pooled):
        return nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")(pooled)


def end_of_text(input_ids, eos_token_id: int):
    """Position of the end token in each text, int [b]: the first occurrence, since later ones are padding.

    Old configs have eos_token_id 2, which is wrong; there the end token is the one with the largest id.
    """
    return jnp.argmax(input_ids if eos_token_id == 2 else input_ids == eos_token_id, axis=-1)

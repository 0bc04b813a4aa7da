"""Attention as in diffusers: transformer blocks over image tokens, and plain spatial self-attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.models.blocks import GroupNorm, conv


def attend(x, context, heads: int, bias: bool, dtype):
    """Multi-head attention of x [b, l, d] to context [b, m, e], softmax in float32; call inside a compact module."""
    d = x.shape[-1]
    if d % heads:
        raise ValueError(f"{d} channels cannot be split into {heads} attention heads")
    q = nn.Dense(d, use_bias=bias, dtype=dtype, name="to_q")(x)
    k = nn.Dense(d, use_bias=bias, dtype=dtype, name="to_k")(context)
    v = nn.Dense(d, use_bias=bias, dtype=dtype, name="to_v")(context)
    q, k, v = (y.reshape(*y.shape[:2], heads, d // heads) for y in (q, k, v))
    h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    return nn.Dense(d, dtype=dtype, name="to_out_0")(h)


class Attention(nn.Module):
    """Self- or cross-attention of a transformer block."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        return attend(x, context, self.heads, False, self.dtype)


class SpatialAttention(nn.Module):
    """Residual self-attention over pixels; head_dim is really the width of a head here, unlike in the UNet's config."""

    head_dim: int
    groups: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, self.eps, self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        if c % self.head_dim:
            raise ValueError(f"{c} channels cannot be split into heads of width attention_head_dim = {self.head_dim}")
        return x + attend(tokens, tokens, c // self.head_dim, True, self.dtype).reshape(x.shape)


class GEGLU(nn.Module):
    """Gated linear unit with the exact (erf) GELU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, -1)
        return x * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The transformer block's perceptron, four times as wide inside."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)  # net_1 is dropout


class BasicTransformerBlock(nn.Module):
    """Self-attention (or a first cross-attention), cross-attention, perceptron; each behind a LayerNorm."""

    heads: int
    only_cross_attention: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        norm1, norm2, norm3 = (
            nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name=f"norm{i}") for i in (1, 2, 3)
        )
        h = norm1(x)
        x = x + Attention(self.heads, self.dtype, name="attn1")(h, context if self.only_cross_attention else h)
        x = x + Attention(self.heads, self.dtype, name="attn2")(norm2(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm3(x))


class Transformer2DModel(nn.Module):
    """A stack of transformer blocks over pixels, between two projections (1x1 convolutions or linear layers)."""

    heads: int
    depth: int
    groups: int
    linear: bool = False
    only_cross_attention: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        b, h, w, c = x.shape

        def project(y, name):  # the same product; only the shape of the stored kernel differs
            if self.linear:
                return nn.Dense(c, dtype=self.dtype, name=name)(y)
            return conv(c, 1, self.dtype, name)(y)

        y = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)  # not norm_eps
        y = project(y, "proj_in").reshape(b, h * w, c)
        for i in range(self.depth):
            y = BasicTransformerBlock(
                self.heads, self.only_cross_attention, self.dtype, name=f"transformer_blocks_{i}"
            )(y, context)
        return x + project(y.reshape(x.shape), "proj_out")

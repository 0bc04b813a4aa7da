"""Convolutional blocks of diffusers' networks, channels-last, with diffusers' parameter names; norms in float32."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.models.convolution import conv_general_dilated, enlarged, of_enlarged, saves


class DecoderLevel(NamedTuple):
    """Decoder features at one resolution of a U-Net, each [b, h, w, c]."""

    before: jax.Array  # input of the level, from the next coarser one
    skip: jax.Array  # the first encoder feature that it is concatenated with
    after: jax.Array  # output of the last block, before upsampling


class GroupNorm(nn.Module):
    """Group normalisation of x [b, ..., c] over groups of channels, computed in float32."""

    groups: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(f"{c} channels cannot be split into norm_num_groups = {self.groups} groups")
        scale, bias = self.param("scale", nn.initializers.ones, (c,)), self.param("bias", nn.initializers.zeros, (c,))
        x32 = x.astype(jnp.float32).reshape(x.shape[0], -1, c)

        def mean(y):  # per group, repeated per channel: only [b, c] is reshaped
            y = y.mean(1).reshape(-1, self.groups, c // self.groups).mean(-1)
            return jnp.repeat(y, c // self.groups, axis=1)[:, None]

        centred = x32 - mean(x32)
        gain = jax.lax.rsqrt(mean(centred**2) + self.eps) * scale[None, None]
        return (centred * gain + bias[None, None]).reshape(x.shape).astype(self.dtype)


def conv(features: int, kernel: int, dtype, name: str | None, stride: int = 1, padding=None,
         convolve=conv_general_dilated) -> nn.Conv:  # fmt: skip
    """A square convolution; padding None is PyTorch's symmetric (kernel - 1) // 2. `convolve` computes it."""
    padding = (kernel - 1) // 2 if padding is None else padding
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding, dtype=dtype, name=name,
        conv_general_dilated=convolve,
    )  # fmt: skip


def sinusoid(t, dim: int, flip_sin_to_cos: bool, freq_shift: int):
    """Sinusoidal embedding of timesteps [b]: float32 [b, dim], sin then cos, or cos first if flipped."""
    half = dim // 2
    frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    parts = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
    return jnp.concatenate(parts, -1)


class TimestepEmbedding(nn.Module):
    """Two-layer MLP from sinusoidal features [b, d] and an optional condition [b, cond_proj_dim] to [b, features]."""

    features: int
    cond_proj_dim: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, cond=None):
        if self.cond_proj_dim is not None:
            zero = jnp.zeros((x.shape[0], self.cond_proj_dim), self.dtype)
            project = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")
            x = x + project(zero if cond is None else cond)
        x = nn.silu(nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(x)


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, twice, with the timestep embedding in between and a 1x1 shortcut where the width changes."""

    channels: int
    groups: int
    eps: float
    scale_shift: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, emb=None):
        h = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x))
        h = conv(self.channels, 3, self.dtype, "conv1")(h)
        norm2 = GroupNorm(self.groups, self.eps, self.dtype, name="norm2")
        if emb is not None:  # None in autoencoders
            width = self.channels * (2 if self.scale_shift else 1)
            emb = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(nn.silu(emb))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(emb, 2, -1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h if emb is None else h + emb)
        h = conv(self.channels, 3, self.dtype, "conv2")(nn.silu(h))
        shortcut = conv(self.channels, 1, self.dtype, "conv_shortcut") if x.shape[-1] != self.channels else lambda y: y
        return shortcut(x) + h


class Downsample2D(nn.Module):
    """Strided convolution; padding 0 pads one row below and one column on the right, as in diffusers."""

    channels: int
    padding: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        padding = self.padding or ((0, 1), (0, 1))
        return conv(self.channels, 3, self.dtype, "conv", stride=2, padding=padding)(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        if saves(x, self.channels):
            return conv(self.channels, 3, self.dtype, "conv", convolve=of_enlarged)(x)
        return conv(self.channels, 3, self.dtype, "conv")(enlarged(x))  # jax2onnx ignores what convolve does


class DownBlock2D(nn.Module):
    """Resnets, each with optional attention, then an optional downsampler: (output, all outputs as skips)."""

    num_layers: int
    resnet: Any  # constructors, to be called with a name
    attention: Any  # and with the layer's number in the block
    downsampler: Any

    @nn.compact
    def __call__(self, h, emb, context):
        skips = ()
        for i in range(self.num_layers):
            h = self.resnet(name=f"resnets_{i}")(h, emb)
            h = self.attention(i, name=f"attentions_{i}")(h, context) if self.attention else h
            skips += (h,)
        if self.downsampler:
            h = self.downsampler(name="downsamplers_0")(h)
            skips += (h,)
        return h, skips


class MidBlock2D(nn.Module):
    """A resnet, or two with attention in between."""

    resnet: Any
    attention: Any

    @nn.compact
    def __call__(self, h, emb, context):
        h = self.resnet(name="resnets_0")(h, emb)
        if self.attention:
            h = self.attention(0, name="attentions_0")(h, context)
            h = self.resnet(name="resnets_1")(h, emb)
        return h


class UpBlock2D(nn.Module):
    """Resnets, each with one skip and optional attention, then an optional upsampler: (output, its input)."""

    resnet: Any
    attention: Any
    upsampler: Any

    @nn.compact
    def __call__(self, h, skips, emb, context):
        for i, skip in enumerate(reversed(skips)):
            h = self.resnet(name=f"resnets_{i}")(jnp.concatenate([h, skip], -1), emb)
            h = self.attention(i, name=f"attentions_{i}")(h, context) if self.attention else h
        upsampled = self.upsampler(name="upsamplers_0")(h) if self.upsampler else h
        return upsampled, h

"""Blocks of the pixel U-Nets of Karras et al. 2022 (EDM), channels-last: resampling, residual block, encoder, decoder.

One block serves both families, ADM (Dhariwal & Nichol 2021) and DDPM++/NCSN++ (Song et al. 2021); `Style` holds the
differences. Parameter names are those of the published checkpoints; norms and softmax are float32.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.models.attention import attention
from cddistill.models.blocks import DecoderLevel, GroupNorm, conv
from cddistill.models.configured import rematerialised

ROOT_HALF = 0.5**0.5  # preserves the variance in a sum of two


class Level(NamedTuple):
    """One resolution of a U-Net."""

    size: int  # of training images at this level; only parameter names depend on it
    width: int
    attends: bool

    @property
    def name(self) -> str:
        return f"{self.size}x{self.size}"


@dataclasses.dataclass(frozen=True)
class Style:
    """Options in which the blocks of the two families differ."""

    adaptive_scale: bool  # the embedding scales and shifts after the second norm; else it is added before
    skip_scale: float  # factor of every residual sum
    head_width: int | None  # channels per attention head; None is a single head
    project_resampled: bool  # 1x1 convolution on the skip path of resampling blocks
    eps: float
    taps: tuple[int, ...]  # the resampling filter along one axis
    dtype: Any
    remat: bool | str
    flash: bool

    def block(self, width: int, name: str, attends: bool = False, resample: str = ""):
        """A residual block, rematerialised if remat is set."""
        return rematerialised(UNetBlock, self.remat)(self, width, attends, resample, name=name)

    def norm(self, x, name: str):
        """Group normalisation, groups of at least four channels. Call inside a compact module."""
        return GroupNorm(min(32, x.shape[-1] // 4), self.eps, self.dtype, name=name)(x)


def resample(x, taps, up: bool, edge: int | None = None):
    """Upsample or downsample x [b, h, w, c] by 2 with a separable symmetric filter that has an even number of taps.

    The filter has unit gain. `edge` zeros are padded on each side; the default gives height 2 h or h / 2.
    """
    k, stride, gain = len(taps), 1 if up else 2, (2 if up else 1) / sum(taps)
    edge = (k // 2 if up else k // 2 - 1) if edge is None else edge
    for axis in (1, 2):
        padding = [(edge, edge, int(up)) if a == axis else (0, 0, 0) for a in range(4)]  # up: also zeros in between
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
        last = (padded.shape[axis] - k) // stride * stride
        shifted = [jax.lax.slice_in_dim(padded, i, i + last + 1, stride, axis) for i in range(k)]
        x = sum(gain * tap * part for tap, part in zip(taps, shifted, strict=True))  # far faster than a depthwise conv
    return x


class UNetBlock(nn.Module):
    """Optional resampling, two convolutions with the embedding in between, optional self-attention."""

    style: Style
    width: int
    attends: bool = False
    resample: str = ""  # "up", "down" or "" for neither

    @nn.compact
    def __call__(self, x, emb):
        style, dtype = self.style, self.style.dtype
        h = self.resampled(nn.silu(style.norm(x, "norm0")))
        h = conv(self.width, 3, dtype, "conv0")(h)
        affine = nn.Dense(self.width * (2 if style.adaptive_scale else 1), name="affine")  # float32, like emb
        emb = affine(emb)[:, None, None].astype(dtype)
        if style.adaptive_scale:
            scale, shift = jnp.split(emb, 2, -1)
            h = style.norm(h, "norm1") * (1 + scale) + shift
        else:
            h = style.norm(h + emb, "norm1")
        h = conv(self.width, 3, dtype, "conv1")(nn.silu(h))
        skip = self.resampled(x)
        if x.shape[-1] != self.width or (self.resample and style.project_resampled):
            skip = conv(self.width, 1, dtype, "skip")(skip)
        h = (h + skip) * style.skip_scale
        return (h + self.attention(h)) * style.skip_scale if self.attends else h

    def resampled(self, x):
        """x at the block's output resolution."""
        return resample(x, self.style.taps, self.resample == "up") if self.resample else x

    def attention(self, x):
        """Self-attention over pixels; q, k and v are interleaved per channel in the published weights."""
        (b, h, w, c), head = x.shape, self.style.head_width or x.shape[-1]
        if c % head:
            raise ValueError(f"{c} channels cannot be split into attention heads of channels_per_head = {head}")
        qkv = conv(3 * c, 1, self.style.dtype, "qkv")(self.style.norm(x, "norm2"))
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, c // head, head, 3), -1, 0)
        attended = attention(q, k, v, flash=self.style.flash).reshape(x.shape)
        return conv(c, 1, self.style.dtype, "proj")(attended)


class Encoder(nn.Module):
    """From the image to all skips; the last one is the bottleneck.

    level_input(i, feature), if given, replaces the feature that level i starts with, also as skip.
    """

    style: Style
    levels: tuple[Level, ...]
    num_blocks: int
    stem: int  # channels of the first convolution
    kind: str = "standard"  # or "skip", "residual": the image is also an input of every level

    @nn.compact
    def __call__(self, x, emb, level_input=None):
        skips, image = [], x
        for i, level in enumerate(self.levels):
            if not skips:
                h = conv(self.stem, 3, self.style.dtype, f"{level.name}_conv")(x)
            else:
                h = self.style.block(h.shape[-1], f"{level.name}_down", resample="down")(h, emb)
                h, image = self.add_image(h, image, level.name)
            h = level_input(i, h) if level_input else h
            skips.append(h)
            for k in range(self.num_blocks):
                h = self.style.block(level.width, f"{level.name}_block{k}", level.attends)(h, emb)
                skips.append(h)
        return tuple(skips)

    def add_image(self, h, image, name):
        """Progressive input (Song et al. 2021, appendix H.1): (h plus downsampled image, image for the next level)."""
        taps, dtype = self.style.taps, self.style.dtype
        if self.kind == "skip":
            image = resample(image, taps, up=False)
            h = h + conv(h.shape[-1], 1, dtype, f"{name}_aux_skip")(image)
        if self.kind == "residual":  # convolved with zero padding, then filtered and downsampled
            edge = len(taps) // 2 - 1
            image = conv(h.shape[-1], 3, dtype, f"{name}_aux_residual", padding=1 + edge)(image)
            h = image = (h + resample(image, taps, up=False, edge=0)) * ROOT_HALF
        return h, image


class Decoder(nn.Module):
    """From the skips to (output, DecoderLevels, coarsest first).

    The output is an image or, for kind "none", the last feature.
    """

    style: Style
    levels: tuple[Level, ...]
    num_blocks: int
    attends_once: bool  # attention only after a level's last block, not after each
    out_channels: int = 0
    kind: str = "none"  # or "standard", or "skip": the sum of one image per level

    @nn.compact
    def __call__(self, skips, emb):
        skips, image, levels = list(skips), None, ()
        h, coarsest = skips[-1], self.levels[-1]
        for level in reversed(self.levels):
            if level == coarsest:
                h = self.style.block(h.shape[-1], f"{level.name}_in0", attends=True)(h, emb)
                h = self.style.block(h.shape[-1], f"{level.name}_in1")(h, emb)
            else:
                h = self.style.block(h.shape[-1], f"{level.name}_up", resample="up")(h, emb)
            before, skip = h, skips[-1]
            for i in range(self.num_blocks + 1):
                attends = level.attends and (i == self.num_blocks or not self.attends_once)
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self.style.block(level.width, f"{level.name}_block{i}", attends)(h, emb)
            levels += (DecoderLevel(before, skip, h),)
            if self.kind == "skip" or (self.kind == "standard" and level == self.levels[0]):
                image = self.add_image(h, image, level.name)
        return (h if image is None else image), levels

    def add_image(self, h, image, name):
        """This level's image plus the upsampled one of the coarser level (Song et al. 2021, appendix H.1)."""
        h = nn.silu(self.style.norm(h, f"{name}_aux_norm"))
        new = conv(self.out_channels, 3, self.style.dtype, f"{name}_aux_conv")(h)
        return new if image is None else new + resample(image, self.style.taps, up=True)

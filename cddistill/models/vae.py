"""diffusers' AutoencoderKL in Flax: the autoencoders of Stable Diffusion 1.x, 2.x, XL, 3 and Flux.

Parameter paths are diffusers' names with ".3" written "_3", as in `unet`. An autoencoder is used as a net:

    autoencoder = Autoencoder(params, Encode(module), Decode(module))  # of an AutoencoderKL or AutoencoderTiny
    z = autoencoder.encode(x)  # x in [-1, 1]; z has about unit variance
    x = autoencoder.decode(z)
"""

import dataclasses
import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cddistill.models.attention import SpatialAttention
from cddistill.models.blocks import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, conv
from cddistill.models.configured import (
    Blocks,
    Configured,
    Scale,
    Shift,
    Sizes,
    Widths,
    check_groups,
    check_layers,
    rematerialised,
)
from cddistill.typed import Width

EPS = 1e-6  # of every norm
SUPPORTED = {"act_fn": ("silu", "swish")}  # options of diffusers without a field below: their supported values
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Block(nn.Module):
    """Resnets, then an optional resampler: diffusers' DownEncoderBlock2D and UpDecoderBlock2D."""

    num_layers: int
    resnet: Any  # constructors; resnet is called with a name
    resampler: Any

    @nn.compact
    def __call__(self, h):
        for i in range(self.num_layers):
            h = self.resnet(name=f"resnets_{i}")(h)
        return self.resampler()(h) if self.resampler else h


class MidBlock(nn.Module):
    """Two resnets with optional attention in between; unlike in a UNet, always two."""

    resnet: Any
    attention: Any

    @nn.compact
    def __call__(self, h):
        h = self.resnet(name="resnets_0")(h)
        h = self.attention(name="attentions_0")(h) if self.attention else h
        return self.resnet(name="resnets_1")(h)


class Coder(nn.Module):
    """Base of encoder and decoder."""

    features: int  # output channels
    widths: tuple[int, ...]
    num_layers: int  # resnets per block of the encoder; the decoder has one more
    groups: int
    attention: bool
    dtype: Any
    remat: bool | str
    flash: bool

    def block(self, cls):
        """The block's class, rematerialised if remat is set."""
        return rematerialised(cls, self.remat)

    def resnet(self, i):
        """Constructor of the resnets of width i."""
        return partial(ResnetBlock2D, self.widths[i], self.groups, EPS, dtype=self.dtype)

    def middle(self, h):
        """The mid block; its attention has one head of full width."""
        attention = partial(SpatialAttention, self.widths[-1], self.groups, EPS, self.dtype, self.flash)
        return self.block(MidBlock)(self.resnet(-1), attention if self.attention else None, name="mid_block")(h)

    def head(self, h):
        """Norm, SiLU and output convolution."""
        h = nn.silu(GroupNorm(self.groups, EPS, self.dtype, name="conv_norm_out")(h))
        return conv(self.features, 3, self.dtype, "conv_out")(h)


class Encoder(Coder):
    """Images [b, f h, f w, c] to [b, h, w, features]; each further width halves h and w."""

    @nn.compact
    def __call__(self, x):
        h = conv(self.widths[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(self.widths):
            down = partial(Downsample2D, width, 0, self.dtype, name="downsamplers_0")
            last = i == len(self.widths) - 1
            h = self.block(Block)(self.num_layers, self.resnet(i), None if last else down, name=f"down_blocks_{i}")(h)
        return self.head(self.middle(h))


class Decoder(Coder):
    """Latents [b, h, w, c] to images [b, f h, f w, features]; each further width doubles h and w."""

    @nn.compact
    def __call__(self, z):
        h = self.middle(conv(self.widths[-1], 3, self.dtype, "conv_in")(z))
        for j, i in enumerate(reversed(range(len(self.widths)))):
            up = partial(Upsample2D, self.widths[i], self.dtype, name="upsamplers_0") if i else None
            h = self.block(Block)(self.num_layers + 1, self.resnet(i), up, name=f"up_blocks_{j}")(h)
        return self.head(h)


class AutoencoderKL(Configured):
    """Encoder and decoder of unscaled latents, which `to_latent` and `from_latent` scale for the diffusion model."""

    supported = SUPPORTED

    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: Widths = (64,)
    layers_per_block: Blocks = 1
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    sample_size: Sizes = 32  # only written to configs
    scaling_factor: Scale = 0.18215
    shift_factor: Shift | None = None
    latents_mean: tuple[Shift, ...] | None = None  # per channel, instead of shift_factor (Playground 2.5)
    latents_std: tuple[Scale, ...] | None = None
    force_upcast: bool = True  # SDXL's overflows in float16; only written to configs
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def published(self, tensors: dict, where) -> dict:
        """Tensors under current PyTorch names: attention's were once query, key, value and proj_attn."""
        old = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(OLD_NAMES)})(?=\.)")
        return {old.sub(lambda match: OLD_NAMES[match[0]], name): x for name, x in tensors.items()}

    def check(self):
        """Raise ValueError for options that contradict each other."""
        n, types = len(self.block_out_channels), {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
        for way, only in types.items():
            if (found := getattr(self, f"{way}_block_types")) != (only,) * n:
                raise ValueError(
                    f"{way}_block_types must be {n} times {only}, once per block_out_channels, not {found}"
                )
        check_layers(n * self.layers_per_block, "layers_per_block and block_out_channels")
        check_groups(self.block_out_channels, self.norm_num_groups)
        statistics = [x for x in (self.latents_mean, self.latents_std) if x is not None]
        if statistics and (len(statistics) == 1 or {*map(len, statistics)} != {self.latent_channels}):
            raise ValueError(f"latents_mean and latents_std must both have {self.latent_channels} entries, or be null")
        if statistics and self.shift_factor:
            raise ValueError(f"latents_mean and shift_factor = {self.shift_factor} are alternatives: keep one")

    def example(self):
        """Smallest inputs that use every weight, as (args, kwargs)."""
        return (jnp.zeros((1, self.factor, self.factor, self.in_channels)),), {}

    @property
    def factor(self) -> int:
        """Height of an image divided by that of its latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        shared = (
            self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.mid_block_add_attention,
            self.dtype, self.remat, self.flash,
        )  # fmt: skip
        self.encoder = Encoder(2 * self.latent_channels, *shared)
        self.decoder = Decoder(self.out_channels, *shared)
        # if the config disables them, these two are never called and have no weights
        self.quant_conv = conv(2 * self.latent_channels, 1, self.dtype, None)
        self.post_quant_conv = conv(self.latent_channels, 1, self.dtype, None)

    def __call__(self, x):
        """Reconstruction float32 of x [b, f h, f w, c] in [-1, 1] from the mean of its posterior."""
        return self.decode(self.encode(x)[..., : self.latent_channels])

    def encode(self, x):
        """Posterior of x [b, f h, f w, c] in [-1, 1]: unscaled mean and log variance [b, h, w, 2 latent_channels]."""
        check_images(self, x)
        h = self.encoder(x)
        return (self.quant_conv(h) if self.use_quant_conv else h).astype(jnp.float32)

    def decode(self, z):
        """Images float32 [b, f h, f w, c], about in [-1, 1], of unscaled latents [b, h, w, latent_channels]."""
        check_latents(self, z)
        return self.decoder(self.post_quant_conv(z) if self.use_post_quant_conv else z).astype(jnp.float32)

    def shift_scale(self):
        """(shift, scale) of the scaled latent (unscaled - shift) * scale."""
        if self.latents_mean is None:
            return self.shift_factor or 0.0, self.scaling_factor
        mean, std = (np.array(x, np.float32).reshape(1, 1, 1, -1) for x in (self.latents_mean, self.latents_std))
        return mean, self.scaling_factor / std

    def to_latent(self, moments, key):
        """The diffusion model's z from `encode`'s output: the posterior's mean or, with a key or keys [b], a sample."""
        mean, logvar = jnp.split(moments, 2, -1)
        if key is not None:
            keys = key if key.ndim else jax.random.split(key, len(mean))
            noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(keys)
            mean = mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise
        shift, scale = self.shift_scale()
        return (mean - shift) * scale

    def from_latent(self, z):
        """`decode`'s input from the diffusion model's z."""
        shift, scale = self.shift_scale()
        return z / scale + shift


@dataclasses.dataclass(frozen=True)
class Encode:
    """Images x [b, f h, f w, c] in [-1, 1] to latents z [b, h, w, latent_channels], as a pure function.

    z is the posterior's mean or, with a key, a sample: one key for the batch, or one per image, so that the sample does
    not depend on the device that computes it. Equal when the modules are.
    """

    module: nn.Module

    def __call__(self, params, x, key=None):
        return self.module.to_latent(self.module.apply({"params": params}, x, method="encode"), key)

    def posterior(self, params, x):
        """Mean and log variance [b, h, w, latent_channels] of the unscaled latents of an AutoencoderKL."""
        return jnp.split(self.module.apply({"params": params}, x, method="encode"), 2, -1)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Latents z [b, h, w, latent_channels] to images [b, f h, f w, c], about in [-1, 1], as a pure function."""

    module: nn.Module

    def __call__(self, params, z):
        return self.module.apply({"params": params}, self.module.from_latent(z), method="decode")


def check_images(module, x):
    """Raise ValueError for images whose shape does not fit the autoencoder."""
    _, h, w, c = x.shape
    if c != module.in_channels:
        raise ValueError(f"the autoencoder takes images of in_channels = {module.in_channels}, but x has {c}")
    if h % module.factor or w % module.factor:
        raise ValueError(f"height {h} and width {w} must be divisible by {module.factor}, the downsampling factor")


def check_latents(module, z):
    """Raise ValueError for latents with the wrong number of channels."""
    if z.shape[-1] != module.latent_channels:
        raise ValueError(f"the autoencoder has latent_channels = {module.latent_channels}, but z has {z.shape[-1]}")

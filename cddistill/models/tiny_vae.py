"""diffusers' AutoencoderTiny in Flax: TAESD, TAESDXL, TAESD3 and TAEF1 of Ollin Boer Bohan.

Distilled from the large autoencoders: the same latents, already scaled, much cheaper, without a posterior. Used like
AutoencoderKL, with the same `Encode` and `Decode`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cddistill.models.blocks import conv
from cddistill.models.configured import Blocks, Configured, Scale, Shift, Widths, check_layers, rematerialised
from cddistill.models.vae import check_images, check_latents
from cddistill.typed import Width

# Options of diffusers without a field below: their supported values.
SUPPORTED = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}
NO_EFFECT = {"block_out_channels"}  # written by diffusers but not used


class AutoencoderTinyBlock(nn.Module):
    """Three convolutions with a residual connection."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = nn.relu(conv(x.shape[-1], 3, self.dtype, "conv_0")(x))
        h = nn.relu(conv(x.shape[-1], 3, self.dtype, "conv_2")(h))
        return nn.relu(conv(x.shape[-1], 3, self.dtype, "conv_4")(h) + x)


class Layers(nn.Module):
    """PyTorch's Sequential of stages with resampling in between; parameter names count its entries."""

    num_blocks: tuple[int, ...]
    width: int
    features: int  # output channels
    dtype: Any
    remat: bool | str

    def stage(self, h, first: int, num_blocks: int):
        """Blocks at the Sequential's positions from `first`: (feature, next position)."""
        block = rematerialised(AutoencoderTinyBlock, self.remat)
        for i in range(first, first + num_blocks):
            h = block(self.dtype, name=f"layers_{i}")(h)
        return h, first + num_blocks

    def resample(self, i: int, stride: int):
        """The convolution at position i: of stride 2 to downsample, or of stride 1 after upsampling."""
        return nn.Conv(self.width, (3, 3), stride, 1, use_bias=False, dtype=self.dtype, name=f"layers_{i}")


class EncoderTiny(Layers):
    """Image in [0, 1] to latent."""

    @nn.compact
    def __call__(self, x):
        h, i = self.stage(conv(self.width, 3, self.dtype, "layers_0")(x), 1, self.num_blocks[0])
        for num_blocks in self.num_blocks[1:]:
            h, i = self.stage(self.resample(i, stride=2)(h), i + 1, num_blocks)
        return conv(self.features, 3, self.dtype, f"layers_{i}")(h)


class DecoderTiny(Layers):
    """Latent to image in [0, 1]."""

    @nn.compact
    def __call__(self, z):
        h = nn.relu(conv(self.width, 3, self.dtype, "layers_0")(z))
        h, i = self.stage(h, 2, self.num_blocks[0])  # layers_1 is the ReLU
        for num_blocks in self.num_blocks[1:]:  # layers_i is the upsampling
            h = self.resample(i + 1, stride=1)(jnp.repeat(jnp.repeat(h, 2, 1), 2, 2))
            h, i = self.stage(h, i + 2, num_blocks)
        return conv(self.features, 3, self.dtype, f"layers_{i}")(h)


class AutoencoderTiny(Configured):
    """Encoder and decoder, with the methods of AutoencoderKL."""

    supported = SUPPORTED
    no_effect = NO_EFFECT

    in_channels: Width = 3
    out_channels: Width = 3
    encoder_block_out_channels: Widths = (64, 64, 64, 64)
    decoder_block_out_channels: Widths = (64, 64, 64, 64)
    num_encoder_blocks: tuple[Blocks, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[Blocks, ...] = (3, 3, 3, 1)
    latent_channels: Width = 4
    scaling_factor: Scale = 1.0
    shift_factor: Shift = 0.0
    latent_magnitude: Scale = 3  # with latent_shift the range of latents stored as bytes;
    latent_shift: Shift = 0.5  # only written to configs
    force_upcast: bool = False  # only written to configs

    def check(self):
        """Raise ValueError for options that contradict each other."""
        for half in ("encoder", "decoder"):
            widths, num_blocks = getattr(self, f"{half}_block_out_channels"), getattr(self, f"num_{half}_blocks")
            if len(widths) != len(num_blocks) or len({*widths}) != 1:
                raise ValueError(
                    f"{half}_block_out_channels must be one width, once per num_{half}_blocks, not {widths}"
                )
        both = (*self.num_encoder_blocks, *self.num_decoder_blocks)
        check_layers(sum(both), "num_encoder_blocks and num_decoder_blocks")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError("num_encoder_blocks and num_decoder_blocks must have the same number of entries")

    def example(self):
        """Smallest inputs that use every weight, as (args, kwargs)."""
        return (jnp.zeros((1, self.factor, self.factor, self.in_channels)),), {}

    @property
    def factor(self) -> int:
        """Height of an image divided by that of its latent."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    def setup(self):
        def half(cls, num_blocks, widths, features):
            return cls(num_blocks, widths[0], features, self.dtype, self.remat)

        self.encoder = half(EncoderTiny, self.num_encoder_blocks, self.encoder_block_out_channels, self.latent_channels)
        self.decoder = half(DecoderTiny, self.num_decoder_blocks, self.decoder_block_out_channels, self.out_channels)

    def __call__(self, x):
        """Reconstruction float32 [b, f h, f w, c] of x [b, f h, f w, c] in [-1, 1]."""
        return self.decode(self.encode(x))

    def encode(self, x):
        """Latent of x [b, f h, f w, c] in [-1, 1]: float32 [b, h, w, latent_channels]."""
        check_images(self, x)
        return self.encoder((x + 1) / 2).astype(jnp.float32)

    def decode(self, z):
        """Images float32 [b, f h, f w, c], about in [-1, 1], of z [b, h, w, latent_channels].

        z is squashed to +-3, as in training.
        """
        check_latents(self, z)
        return 2 * self.decoder(3 * jnp.tanh(z / 3)).astype(jnp.float32) - 1

    def to_latent(self, z, key):
        """The diffusion model's z from `encode`'s output; key is ignored, since there is no posterior."""
        return (z - self.shift_factor) * self.scaling_factor

    def from_latent(self, z):
        """`decode`'s input from the diffusion model's z."""
        return z / self.scaling_factor + self.shift_factor

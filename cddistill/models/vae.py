"""diffusers' AutoencoderKL in Flax: the autoencoders of Stable Diffusion 1.x, 2.x, XL, 3 and Flux.

Parameter paths are diffusers' names with ".3" written "_3", as in `unet`. An autoencoder is used as a net:

    autoencoder = Autoencoder(params, Encode(module), Decode(module))  # of an AutoencoderKL or AutoencoderTiny
    z, x = autoencoder.encode(x), autoencoder.decode(z)  # z has about unit variance
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
from cddistill.models.configured import Configured

EPS = 1e-6  # of every norm
SUPPORTED = {"act_fn": ("silu", "swish")}  # options of diffusers that are no fields below, and their only values
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Block(nn.Module):
    """Resnets, then a resampler if any: diffusers' DownEncoderBlock2D and UpDecoderBlock2D."""

    num_layers: int
    resnet: Any  # constructors; resnet is to be called with a name
    resampler: Any

    @nn.compact
    def __call__(self, h):
        for i in range(self.num_layers):
            h = self.resnet(name=f"resnets_{i}")(h)
        return self.resampler()(h) if self.resampler else h


class MidBlock(nn.Module):
    """Two resnets with attention between them, or without: unlike in a UNet, the second stays."""

    resnet: Any
    attention: Any

    @nn.compact
    def __call__(self, h):
        h = self.resnet(name="resnets_0")(h)
        h = self.attention(name="attentions_0")(h) if self.attention else h
        return self.resnet(name="resnets_1")(h)


class Coder(nn.Module):
    """What encoder and decoder share."""

    features: int  # channels of the result
    widths: tuple[int, ...]
    num_layers: int  # resnets per block of the encoder; the decoder has one more
    groups: int
    attention: bool
    dtype: Any
    remat: bool
    flash: bool

    def block(self, cls):
        """The block's class, rematerialised on request."""
        return nn.remat(cls) if self.remat else cls

    def resnet(self, i):
        """Constructor of the resnets of width i."""
        return partial(ResnetBlock2D, self.widths[i], self.groups, EPS, dtype=self.dtype)

    def middle(self, h):
        """The middle block; its attention has one head of full width."""
        attention = partial(SpatialAttention, self.widths[-1], self.groups, EPS, self.dtype, self.flash)
        return self.block(MidBlock)(self.resnet(-1), attention if self.attention else None, name="mid_block")(h)

    def leave(self, h):
        """From the last features to the result."""
        h = nn.silu(GroupNorm(self.groups, EPS, self.dtype, name="conv_norm_out")(h))
        return conv(self.features, 3, self.dtype, "conv_out")(h)


class Encoder(Coder):
    """Image to features of the latent, halving between widths."""

    @nn.compact
    def __call__(self, x):
        h = conv(self.widths[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(self.widths):
            down = partial(Downsample2D, width, 0, self.dtype, name="downsamplers_0")
            last = i == len(self.widths) - 1
            h = self.block(Block)(self.num_layers, self.resnet(i), None if last else down, name=f"down_blocks_{i}")(h)
        return self.leave(self.middle(h))


class Decoder(Coder):
    """Latent to image, doubling between widths."""

    @nn.compact
    def __call__(self, z):
        h = self.middle(conv(self.widths[-1], 3, self.dtype, "conv_in")(z))
        for j, i in enumerate(reversed(range(len(self.widths)))):
            up = partial(Upsample2D, self.widths[i], self.dtype, name="upsamplers_0") if i else None
            h = self.block(Block)(self.num_layers + 1, self.resnet(i), up, name=f"up_blocks_{j}")(h)
        return self.leave(h)


class AutoencoderKL(Configured):
    """The networks; what their raw output is as a latent, and back, say `to_latent` and `from_latent`."""

    supported = SUPPORTED

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32  # only written to configs
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None  # of the channels, instead of shift_factor (Playground 2.5)
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True  # XL's overflows in float16; only written to configs
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def published(self, tensors: dict, where) -> dict:
        """A file's tensors by today's PyTorch names: attention's were query, key, value and proj_attn once."""
        old = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(OLD_NAMES)})(?=\.)")
        return {old.sub(lambda match: OLD_NAMES[match[0]], name): x for name, x in tensors.items()}

    def check(self):
        """Options that must agree with each other."""
        n, types = len(self.block_out_channels), {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
        for way, only in types.items():
            if (found := getattr(self, f"{way}_block_types")) != (only,) * n:
                raise ValueError(
                    f"{way}_block_types must be {n} times {only}, once per block_out_channels, not {found}"
                )
        statistics = [x for x in (self.latents_mean, self.latents_std) if x is not None]
        if statistics and (len(statistics) == 1 or {*map(len, statistics)} != {self.latent_channels}):
            raise ValueError(f"latents_mean and latents_std must both have {self.latent_channels} entries, or be null")
        if statistics and self.shift_factor:
            raise ValueError(f"latents_mean and shift_factor = {self.shift_factor} say the same thing: keep one")

    def example(self):
        """The smallest inputs that touch every weight, as (args, kwargs)."""
        return (jnp.zeros((1, self.factor, self.factor, self.in_channels)),), {}

    @property
    def factor(self) -> int:
        """How many times larger an image is than its latent, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        shared = (
            self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.mid_block_add_attention,
            self.dtype, self.remat, self.flash,
        )  # fmt: skip
        self.encoder = Encoder(2 * self.latent_channels, *shared)
        self.decoder = Decoder(self.out_channels, *shared)
        # where a config does without them, these two are never called and so have no weights
        self.quant_conv = conv(2 * self.latent_channels, 1, self.dtype, None)
        self.post_quant_conv = conv(self.latent_channels, 1, self.dtype, None)

    def __call__(self, x):
        """Reconstruction of x from the mean of its posterior."""
        return self.decode(self.encode(x)[..., : self.latent_channels])

    def encode(self, x):
        """Unscaled mean and log variance, side by side, of x [b, f h, f w, c]: float32 [b, h, w, 2 latent_channels]."""
        check_images(self, x)
        h = self.encoder(x)
        return (self.quant_conv(h) if self.use_quant_conv else h).astype(jnp.float32)

    def decode(self, z):
        """Image of an unscaled latent, float32."""
        check_latents(self, z)
        return self.decoder(self.post_quant_conv(z) if self.use_post_quant_conv else z).astype(jnp.float32)

    def shift_scale(self):
        """What is subtracted from unscaled latents, and by what the difference is multiplied."""
        if self.latents_mean is None:
            return self.shift_factor or 0.0, self.scaling_factor
        mean, std = (np.array(x, np.float32).reshape(1, 1, 1, -1) for x in (self.latents_mean, self.latents_std))
        return mean, self.scaling_factor / std

    def to_latent(self, moments, key):
        """The diffusion's z from what `encode` gives: the posterior's mean or, with a key, a sample."""
        mean, logvar = jnp.split(moments, 2, -1)
        if key is not None:
            keys = key if key.ndim else jax.random.split(key, len(mean))
            noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(keys)
            mean = mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise
        shift, scale = self.shift_scale()
        return (mean - shift) * scale

    def from_latent(self, z):
        """What `decode` takes."""
        shift, scale = self.shift_scale()
        return z / scale + shift


@dataclasses.dataclass(frozen=True)
class Pieces:
    """An autoencoder's module, and how its inputs are cut so that large ones fit into memory.

    `slices` takes one image after the other, which changes nothing; across devices, cut the batch by its sharding
    instead. `tile`, a multiple of 4, cuts what is larger than so many latent pixels into overlapping tiles, as
    AutoencoderKL.enable_tiling does in diffusers with sample_size / 8: norms and attention then see one tile.
    """

    module: nn.Module
    slices: bool = False
    tile: int | None = None  # latent pixels; 64 are 512 pixels of Stable Diffusion

    def __post_init__(self):
        if self.tile is not None and (self.tile < 4 or self.tile % 4):
            raise ValueError(f"tile = {self.tile} is not a multiple of 4 latent pixels: tiles overlap by a quarter")

    def run(self, params, method, x, before, after):
        """The module's method on x in pieces; a latent pixel is `before` pixels wide in x and `after` in the result."""

        def whole(x):
            return self.module.apply({"params": params}, x, method=method)

        def image(x):
            return tiled(whole, x, self.tile * before, self.tile * after) if self.tile else whole(x)

        return jax.lax.map(lambda one: image(one[None])[0], x) if self.slices else image(x)


class Encode(Pieces):
    """Images x [b, f h, f w, c] in [-1, 1] to latents z [b, h, w, latent_channels], as a pure function.

    z is the posterior's mean or, with a key, a sample: one key for the batch, or one for each image, so that the sample
    follows the image and not the device.
    """

    def __call__(self, params, x, key=None):
        return self.module.to_latent(self.run(params, "encode", x, self.module.factor, 1), key)


class Decode(Pieces):
    """Latents z [b, h, w, latent_channels] to images [b, f h, f w, c], about in [-1, 1], as a pure function."""

    def __call__(self, params, z):
        return self.run(params, "decode", self.module.from_latent(z), 1, self.module.factor)


def tiled(f, x, tile: int, out: int):
    """f on tiles of x that overlap by a quarter, each faded into its upper and left neighbours, as diffusers does.

    Tiles are `tile` pixels wide in x and `out` in f(x), less at the lower and right edges. Those of one shape share
    one program and run one after the other.
    """
    if max(x.shape[1:3]) <= tile:
        return f(x)
    rows, columns = (range(0, size, tile - tile // 4) for size in x.shape[1:3])
    tiles = {(i, j): x[:, i : i + tile, j : j + tile] for i in rows for j in columns}
    for shape in {t.shape: None for t in tiles.values()}:
        alike = [at for at, t in tiles.items() if t.shape == shape]
        results = jax.lax.map(f, jnp.stack([tiles[at] for at in alike]))
        tiles |= zip(alike, results, strict=True)
    strips = []
    for i in rows:
        for j in columns:  # the neighbours are already blended with theirs
            if i:
                tiles[i, j] = fade(tiles[i - rows.step, j], tiles[i, j], out // 4, axis=1)
            if j:
                tiles[i, j] = fade(tiles[i, j - columns.step], tiles[i, j], out // 4, axis=2)
        keep = out - out // 4
        strips.append(jnp.concatenate([tiles[i, j][:, :keep, :keep] for j in columns], 2))
    return jnp.concatenate(strips, 1)


def fade(a, b, extent: int, axis: int):
    """b, with the last `extent` pixels of a turning linearly into its first ones; all of b, if that is narrower."""
    extent = min(a.shape[axis], b.shape[axis], extent)
    weight = jnp.expand_dims(jnp.arange(extent) / extent, tuple({*range(b.ndim)} - {axis}))
    end = jax.lax.slice_in_dim(a, a.shape[axis] - extent, None, axis=axis)
    start, rest = jnp.split(b, [extent], axis)
    return jnp.concatenate([(1 - weight) * end + weight * start, rest], axis)


def check_images(module, x):
    """One sentence for what would otherwise be a shape error deep inside."""
    _, h, w, c = x.shape
    if c != module.in_channels:
        raise ValueError(f"the autoencoder takes images of in_channels = {module.in_channels}, but x has {c}")
    if h % module.factor or w % module.factor:
        raise ValueError(f"height {h} and width {w} must be divisible by {module.factor}: a latent is so much smaller")


def check_latents(module, z):
    """The same for the way back."""
    if z.shape[-1] != module.latent_channels:
        raise ValueError(f"the autoencoder has latent_channels = {module.latent_channels}, but z has {z.shape[-1]}")

"""The pixel networks of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                       # eq. 7, coefficients in table 1

F is ADM (`DhariwalUNet`) or DDPM++/NCSN++ (`SongUNet`). Parameter paths are the names in the published checkpoints
without the prefix "model.". Fields are the keys of our config.json; the checkpoints have none, so `PRESETS` lists one
for each. D and the embedding are float32, `dtype` is the compute type of the rest of F. A network is used as

    net.Denoiser(params, Apply(module), diffusion.EDM(), "x0")(x, sigma, {"class_labels": labels})
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cddistill.diffusion import like
from cddistill.models.blocks import conv, sinusoid
from cddistill.models.configured import LEVELS, Blocks, Configured, Multiple, Scale, Size, check_layers
from cddistill.models.edm_blocks import ROOT_HALF, Decoder, Encoder, Level, Style
from cddistill.typed import Limit, Width, within

Labels = Annotated[int, within(least=0, most=2**24)]
Channels = Annotated[int, within(least=4, most=2**14, multiple=2)]
Multiples = Annotated[tuple[Multiple, ...], LEVELS]
Taps = Annotated[
    tuple[Annotated[int, within(least=-1000, most=1000)], ...],
    Limit("2 to 16 numbers, whose sum is not 0", lambda x: 2 <= len(x) <= 16 and sum(x)),
]
NO_EFFECT = {"dropout", "label_dropout"}  # of training from scratch; label_dropout trains the null label


def edm(sigma, sigma_data):
    """(c_skip, c_out, c_in, c_noise) of EDM."""
    total = sigma**2 + sigma_data**2
    root = jnp.sqrt(total)
    return sigma_data**2 / total, sigma * sigma_data / root, 1.0 / root, jnp.log(sigma) / 4.0


def vp(sigma, sigma_data, beta_d=19.9, beta_min=0.1, steps=1000):
    """The same for variance-preserving networks: F receives (steps - 1) t, sigma(t) = sigma, and predicts the noise."""
    t = (jnp.sqrt(beta_min**2 + 2.0 * beta_d * jnp.log1p(sigma**2)) - beta_min) / beta_d
    return jnp.ones_like(sigma), -sigma, jax.lax.rsqrt(sigma**2 + 1.0), (steps - 1) * t


def ve(sigma, sigma_data):
    """The same for variance-exploding networks."""
    return jnp.ones_like(sigma), sigma, jnp.ones_like(sigma), jnp.log(sigma / 2.0)


PRECONDITIONING = {"edm": edm, "vp": vp, "ve": ve}


class KarrasUNet(Configured):
    """Base of both families: options, preconditioning and forward pass."""

    supported = {"precond": ("edm", "vp", "ve")}
    no_effect = NO_EFFECT

    img_resolution: Size = 64  # of the training images; only parameter names depend on it
    img_channels: Width = 3
    label_dim: Labels = 0  # number of classes; 0 is unconditional
    augment_dim: Labels = 0  # size of augmentation labels
    model_channels: Channels = 192
    channel_mult: Multiples = (1, 2, 3, 4)  # channels per level, in units of model_channels
    channel_mult_emb: Multiple = 4
    num_blocks: Blocks = 3  # per level; the decoder has one more
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    precond: str = "edm"
    sigma_data: Scale = 0.5

    def check(self):
        """Raise ValueError for options that contradict each other."""
        sizes, taps = [level.size for level in self.levels()], self.style().taps
        check_layers(len(sizes) * self.num_blocks, "num_blocks and channel_mult")
        heads = self.style().head_width
        for level in self.levels():
            if level.width % min(32, level.width // 4):
                raise ValueError(f"model_channels = {self.model_channels} makes {level.width} channels, no 32 groups")
            if level.attends and heads and level.width % heads:
                split = f"attention heads of channels_per_head = {heads}"
                raise ValueError(f"{level.width} channels cannot be split into {split}")
        if self.img_resolution % self.factor:
            raise ValueError(f"img_resolution {self.img_resolution} cannot be halved {len(sizes) - 1} times")
        if unknown := sorted({*self.attn_resolutions} - {*sizes}):
            raise ValueError(f"attn_resolutions has {unknown}, but the levels of this network are {sizes}")
        if len(taps) % 2 or tuple(taps) != tuple(taps[::-1]):
            raise ValueError(f"resample_filter {list(taps)} is not symmetric with an even number of taps")

    def example(self):
        """Smallest inputs that use every weight, as (args, kwargs)."""
        kwargs = {"class_labels": jnp.zeros((1,), jnp.int32)} if self.label_dim else {}
        kwargs |= {"augment_labels": jnp.zeros((1, self.augment_dim))} if self.augment_dim else {}
        return (jnp.zeros((1, self.factor, self.factor, self.img_channels)), jnp.ones((1,))), kwargs

    @property
    def conditional(self) -> bool:
        """Whether the output depends on class labels."""
        return self.label_dim > 0

    @property
    def factor(self) -> int:
        """Height of the image divided by that of the coarsest level."""
        return 2 ** (len(self.channel_mult) - 1)

    def levels(self) -> tuple[Level, ...]:
        """The levels, finest first."""
        sizes = [self.img_resolution >> i for i in range(len(self.channel_mult))]
        return tuple(
            Level(size, self.model_channels * mult, size in self.attn_resolutions)
            for size, mult in zip(sizes, self.channel_mult, strict=True)
        )

    def published(self, tensors: dict, where) -> dict:
        """A published PyTorch state dict without the prefix "model." and without the resampling filters.

        Raises ValueError naming the file `where` if a filter differs from the config's.
        """
        tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
        for name, ours in self.resample_filters().items():
            theirs = np.asarray(tensors.pop(name, ours), np.float32)
            if theirs.shape != ours.shape or not np.allclose(theirs, ours, atol=1e-4):
                raise ValueError(f"{where}: {name} is not the filter {list(self.style().taps)} of this config.json")
        return tensors

    def resample_filters(self) -> dict:
        """{PyTorch name: filter [1, 1, k, k]}: constants that published state dicts hold beside the weights."""
        options = self.options()
        down = {"skip": ["aux_down"], "residual": ["aux_residual"]}.get(options.get("encoder_type"), [])
        up = {"skip": ["aux_up"]}.get(options.get("decoder_type"), [])
        down, up = ["down.conv0", "down.skip", *down], ["up.conv0", "up.skip", *up]
        names = [f"enc.{level.name}_{part}" for level in self.levels()[1:] for part in down]
        names += [f"dec.{level.name}_{part}" for level in self.levels()[:-1] for part in up]
        taps = np.array(self.style().taps, np.float32)
        return {f"{name}.resample_filter": (np.outer(taps, taps) / taps.sum() ** 2)[None, None] for name in names}

    @nn.compact
    def __call__(self, x, sigma, *, class_labels=None, augment_labels=None, features: bool = False):
        """D(x; sigma) for x [b, h, w, c] = clean data in [-1, 1] plus noise of standard deviation sigma [b], float32.

        class_labels [b] are integers below label_dim, or label_dim for no class. augment_labels [b, augment_dim]
        describe the augmentation of training images; None means zeros. With features, the result is (D, bottleneck
        [b, h / factor, w / factor, c], DecoderLevels, coarsest first), all float32; jit drops what is not used. Raises
        ValueError for sizes, channels and labels that do not fit this network.
        """
        h, *hidden = self.trunk(x, sigma, class_labels=class_labels, augment_labels=augment_labels)
        c_skip, c_out, *_ = (like(c, x) for c in self.coefficients(sigma))
        out = c_skip * x + c_out * self.head(h).astype(jnp.float32)
        return (out, *jax.tree.map(lambda h: h.astype(jnp.float32), hidden)) if features else out

    def trunk(self, x, sigma, *, class_labels=None, augment_labels=None, level_input=None):
        """Everything before the output layer: (decoder output, bottleneck, DecoderLevels, coarsest first).

        level_input(i, feature), if given, replaces the feature that level i of the encoder starts with, also as skip.
        """
        self.check_inputs(x, class_labels, augment_labels)
        *_, c_in, c_noise = self.coefficients(sigma)
        emb = self.embedding(c_noise, class_labels, augment_labels)
        skips = self.encoder()((like(c_in, x) * x).astype(self.dtype), emb, level_input)
        h, levels = self.decoder()(skips, emb)
        return h, skips[-1], levels

    def coefficients(self, sigma):
        """(c_skip, c_out, c_in, c_noise), each [b]."""
        return PRECONDITIONING[self.precond](jnp.asarray(sigma, jnp.float32), self.sigma_data)

    def check_inputs(self, x, class_labels, augment_labels):
        """Raise ValueError for inputs that do not fit this network."""
        _, h, w, c = x.shape
        if h % self.factor or w % self.factor:
            raise ValueError(f"height {h} and width {w} must be divisible by {self.factor}: this network halves them")
        if c != self.img_channels:
            raise ValueError(f"the network takes img_channels = {self.img_channels} but x has {c}")
        if self.label_dim and class_labels is None:
            raise ValueError(f"this network is class-conditional: pass class_labels [b], {self.label_dim} for none")
        if not self.label_dim and class_labels is not None:
            raise ValueError("class_labels were passed to a network without classes (label_dim is 0)")
        if class_labels is not None and jnp.ndim(class_labels) != 1:
            raise ValueError(f"class_labels are integers [b], not an array of shape {jnp.shape(class_labels)}")
        if augment_labels is not None and jnp.shape(augment_labels)[1:] != (self.augment_dim,):
            shape = jnp.shape(augment_labels)
            raise ValueError(f"augment_labels have shape {shape}, this network takes [b, {self.augment_dim}]")

    def one_hot(self, class_labels):
        """[b] -> [b, label_dim]; the null label, label_dim, becomes zeros."""
        return jax.nn.one_hot(class_labels, self.label_dim)

    def augment(self, emb, augment_labels):
        """The embedding plus a projection of the augmentation labels."""
        if augment_labels is None:  # the same as zeros
            return emb
        return emb + nn.Dense(emb.shape[-1], use_bias=False, name="map_augment")(augment_labels)


class DhariwalUNet(KarrasUNet):
    """ADM as trained by Karras et al. for ImageNet-64."""

    channels_per_head: Width = 64
    output_layer = "out_conv"  # its output is F

    def style(self) -> Style:
        """Options of ADM's blocks."""
        return Style(
            adaptive_scale=True, skip_scale=1.0, head_width=self.channels_per_head, project_resampled=False, eps=1e-5,
            taps=(1, 1), dtype=self.dtype, remat=self.remat, flash=self.flash,
        )  # fmt: skip

    def encoder(self):
        return Encoder(self.style(), self.levels(), self.num_blocks, self.levels()[0].width, name="enc")

    def decoder(self):
        return Decoder(self.style(), self.levels(), self.num_blocks, attends_once=False, name="dec")

    def head(self, h):
        """F from the decoder's last feature."""
        return conv(self.img_channels, 3, self.dtype, "out_conv")(nn.silu(self.style().norm(h, "out_norm")))

    def embedding(self, c_noise, class_labels, augment_labels):
        """The embedding [b, c] of noise level and class for every block; the class is added after the MLP."""
        width = self.model_channels * self.channel_mult_emb
        emb = self.augment(sinusoid(c_noise, self.model_channels, True, 0), augment_labels)
        emb = nn.Dense(width, name="map_layer1")(nn.silu(nn.Dense(width, name="map_layer0")(emb)))
        if self.label_dim:
            emb = emb + nn.Dense(width, use_bias=False, name="map_label")(self.one_hot(class_labels))
        return nn.silu(emb)


class Fourier(nn.Module):
    """Random Fourier features [b, dim] of a noise level [b]; the frequencies are stored but not trained."""

    dim: int

    @nn.compact
    def __call__(self, t):
        freqs = self.param("freqs", nn.initializers.normal(16.0), (self.dim // 2,))
        angle = 2 * jnp.pi * t[:, None] * jax.lax.stop_gradient(freqs)[None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


class SongUNet(KarrasUNet):
    """DDPM++ (the defaults), and NCSN++: fourier, residual, [1, 3, 3, 1], channel_mult_noise 2."""

    supported = KarrasUNet.supported | {
        "embedding_type": ("positional", "fourier"),
        "encoder_type": ("standard", "skip", "residual"),
        "decoder_type": ("standard", "skip"),
    }

    model_channels: Channels = 128
    channel_mult: Multiples = (1, 2, 2, 2)
    num_blocks: Blocks = 4
    attn_resolutions: tuple[int, ...] = (16,)
    embedding_type: str = "positional"
    channel_mult_noise: Multiple = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Taps = (1, 1)
    output_layer = "aux_conv"  # suffix of the output layers; F is their sum over levels, one of them or one per level

    def style(self) -> Style:
        """Options of the blocks of DDPM++ and NCSN++."""
        return Style(
            adaptive_scale=False, skip_scale=ROOT_HALF, head_width=None, project_resampled=True, eps=1e-6,
            taps=self.resample_filter, dtype=self.dtype, remat=self.remat, flash=self.flash,
        )  # fmt: skip

    def encoder(self):
        return Encoder(self.style(), self.levels(), self.num_blocks, self.model_channels, self.encoder_type, name="enc")

    def decoder(self):
        return Decoder(
            self.style(), self.levels(), self.num_blocks, attends_once=True, out_channels=self.img_channels,
            kind=self.decoder_type, name="dec",
        )  # fmt: skip

    def head(self, h):
        """The decoder's output is F."""
        return h

    def embedding(self, c_noise, class_labels, augment_labels):
        """The embedding [b, c] of noise level and class for every block; the class is added before the MLP."""
        features = self.model_channels * self.channel_mult_noise
        if self.embedding_type == "fourier":
            emb = Fourier(features, name="map_noise")(c_noise)
        else:
            emb = sinusoid(c_noise, features, False, 1)
        if self.label_dim:  # scaled so that each entry has unit variance over classes
            emb = emb + nn.Dense(features, name="map_label")(self.one_hot(class_labels) * self.label_dim**0.5)
        emb = self.augment(emb, augment_labels)
        for name in ("map_layer0", "map_layer1"):
            emb = nn.silu(nn.Dense(self.model_channels * self.channel_mult_emb, name=name)(emb))
        return emb


DDPMPP = {"_class_name": "SongUNet", "augment_dim": 9}
NCSNPP = DDPMPP | {
    "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
}  # fmt: skip
CIFAR10 = {"img_resolution": 32, "channel_mult": [2, 2, 2]}
# The published checkpoints. Their files call DDPM++ vp and NCSN++ ve; all have the preconditioning "edm".
PRESETS = {
    "edm-imagenet-64x64-cond-adm": {"_class_name": "DhariwalUNet", "label_dim": 1000},
    "edm-cifar10-32x32-cond-vp": DDPMPP | CIFAR10 | {"label_dim": 10},
    "edm-cifar10-32x32-uncond-vp": DDPMPP | CIFAR10,
    "edm-cifar10-32x32-cond-ve": NCSNPP | CIFAR10 | {"label_dim": 10},
    "edm-cifar10-32x32-uncond-ve": NCSNPP | CIFAR10,
    "edm-ffhq-64x64-uncond-vp": DDPMPP,
    "edm-ffhq-64x64-uncond-ve": NCSNPP,
    "edm-afhqv2-64x64-uncond-vp": DDPMPP,
    "edm-afhqv2-64x64-uncond-ve": NCSNPP,
}

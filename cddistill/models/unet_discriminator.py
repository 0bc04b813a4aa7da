"""Diffusion2GAN's discriminator (Kang et al., ECCV 2024, arXiv:2405.05967): a copy of the teacher that judges pairs.

    D(x, z, text) = logits at every level of the way up of a U-Net that starts as the teacher

* It sees clean data x, and the noise z that x is to have been made of, by a convolution that is zero at first.
* x enters every further level of the encoder once more, at that level's size, by a convolution that is zero at first.
* Each level of the decoder is judged three times: the feature from below, the skip that it meets, what they become.

So at first all features are the teacher's on (x, t, text). The paper shows this in its figure of the discriminator and
has no numbers: what the heads look like, the filter that resizes x and all sizes of kernels are ours.
"""

from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cddistill.models.blocks import GroupNorm, conv
from cddistill.models.discriminator import groups
from cddistill.models.edm import DhariwalUNet, SongUNet
from cddistill.models.init import draw_jax, weight_shapes
from cddistill.models.unet import Apply, UNet2DConditionModel
from cddistill.net import Denoiser, Net

HEAD_WIDTH = 256  # at most; ours
NEW = ("conv_z", "conv_x_")  # what the teacher lacks, beside the heads


class Head(nn.Module):
    """Features [b, h, w, c] to one logit per pixel, float32 [b, h, w, 1]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h):
        c = h.shape[-1]
        h = nn.silu(GroupNorm(groups(c), 1e-5, self.dtype, name="norm")(h))
        h = nn.silu(conv(min(c, HEAD_WIDTH), 3, self.dtype, "conv")(h))
        return conv(1, 1, jnp.float32, "conv_out")(h)


class Discriminator(nn.Module):
    """What makes a discriminator of a teacher's class: the two are the bases of one that is both, this one first."""

    noise: bool = True
    scales: bool = True

    @nn.compact
    def __call__(self, x, t, z=None, **conditions):
        """Logits [b, h, w, 1] for data x [b, h, w, c] and its noise z of the same shape, at time t, one or [b].

        Coarsest level first, of each before, at and behind the skip; without scales, the last of all these alone.
        """
        if self.noise and np.shape(z) != x.shape:
            raise ValueError(f"this discriminator sees noise: z must have x's shape, {x.shape}, not {np.shape(z)}")
        *_, levels = self.trunk(x, jnp.broadcast_to(t, x.shape[:1]), enter=self.joined(x, z), **conditions)
        seen = {f"heads_{j}_{part}": h for j, level in enumerate(levels) for part, h in level._asdict().items()}
        seen = seen if self.scales else dict([seen.popitem()])
        return tuple(Head(self.dtype, name=name)(h) for name, h in seen.items())

    def joined(self, x, z):
        """What the encoder does to each level's first feature: nothing yet, as its convolutions start at zero."""

        def enter(i, h):
            if i == 0:
                return h + conv(h.shape[-1], 3, self.dtype, "conv_z")(z) if self.noise else h
            if not self.scales:
                return h
            size = (*h.shape[:3], x.shape[-1])
            small = jax.image.resize(x, size, "linear", antialias=True)  # each pixel is of all that it stands for
            return h + conv(h.shape[-1], 3, self.dtype, f"conv_x_{i}")(small)

        return enter

    def example(self):
        (x, t), kwargs = super().example()
        return (x, t, x), kwargs


class UNetDiscriminator(Discriminator, UNet2DConditionModel):
    """Of Stable Diffusion's networks and their like."""

    def example(self):
        (x, t, _), kwargs = super().example()
        data, more = x[..., : self.out_channels], x[..., self.out_channels :]  # editing models have an image there
        return (data, t, data), kwargs | ({"concat": more} if more.shape[-1] else {})


class DhariwalDiscriminator(Discriminator, DhariwalUNet):
    """Of ADM; t is sigma."""


class SongDiscriminator(Discriminator, SongUNet):
    """Of DDPM++ and NCSN++; t is sigma. Its decoder makes no image: decoder_type is "none"."""


KINDS = {
    UNet2DConditionModel: (UNetDiscriminator, {}),
    DhariwalUNet: (DhariwalDiscriminator, {}),
    SongUNet: (SongDiscriminator, {"decoder_type": "none"}),
}


def make_discriminator(teacher: Denoiser, key, *, noise: bool = True, scales: bool = True) -> Net:
    """A discriminator on a copy of the teacher: Net with apply(params, x, t, text, z) -> tuple of logits [b, h, w, 1].

    x [b, h, w, c] is clean data, t a native time of the teacher's, text its conditions, z the noise of x's shape.
    There are 3 maps for each level of the decoder, coarsest first, float32. noise=False: z is ignored, and may be left
    out; scales=False: x enters once, and there is one map, on the finest level (the paper's ablations). Attention is
    never a fused kernel, so that gradients have gradients (R1). Raises ValueError for a teacher without skips.
    """
    module = teacher.module
    if type(module) not in KINDS:
        names = ", ".join(cls.__name__ for cls in KINDS)
        raise ValueError(f"this discriminator is a copy of a U-Net: it needs a teacher that is one of {names}")
    cls, without = KINDS[type(module)]
    ours = {"dtype": module.dtype, "remat": module.remat, "flash": False, "noise": noise, "scales": scales}
    disc = cls(**module.options() | without, **ours)
    return Net(discriminator_params(disc, teacher.params, key), Apply(disc))


def discriminator_params(module, teacher_params, key):
    """What the teacher has is copied (real copies, so that either may be donated), heads are drawn, the rest is 0."""
    shapes = weight_shapes(module)
    heads = draw_jax({name: shapes.pop(name) for name in [*shapes] if name.startswith("heads_")}, key)
    held = flax.traverse_util.flatten_dict(teacher_params)
    rest = {
        path: jnp.zeros(shape.shape) if path[-2].startswith(NEW) else jnp.copy(held[path])
        for path, shape in flax.traverse_util.flatten_dict(shapes).items()
    }
    return flax.traverse_util.unflatten_dict(rest) | heads

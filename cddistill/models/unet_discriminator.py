"""Diffusion2GAN's discriminator (Kang et al., ECCV 2024, arXiv:2405.05967): a copy of the teacher that judges pairs.

    D(x, z, text) = logits at every decoder level of a U-Net that is initialised with the teacher's weights

* Inputs are clean data x and the noise z that x was generated from; z enters through a convolution initialised to zero.
* Resized to its resolution, x is also added to every further encoder level, through a convolution initialised to zero.
* Each decoder level has three heads: on its input from the coarser level, on its skip and on its output.

So at first all features are the teacher's for (x, t, text). The paper shows this architecture in a figure, without
numbers: the layers of the heads, the filter that resizes x and all kernel sizes are ours.
"""

from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cddistill.models.blocks import GroupNorm, conv
from cddistill.models.discriminator import num_groups
from cddistill.models.edm import DhariwalUNet, SongUNet
from cddistill.models.init import init_params_jax, weight_shapes
from cddistill.models.unet import Apply, UNet2DConditionModel
from cddistill.net import Denoiser, Net

HEAD_WIDTH = 256  # at most; ours
NEW_LAYERS = ("conv_z", "conv_x_")  # layers that the teacher lacks, apart from the heads


class Head(nn.Module):
    """Features [b, h, w, c] to one logit per pixel, float32 [b, h, w, 1]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h):
        c = h.shape[-1]
        h = nn.silu(GroupNorm(num_groups(c), 1e-5, self.dtype, name="norm")(h))
        h = nn.silu(conv(min(c, HEAD_WIDTH), 3, self.dtype, "conv")(h))
        return conv(1, 1, jnp.float32, "conv_out")(h)


class Discriminator(nn.Module):
    """Mixin that turns a teacher's network class into a discriminator; it comes first among the bases."""

    noise: bool = True
    scales: bool = True

    @nn.compact
    def __call__(self, x, t, z=None, **conditions):
        """Tuple of logits [b, h, w, 1] for data x [b, h, w, c], its noise z of the same shape, timestep t [] or [b].

        Levels are ordered coarsest first, each as DecoderLevel; without scales, only the last feature has logits.
        """
        if self.noise and np.shape(z) != x.shape:
            raise ValueError(f"this discriminator takes noise: z must have x's shape, {x.shape}, not {np.shape(z)}")
        t = jnp.broadcast_to(t, x.shape[:1])
        *_, levels = self.trunk(x, t, level_input=self.make_level_input(x, z), **conditions)
        features = {f"heads_{j}_{part}": h for j, level in enumerate(levels) for part, h in level._asdict().items()}
        features = features if self.scales else dict([features.popitem()])
        return tuple(Head(self.dtype, name=name)(h) for name, h in features.items())

    def make_level_input(self, x, z):
        """The encoder's level_input, which adds z and x; at first it adds zeros, as its convolutions start at zero."""

        def level_input(i, h):
            if i == 0:
                return h + conv(h.shape[-1], 3, self.dtype, "conv_z")(z) if self.noise else h
            if not self.scales:
                return h
            size = (*h.shape[:3], x.shape[-1])
            small = jax.image.resize(x, size, "linear", antialias=True)  # a pixel is the mean of its area
            return h + conv(h.shape[-1], 3, self.dtype, f"conv_x_{i}")(small)

        return level_input

    def example(self):
        (x, t), kwargs = super().example()
        return (x, t, x), kwargs


class UNetDiscriminator(Discriminator, UNet2DConditionModel):
    """Discriminator from a UNet2DConditionModel."""

    def example(self):
        (x, t, _), kwargs = super().example()
        data, concat = x[..., : self.out_channels], x[..., self.out_channels :]  # of editing models
        return (data, t, data), kwargs | ({"concat": concat} if concat.shape[-1] else {})


class DhariwalDiscriminator(Discriminator, DhariwalUNet):
    """Discriminator from ADM; t is sigma."""


class SongDiscriminator(Discriminator, SongUNet):
    """Discriminator from DDPM++ or NCSN++; t is sigma. Its decoder has no output layers: decoder_type is "none"."""


KINDS = {
    UNet2DConditionModel: (UNetDiscriminator, {}),
    DhariwalUNet: (DhariwalDiscriminator, {}),
    SongUNet: (SongDiscriminator, {"decoder_type": "none"}),
}


def make_discriminator(teacher: Denoiser, key, *, noise: bool = True, scales: bool = True) -> Net:
    """A discriminator from a copy of the teacher: apply(params, x, t, text, z) -> tuple of logits [b, h, w, 1].

    x [b, h, w, c] is clean data, t a timestep of the teacher, text its conditions, z noise of x's shape. There are 3
    logit maps per decoder level, coarsest first, float32. The paper's ablations: noise=False ignores z, which may be
    omitted; scales=False adds x only once and has one map, at the finest level. Attention never uses a fused kernel,
    since R1 needs second derivatives. Raises ValueError for a teacher that is not one of KINDS.
    """
    module = teacher.module
    if type(module) not in KINDS:
        names = ", ".join(cls.__name__ for cls in KINDS)
        raise ValueError(f"this discriminator is a copy of a U-Net: it needs a teacher that is one of {names}")
    cls, changes = KINDS[type(module)]
    options = {"dtype": module.dtype, "remat": module.remat, "flash": False, "noise": noise, "scales": scales}
    disc = cls(**module.options() | changes, **options)
    return Net(discriminator_params(disc, teacher.params, key), Apply(disc))


def discriminator_params(module, teacher_params, key):
    """The teacher's weights copied (so that either may be donated), random heads, zeros for NEW_LAYERS."""
    shapes = weight_shapes(module)
    heads = init_params_jax({name: shapes.pop(name) for name in [*shapes] if name.startswith("heads_")}, key)
    copied = flax.traverse_util.flatten_dict(teacher_params)
    rest = {
        path: jnp.zeros(shape.shape) if path[-2].startswith(NEW_LAYERS) else jnp.copy(copied[path])
        for path, shape in flax.traverse_util.flatten_dict(shapes).items()
    }
    return flax.traverse_util.unflatten_dict(rest) | heads

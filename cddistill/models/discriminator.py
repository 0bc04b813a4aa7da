"""Discriminators: small networks that classify a diffusion network's features as of real or generated images."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.models.blocks import GroupNorm
from cddistill.models.init import init_params_jax
from cddistill.net import Net


class FeatureHead(nn.Module):
    """DMD2's classifier of bottleneck features (Yin et al. 2024, sec. 4.3): 4x4 convolutions down to one logit.

    Convolutions of stride 2 until the map is smaller than 8, then one of stride 4 without padding, each followed by a
    GroupNorm of 32 groups (fewer in small networks, see `num_groups`) and SiLU; then a 1x1 convolution. Computed in
    float32, as published.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h):
        """Logits [b] for features [b, h, w, c]; ValueError for h or w below 4."""
        c, h = h.shape[-1], h.astype(self.dtype)
        if min(h.shape[1:3]) < 4:
            raise ValueError(
                f"the network's bottleneck is {h.shape[1]} x {h.shape[2]}: a discriminator on it needs 4 x 4 or more; "
                "use gan_weight=0 or larger images"
            )
        halvings = max(int(math.log2(min(h.shape[1:3]) / 4)), 0)
        for i in range(halvings + 1):
            stride, padding = (2, 1) if i < halvings else (4, 0)
            h = nn.Conv(c, (4, 4), (stride, stride), padding, dtype=self.dtype, name=f"conv_{i}")(h)
            h = nn.silu(GroupNorm(num_groups(c), 1e-5, self.dtype, name=f"norm_{i}")(h))
        return nn.Conv(1, (1, 1), dtype=self.dtype, name="conv_out")(h).mean((1, 2, 3))


def num_groups(channels: int) -> int:
    """At most 32 groups of at least four channels: a norm over a single value would erase it."""
    return math.gcd(32, max(channels // 4, 1))


@dataclasses.dataclass(frozen=True)
class Logits:
    """A head as a pure function of parameters and features. Equal when the modules are."""

    module: nn.Module

    def __call__(self, params, features):
        return self.module.apply({"params": params}, features)


def make_head(features, key) -> Net:
    """A head for features of this shape (an array or jax.ShapeDtypeStruct), initialised like PyTorch's layers."""
    module = FeatureHead()
    shapes = jax.eval_shape(lambda h: module.init(jax.random.key(0), h), features)["params"]
    return Net(init_params_jax(shapes, key), Logits(module))

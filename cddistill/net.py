"""Networks as callable pytrees: losses call nets the way papers write them."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from cddistill import diffusion


@flax.struct.dataclass
class Net:
    """Weights plus a pure apply function; the weights are the only pytree leaves."""

    params: Any
    apply: Callable = flax.struct.field(pytree_node=False)

    def __call__(self, *args, **kwargs):
        return self.apply(self.params, *args, **kwargs)

    @property
    def module(self):
        """The flax module behind apply, with the network's options; None if apply is any other function."""
        return getattr(self.apply, "module", None)


@flax.struct.dataclass
class Denoiser(Net):
    """A network that knows its schedule and parameterisation, so callers need not."""

    schedule: diffusion.Schedule = flax.struct.field(pytree_node=False)
    predicts: str = flax.struct.field(pytree_node=False)

    def __call__(self, z_t: jax.Array, t: jax.Array, *cond, **kwargs) -> diffusion.Prediction:
        """Prediction at noisy data z_t [b, ...] and native time t, [b] or one for the whole batch."""
        t = jnp.broadcast_to(t, z_t.shape[:1])
        alpha, sigma = self.alpha_sigma(t, z_t)
        return diffusion.predict(self.predicts, self.apply(self.params, z_t, t, *cond, **kwargs), z_t, alpha, sigma)

    def features(self, z_t, t, *cond):
        """The network's bottleneck, float32 [b, h, w, c]: what enters EDM's middle blocks, what leaves a UNet's."""
        return self.apply(self.params, z_t, jnp.broadcast_to(t, z_t.shape[:1]), *cond, features=True)[1]

    def levels(self, z_t, t, *cond):
        """What there is to see on a U-Net's way up, coarsest first: (before, skip, after) of each level, float32."""
        return self.apply(self.params, z_t, jnp.broadcast_to(t, z_t.shape[:1]), *cond, features=True)[2]

    def alpha_sigma(self, t, x):
        """Alpha and sigma at t, shaped to broadcast over x."""
        return tuple(diffusion.like(c, x) for c in self.schedule.alpha_sigma(jnp.broadcast_to(t, x.shape[:1])))

    def noise(self, x0, eps, t):
        """Sample q(z_t | x0): alpha_t x0 + sigma_t eps. With predicted x0 and eps it is a DDIM step (Song 2021, eq.
        12)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def dsm_loss(self, z_t, t, x0, eps, *cond, **kwargs):
        """Denoising score matching in this network's own parameterisation, mean over all elements."""
        t = jnp.broadcast_to(t, x0.shape[:1])
        out = self.apply(self.params, z_t, t, *cond, **kwargs)
        return ((out - diffusion.target(self.predicts, x0, eps, *self.alpha_sigma(t, x0))) ** 2).mean()


@flax.struct.dataclass
class Adapted:
    """A denoiser that sees a condition: by a branch that adjusts its features, or without one as more input channels.

    Either part may be frozen, moving or averaged.
    """

    backbone: Denoiser
    branch: Net | None = None

    def __call__(self, z_t, t, text, cond) -> diffusion.Prediction:
        return self.backbone(z_t, t, text, **self.given(z_t, t, text, cond))

    def dsm_loss(self, z_t, t, x0, eps, text, cond):
        """Denoising score matching given the condition."""
        return self.backbone.dsm_loss(z_t, t, x0, eps, text, **self.given(z_t, t, text, cond))

    def given(self, z_t, t, text, cond):
        """The condition as a keyword argument of the backbone."""
        if self.branch is None:
            return {"concat": cond}
        return {"residuals": self.branch(z_t, jnp.broadcast_to(t, z_t.shape[:1]), text, cond)}


def identity(params, x, key=None):
    """The autoencoder of pixel-space models."""
    return x


@flax.struct.dataclass
class Autoencoder:
    """Images in [-1, 1] to the space the diffusion lives in, and back; the identity for pixel models."""

    params: Any = None
    encoder: Callable = flax.struct.field(pytree_node=False, default=identity)
    decoder: Callable = flax.struct.field(pytree_node=False, default=identity)

    def encode(self, x, key=None):
        """The latent of x or, with a key (or one for each image), a sample from its posterior."""
        return self.encoder(self.params, x) if key is None else self.encoder(self.params, x, key)

    def decode(self, z):
        return self.decoder(self.params, z)

    def images(self, z):
        """Pictures in [0, 1] of latents, or of pixels."""
        return jnp.clip(self.decode(z) * 0.5 + 0.5, 0.0, 1.0)

"""Networks as callable pytrees, so that losses call nets the way papers write them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from cddistill import diffusion
from cddistill.diffusion import Data, Prediction

Time = Shaped[Array | np.ndarray, "#b"] | Shaped[ArrayLike, ""]  # a native timestep per sample, or one for the batch


def name_of(apply: Callable) -> str:
    """The class of the flax module behind an apply function, else the function's own name or class."""
    if isinstance(apply, functools.partial):
        return name_of(apply.func)
    if (module := getattr(apply, "module", None)) is not None:
        return type(module).__name__
    return getattr(apply, "__name__", type(apply).__name__)


def count(params) -> str:
    """The number of weights as text, "3.1 M weights"; the leaves may be arrays, tracers or ShapeDtypeStructs."""
    n = sum(getattr(x, "size", 0) for x in jax.tree.leaves(params))
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit} weights"
    return f"{n} weights"


def in_float32(apply: Any) -> Any:
    """An apply function whose flax modules, at any depth of its fields, compute in float32."""
    if isinstance(apply, nn.Module):
        return apply.clone(dtype=jnp.float32)
    if not dataclasses.is_dataclass(apply):
        return apply
    return dataclasses.replace(apply, **{f.name: in_float32(getattr(apply, f.name)) for f in dataclasses.fields(apply)})


@flax.struct.dataclass(repr=False)
class Net:
    """Weights and a pure apply function; the weights are the only pytree leaves."""

    params: Any
    apply: Callable = flax.struct.field(pytree_node=False)

    def __call__(self, *args, **kwargs):
        """apply(params, *args, **kwargs)."""
        return self.apply(self.params, *args, **kwargs)

    def __repr__(self):
        return f"{type(self).__name__}({name_of(self.apply)}, {count(self.params)})"

    @property
    def module(self):
        """The flax module behind apply, which holds the network's options; None if apply is another function."""
        return getattr(self.apply, "module", None)

    def in_float32(self):
        """The same network with all its flax modules computing in float32, whatever their dtype was."""
        return self.replace(apply=in_float32(self.apply))


@flax.struct.dataclass(repr=False)
class Denoiser(Net):
    """A network with its noise schedule and parameterisation ("eps", "x0", "v" or "flow")."""

    schedule: diffusion.Schedule = flax.struct.field(pytree_node=False)
    predicts: str = flax.struct.field(pytree_node=False)

    def __repr__(self):
        what = f"predicts {self.predicts} on {type(self.schedule).__name__}"
        return f"{type(self).__name__}({name_of(self.apply)}, {count(self.params)}, {what})"

    def __call__(self, z_t: Data, t: Time, *cond, **kwargs) -> Prediction:
        """x0 and eps predicted from noisy data z_t [b, ...] at native timestep t, one per sample or one for all.

        cond and kwargs are passed on to the network: text or classes, then what its module takes.
        """
        t = jnp.broadcast_to(t, z_t.shape[:1])
        alpha, sigma = self.alpha_sigma(t, z_t)
        return diffusion.predict(self.predicts, self.apply(self.params, z_t, t, *cond, **kwargs), z_t, alpha, sigma)

    def features(self, z_t: Data, t: Time, *cond) -> Float[Array, "b h w c"]:
        """The bottleneck in float32: the input of EDM's middle blocks, the output of a UNet's middle block."""
        return self.apply(self.params, z_t, jnp.broadcast_to(t, z_t.shape[:1]), *cond, features=True)[1]

    def decoder_features(self, z_t: Data, t: Time, *cond) -> Sequence[tuple[Float[Array, "b ..."], ...]]:
        """Decoder features per level, coarsest first, float32: (before the skip connection, the skip, after it)."""
        return self.apply(self.params, z_t, jnp.broadcast_to(t, z_t.shape[:1]), *cond, features=True)[2]

    def alpha_sigma(self, t: Time, x: Data) -> tuple[Float[Array, " b *#d"], Float[Array, " b *#d"]]:
        """alpha and sigma at native timestep t, [b, 1, ..., 1] with the rank of x, float32."""
        return tuple(diffusion.like(c, x) for c in self.schedule.alpha_sigma(jnp.broadcast_to(t, x.shape[:1])))

    def noise(self, x0: Data, eps: Data, t: Time) -> Float[Array, " b *d"]:
        """A sample of q(z_t | x0) at native timestep t: alpha_t x0 + sigma_t eps.

        With the x0 and eps of a `Prediction` it is a deterministic DDIM step to t (Song et al. 2021, eq. 12).
        """
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def dsm_loss(self, z_t: Data, t: Time, x0: Data, eps: Data, *cond, **kwargs) -> Float[Array, ""]:
        """Denoising score matching: mean squared error of the network's raw output, over all elements.

        The target is `diffusion.target` in this network's own parameterisation; z_t = noise(x0, eps, t).
        """
        t = jnp.broadcast_to(t, x0.shape[:1])
        out = self.apply(self.params, z_t, t, *cond, **kwargs)
        return ((out - diffusion.target(self.predicts, x0, eps, *self.alpha_sigma(t, x0))) ** 2).mean()


@flax.struct.dataclass(repr=False)
class Adapted:
    """A denoiser with a condition image, which enters through a branch's residuals or, without one, as input channels.

    backbone and branch may each be frozen, trained or an EMA.
    """

    backbone: Denoiser
    branch: Net | None = None

    def __repr__(self):
        return f"Adapted({self.backbone!r}, branch={self.branch!r})"

    def __call__(self, z_t: Data, t: Time, text, cond) -> Prediction:
        """As `Denoiser.__call__`; cond is the condition image, in pixels [b, k h, k w, c] or a latent [b, h, w, c]."""
        return self.backbone(z_t, t, text, **self.given(z_t, t, text, cond))

    def dsm_loss(self, z_t: Data, t: Time, x0: Data, eps: Data, text, cond) -> Float[Array, ""]:
        """As `Denoiser.dsm_loss`, given the condition."""
        return self.backbone.dsm_loss(z_t, t, x0, eps, text, **self.given(z_t, t, text, cond))

    def given(self, z_t: Data, t: Time, text, cond) -> dict[str, Any]:
        """The condition as a keyword argument of the backbone: `concat`, or `residuals` from the branch."""
        if self.branch is None:
            return {"concat": cond}
        return {"residuals": self.branch(z_t, jnp.broadcast_to(t, z_t.shape[:1]), text, cond)}


def identity(params, x, key=None):
    """Encoder and decoder of pixel-space models."""
    return x


@flax.struct.dataclass(repr=False)
class Autoencoder:
    """Images in [-1, 1] to latents and back; the identity for pixel-space models."""

    params: Any = None
    encoder: Callable = flax.struct.field(pytree_node=False, default=identity)
    decoder: Callable = flax.struct.field(pytree_node=False, default=identity)
    rows: int = flax.struct.field(pytree_node=False, default=0)  # images that `generate` decodes at a time; 0 = all
    tile: int = flax.struct.field(pytree_node=False, default=0)  # side of a latent's tiles there; 0 = whole

    def __repr__(self):
        if self.encoder is identity:
            return "Autoencoder(identity)"
        return f"Autoencoder({name_of(self.encoder)}, {count(self.params)})"

    def encode(self, x: Data, key=None) -> Float[Array | np.ndarray, "b ..."]:
        """Latents of images x: the posterior's mean or, with one key or a key per image, a sample from it."""
        return self.encoder(self.params, x) if key is None else self.encoder(self.params, x, key)

    def decode(self, z: Data) -> Float[Array | np.ndarray, "b ..."]:
        """Images in about [-1, 1], not clipped."""
        return self.decoder(self.params, z)

    def images(self, z: Data) -> Float[Array, "b ..."]:
        """Images in [0, 1] of latents, or of pixels in [-1, 1]; clipped. What is not finite becomes NaN."""
        x = self.decode(z) * 0.5 + 0.5
        return jnp.where(jnp.abs(x) < jnp.inf, jnp.clip(x, 0.0, 1.0), jnp.nan)  # clipping would hide an infinity

"""Distances and weights: arrays [b, ...] in, one number per sample [b] out."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cddistill import diffusion
from cddistill.diffusion import Data
from cddistill.net import Denoiser, Time
from cddistill.perceptual.latent_lpips import normalize_channels

PerSample = Float[Array, " b"]
Maps = Float[Array, "b h w c"]


def mean(a: Float[Array | np.ndarray, "b ..."]) -> Float[Array | np.ndarray, " b"]:
    """Mean over all but the batch axis."""
    return a.mean(tuple(range(1, a.ndim)))


def mse(a: Data, b: Data) -> Float[Array | np.ndarray, " b"]:
    """Mean squared error of each sample."""
    return mean((a - b) ** 2)


def norm(a: Data) -> PerSample:
    """Euclidean norm of each sample."""
    return jnp.sqrt((a**2).sum(tuple(range(1, a.ndim))))


def pseudo_huber(a: Data, b: Data, c: float = 1e-3) -> PerSample:
    """sqrt(mse + c^2) - c of each sample: quadratic in a - b near zero, linear far away (Song & Dhariwal 2024).

    The paper has the squared norm where this has the mean square.
    """
    return jnp.sqrt(mse(a, b) + c**2) - c


def direction(a: Maps, b: Maps) -> PerSample:
    """2 - 2 cos of the angle between the channel vectors of a and b at each pixel, mean over pixels; in [0, 4].

    LPIPS's formula (Zhang et al. 2018, eq. 1) with equal weights for all channels.
    """
    return ((normalize_channels(a) - normalize_channels(b)) ** 2).sum(-1).mean((1, 2))


def min_snr(alpha: Float[Array, "*n"], sigma: Float[Array, "*n"], gamma: float) -> Float[Array, "*n"]:
    """min(SNR, gamma) / SNR with SNR = (alpha / sigma)^2, one weight per timestep (Hang et al. 2023); in [0, 1].

    It is 1 where SNR <= gamma, thus also at zero terminal SNR, and falls to 0 as sigma does. gamma must be positive.
    """
    return gamma / jnp.maximum((alpha / sigma) ** 2, gamma)  # no division by an SNR of 0


def denoising(net: Denoiser, x0: Data, eps: Data, t: Time, text) -> tuple[Float[Array, ""], PerSample]:
    """(mean |out - target|^2, squared error in eps of each sample) of a denoiser at native timesteps t [b].

    x0 networks have EDM's weight SNR + 1 / sigma_data^2 (Karras et al. 2022, arXiv:2206.00364, table 1).
    """
    pred = net(net.noise(x0, eps, t), t, text)
    alpha, sigma = net.alpha_sigma(t, x0)
    out, target = (diffusion.target(net.predicts, *x, alpha, sigma) for x in (pred, (x0, eps)))
    loss = mse(out, target)
    if net.predicts == "x0":
        sigma_data = getattr(net.module, "sigma_data", 0.5)
        loss = loss * ((alpha / sigma) ** 2 + sigma_data**-2).reshape(loss.shape)
    return loss.mean(), mse(pred.eps, eps)


def gan(logits: Sequence[Float[Array, "b ..."]], real: bool) -> PerSample:
    """-log sigmoid(l) with real=True, -log sigmoid(-l) with real=False: mean over a map's pixels, then over the maps.

    logits is a tuple of maps [b, ...]. The discriminator's loss is gan(of data, True) + gan(of generated, False); the
    generator's non-saturating loss is gan(of generated, True) (Goodfellow et al. 2014, sec. 3). Equal weights of the
    maps are ours: Diffusion2GAN (Kang et al. 2024, arXiv:2405.05967) does not give any.
    """
    return sum(mean(jax.nn.softplus(-x if real else x)) for x in logits) / len(logits)


def r1(score: Callable, x: Data) -> PerSample:
    """|d score / dx|^2 of each sample: the R1 penalty of Mescheder et al. 2018 (arXiv:1801.04406) without gamma / 2.

    score(x) is [b], or a tuple of maps of logits [b, ...], of which each map's mean over pixels is summed. The score of
    a sample must depend on that sample alone.
    """
    slope = jax.grad(lambda x: sum(mean(y).sum() for y in jax.tree.leaves(score(x))))(x)
    return (slope**2).sum(tuple(range(1, x.ndim)))


def approximate_r1(score: Callable, x: Data, noise: Data) -> PerSample:
    """Squared change of each sample's logits when noise is added to x: mean over pixels, then over maps.

    It needs no second derivative (Lin et al. 2025, arXiv:2501.08316). For noise sigma eps with unit eps and small sigma
    its expectation is sigma^2 |d l / dx|^2, averaged over all logits l.
    """
    changes = jax.tree.leaves(jax.tree.map(jnp.subtract, score(x + noise), score(x)))
    return sum(mean(change**2) for change in changes) / len(changes)


DISTANCES = {"l2": mse, "pseudo_huber": pseudo_huber}
Distance = Literal[*DISTANCES]

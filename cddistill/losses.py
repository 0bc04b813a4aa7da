"""Distances and weights: arrays [b, ...] in, one number per sample [b] out."""

import jax
import jax.numpy as jnp

from cddistill.models.latent_lpips import unit


def mean(a):
    """Mean of each sample."""
    return a.mean(tuple(range(1, a.ndim)))


def mse(a, b):
    """Mean squared error of each sample."""
    return mean((a - b) ** 2)


def norm(a):
    """Euclidean norm of each sample."""
    return jnp.sqrt((a**2).sum(tuple(range(1, a.ndim))))


def pseudo_huber(a, b, c: float = 1e-3):
    """sqrt(|a - b|^2 + c^2) - c of each sample's mean square: quadratic near zero, linear far away (Song & Dhariwal
    2024)."""
    return jnp.sqrt(mse(a, b) + c**2) - c


def direction(a, b):
    """Squared distance of unit vectors [b, h, w, c] at each pixel, 2 - 2 cos, on average over pixels: LPIPS's formula
    (Zhang et al. 2018, eq. 1) with all channels alike."""
    return ((unit(a) - unit(b)) ** 2).sum(-1).mean((1, 2))


def min_snr(alpha, sigma, gamma: float):
    """min(SNR, gamma) / SNR (Hang et al. 2023), one weight per time; 1 as gamma grows."""
    snr = (alpha / sigma) ** 2
    return jnp.minimum(snr, gamma) / jnp.maximum(snr, 1e-12)


def gan(logits, real: bool):
    """-log sigmoid(l) for real samples, -log sigmoid(-l) for drawn ones: mean over a map's pixels, then over the maps.

    logits is a tuple of maps [b, ...]. The discriminator's loss is gan(of data, True) + gan(of samples, False), the
    generator's, which does not saturate, gan(of samples, True) (Goodfellow et al. 2014, sec. 3). That all maps weigh
    the same is ours: Diffusion2GAN (Kang et al. 2024, arXiv:2405.05967) does not say.
    """
    return sum(mean(jax.nn.softplus(-x if real else x)) for x in logits) / len(logits)


def r1(score, x):
    """|d score / dx|^2 of each sample: R1 of Mescheder et al. 2018 (arXiv:1801.04406) without its gamma / 2.

    score(x) is [b], or a tuple of maps of logits: then the sum over maps of their means over pixels. What it gives a
    sample must depend on that sample alone.
    """
    slope = jax.grad(lambda x: sum(mean(y).sum() for y in jax.tree.leaves(score(x))))(x)
    return (slope**2).sum(tuple(range(1, x.ndim)))


def approximate_r1(score, x, noise):
    """Squared change of each sample's logits when noise is added to it, mean over pixels and then over maps.

    Needs no second derivative (Lin et al. 2025, arXiv:2501.08316). For noise sigma eps with unit eps and a small sigma
    its expectation is sigma^2 |d l / dx|^2, the mean over all logits l.
    """
    changes = jax.tree.leaves(jax.tree.map(jnp.subtract, score(x + noise), score(x)))
    return sum(mean(change**2) for change in changes) / len(changes)


DISTANCES = {"l2": mse, "pseudo_huber": pseudo_huber}

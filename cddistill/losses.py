"""Distances and weights: arrays [b, ...] in, one number per sample [b] out."""

import jax.numpy as jnp


def mse(a, b):
    """Mean squared error of each sample."""
    return ((a - b) ** 2).mean(tuple(range(1, a.ndim)))


def norm(a):
    """Euclidean norm of each sample."""
    return jnp.sqrt((a**2).sum(tuple(range(1, a.ndim))))


def pseudo_huber(a, b, c: float = 1e-3):
    """sqrt(|a - b|^2 + c^2) - c of each sample's mean square: quadratic near zero, linear far away (Song & Dhariwal
    2024)."""
    return jnp.sqrt(mse(a, b) + c**2) - c


def min_snr(alpha, sigma, gamma: float):
    """min(SNR, gamma) / SNR (Hang et al. 2023), one weight per time; 1 as gamma grows."""
    snr = (alpha / sigma) ** 2
    return jnp.minimum(snr, gamma) / jnp.maximum(snr, 1e-12)


DISTANCES = {"l2": mse, "pseudo_huber": pseudo_huber}

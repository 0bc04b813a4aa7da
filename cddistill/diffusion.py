"""Forward process and parameterisations: z_t = alpha_t x0 + sigma_t eps.

A schedule gives alpha and sigma at its own native time t and places n times on a grid. Everything else in the package
is written with (alpha, sigma), so a new schedule is one small class. All of it is float32, whatever the networks
compute in: Stable Diffusion divides by alpha = 0.068 at t = 999.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np


class Prediction(NamedTuple):
    """One network output, seen as clean data and as noise (unused views cost nothing under jit)."""

    x0: jax.Array
    eps: jax.Array


@runtime_checkable
class Schedule(Protocol):
    """Noise level as a function of native time."""

    def alpha_sigma(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Signal and noise amplitude at native time t, float32, of the shape of t."""

    def at(self, u: jax.Array) -> jax.Array:
        """Native time at the fraction u of the way from data (0) to noise (1), for random times."""

    def grid(self, n: int) -> jax.Array:
        """Native times of an n-step sampler, from most to least noisy; a step to x0 follows the last."""


@functools.cache
def ddpm_alphas(schedule: "DDPM") -> np.ndarray:
    """sqrt(alphas_cumprod) in float64, the table behind `DDPM`."""
    if schedule.trained_betas is not None:
        betas = np.array(schedule.trained_betas, np.float64)
    elif schedule.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        u = np.arange(schedule.num_timesteps + 1) / schedule.num_timesteps
        bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)
    elif schedule.beta_schedule == "linear":
        betas = np.linspace(schedule.beta_start, schedule.beta_end, schedule.num_timesteps)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_timesteps) ** 2
    else:
        known = "scaled_linear, linear, squaredcos_cap_v2"
        raise ValueError(f"beta_schedule {schedule.beta_schedule!r} is not one of {known}")
    alphas = np.sqrt(np.cumprod(1.0 - betas))
    if schedule.zero_snr:  # Lin et al. 2023, algorithm 1: alpha_T = 0, alpha_1 unchanged
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        alphas[-1] = schedule.last_alpha
    return alphas


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Discrete variance-preserving schedules of the DDPM family; t is in [0, num_timesteps).

    A t of integers looks the table up. A t of floats may lie between two of its entries: there sigma/alpha is linear,
    as in diffusers' Euler and Heun.
    """

    num_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"  # Stable Diffusion's; or "linear" (Ho et al. 2020), "squaredcos_cap_v2"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = False  # rescale to zero terminal signal-to-noise ratio
    trained_betas: tuple[float, ...] | None = None  # num_timesteps betas in place of the three fields that name them
    last_alpha: float = 0.0  # of a zero-SNR schedule; 2^-12 in those of diffusers' samplers that divide by it

    def alpha_sigma(self, t):
        alphas = ddpm_alphas(self)
        sigmas = np.sqrt(1.0 - alphas**2)
        if not jnp.issubdtype(jnp.result_type(t), jnp.floating):
            return jnp.asarray(alphas, jnp.float32)[t], jnp.asarray(sigmas, jnp.float32)[t]
        if alphas[-1] == 0.0:
            raise ValueError("sigma/alpha is infinite at zero SNR: use integer times, or a DDPM with last_alpha > 0")
        ratio = jnp.interp(t, np.arange(self.num_timesteps), jnp.asarray(sigmas / alphas, jnp.float32))
        alpha = 1.0 / jnp.sqrt(1.0 + ratio**2)
        return alpha, ratio * alpha

    def at(self, u):
        return jnp.clip(jnp.round(u * self.num_timesteps).astype(jnp.int32) - 1, 0, self.num_timesteps - 1)

    def grid(self, n):
        return self.at(1.0 - jnp.arange(n) / n)  # "trailing" spacing: T - 1, ..., T/n - 1


@dataclasses.dataclass(frozen=True)
class EDM:
    """Karras et al. 2022: alpha = 1, t = sigma; grids follow eq. 5 of that paper."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha_sigma(self, t):
        return jnp.ones_like(t), t

    def at(self, u):
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho

    def grid(self, n):
        return self.at(1.0 - jnp.arange(n) / max(n - 1, 1))  # from sigma_max to sigma_min


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths, t in [0, 1]: alpha = 1 - t, sigma = t (Liu et al. 2023)."""

    def alpha_sigma(self, t):
        return 1.0 - t, t

    def at(self, u):
        return jnp.asarray(u, jnp.float32)

    def grid(self, n):
        return self.at(1.0 - jnp.arange(n) / n)


def coefficients(kind: str, alpha, sigma):
    """(a, b) such that a network of this kind predicts a * eps + b * x0."""
    one, zero = jnp.ones_like(alpha), jnp.zeros_like(alpha)
    return {
        "eps": (one, zero),
        "x0": (zero, one),
        "v": (alpha, -sigma),  # Salimans & Ho 2022, eq. 11
        "flow": (one, -one),  # Lipman et al. 2023
    }[kind]


def predict(kind: str, out, z_t, alpha, sigma) -> Prediction:
    """Solve { out = a eps + b x0, z_t = sigma eps + alpha x0 } for x0 and eps."""
    a, b = coefficients(kind, alpha, sigma)
    det = a * alpha - b * sigma
    return Prediction(x0=(a * z_t - sigma * out) / det, eps=(alpha * out - b * z_t) / det)


def target(kind: str, x0, eps, alpha, sigma):
    """What a network of this kind regresses onto in denoising score matching."""
    a, b = coefficients(kind, alpha, sigma)
    return a * eps + b * x0


def like(c, x):
    """Right-pad c with unit axes so that it broadcasts over x: [b] -> [b, 1, ..., 1]."""
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim))


def guide(cond, uncond, scale):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) of any pytree of predictions; scale 1 is no guidance."""
    return jax.tree.map(lambda c, u: u + scale * (c - u), cond, uncond)

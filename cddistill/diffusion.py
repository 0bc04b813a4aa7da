"""Forward process and parameterisations: z_t = alpha_t x0 + sigma_t eps.

A schedule gives alpha and sigma at its native timesteps and spaces the timesteps of a sampler. The rest of the package
uses only (alpha, sigma), so a new schedule is one small class. Everything here is float32, whatever dtype the networks
compute in: `predict` divides by alpha, which is 0.068 at t = 999 of Stable Diffusion.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Shaped

Timesteps = Shaped[ArrayLike, "*n"]  # native timesteps, any shape
AlphaSigma = tuple[Float[Array, "*n"], Float[Array, "*n"]]
Data = Float[Array | np.ndarray, "b *d"]  # images, latents or network outputs: any rank after the batch
Amplitude = Float[Array | np.ndarray, "b *#d"] | Float[ArrayLike, ""]  # alpha or sigma, broadcast over Data
Guided = PyTree[Float[ArrayLike, "..."], "T"]


class Prediction(NamedTuple):
    """One network output as clean data and as noise, both of the shape of z_t; jit removes the unused one."""

    x0: jax.Array
    eps: jax.Array


@runtime_checkable
class Schedule(Protocol):
    """Noise level as a function of the native timestep t: an index (DDPM), sigma (EDM) or a number in [0, 1] (flow)."""

    def alpha_sigma(self, t: Timesteps) -> AlphaSigma:
        """Signal amplitude alpha and noise amplitude sigma at native timesteps t, float32, both of t's shape."""

    def at(self, u: Float[ArrayLike, "*n"]) -> Shaped[Array, "*n"]:
        """Native timesteps at u in [0, 1], from data (0) to noise (1); uniform u gives the timesteps of training."""

    def grid(self, n: int) -> Shaped[Array, " n"]:
        """Native timesteps of an n-step sampler, from most to least noisy; the last step goes from the last to x0."""


@functools.cache
def ddpm_alphas(schedule: "DDPM") -> np.ndarray:
    """The table of `DDPM`: alpha = sqrt(alphas_cumprod), float64 [num_timesteps].

    Raises ValueError for an unknown beta_schedule.
    """
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
    """Discrete variance-preserving schedules (Ho et al. 2020): alpha^2 + sigma^2 = 1, t in [0, num_timesteps).

    Integer t are indices of the table. Float t may lie between two entries, where sigma/alpha is interpolated linearly,
    as in diffusers' Euler and Heun schedulers. Float t raise ValueError if the last alpha is 0.
    """

    num_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"  # Stable Diffusion's; or "linear" (Ho et al. 2020), "squaredcos_cap_v2"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = False  # rescale to zero terminal signal-to-noise ratio
    trained_betas: tuple[float, ...] | None = None  # num_timesteps betas; they replace the three beta_* fields
    last_alpha: float = 0.0  # with zero_snr; 2^-12 for the diffusers samplers that divide by alpha

    def alpha_sigma(self, t: Timesteps) -> AlphaSigma:
        alphas = ddpm_alphas(self)
        sigmas = np.sqrt(1.0 - alphas**2)
        if not jnp.issubdtype(jnp.result_type(t), jnp.floating):
            return jnp.asarray(alphas, jnp.float32)[t], jnp.asarray(sigmas, jnp.float32)[t]
        if alphas[-1] == 0.0:
            raise ValueError("sigma/alpha is infinite at zero SNR: use integer t, or a DDPM with last_alpha > 0")
        ratio = jnp.interp(t, np.arange(self.num_timesteps), jnp.asarray(sigmas / alphas, jnp.float32))
        alpha = 1.0 / jnp.sqrt(1.0 + ratio**2)
        return alpha, ratio * alpha

    def at(self, u: Float[ArrayLike, "*n"]) -> Shaped[Array, "*n"]:
        return jnp.clip(jnp.round(u * self.num_timesteps).astype(jnp.int32) - 1, 0, self.num_timesteps - 1)

    def grid(self, n: int) -> Shaped[Array, " n"]:
        return self.at(1.0 - jnp.arange(n) / n)  # "trailing" spacing: T - 1, ..., T/n - 1


@dataclasses.dataclass(frozen=True)
class EDM:
    """Karras et al. 2022: alpha = 1, sigma = t, t in [sigma_min, sigma_max]; grids follow eq. 5 of that paper."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0  # larger rho puts more steps near sigma_min

    def alpha_sigma(self, t: Timesteps) -> AlphaSigma:
        return jnp.ones_like(t), t

    def at(self, u: Float[ArrayLike, "*n"]) -> Shaped[Array, "*n"]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho

    def grid(self, n: int) -> Shaped[Array, " n"]:
        return self.at(1.0 - jnp.arange(n) / max(n - 1, 1))  # from sigma_max to sigma_min


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths, t in [0, 1]: alpha = 1 - t, sigma = t (Liu et al. 2023)."""

    def alpha_sigma(self, t: Timesteps) -> AlphaSigma:
        return 1.0 - t, t

    def at(self, u: Float[ArrayLike, "*n"]) -> Shaped[Array, "*n"]:
        return jnp.asarray(u, jnp.float32)

    def grid(self, n: int) -> Shaped[Array, " n"]:
        return self.at(1.0 - jnp.arange(n) / n)


def coefficients(
    kind: str, alpha: Float[ArrayLike, "*n"], sigma: Float[ArrayLike, "*n"]
) -> tuple[Float[ArrayLike, "*n"], Float[ArrayLike, "*n"]]:
    """(a, b) such that a network of this kind predicts a * eps + b * x0; kind is "eps", "x0", "v" or "flow".

    Any other kind raises KeyError.
    """
    one = jnp.ones_like(alpha)
    zero = jnp.zeros_like(alpha)
    return {
        "eps": (one, zero),
        "x0": (zero, one),
        "v": (alpha, -sigma),  # Salimans & Ho 2022, eq. 11
        "flow": (one, -one),  # Lipman et al. 2023
    }[kind]


def predict(kind: str, out: Data, z_t: Data, alpha: Amplitude, sigma: Amplitude) -> Prediction:
    """x0 and eps [b, ...] from a network's output `out` at noisy data z_t; alpha and sigma broadcast: [b, 1, 1, 1].

    Solves { out = a eps + b x0, z_t = sigma eps + alpha x0 } with (a, b) of `coefficients`. An eps network has no
    finite x0 where alpha = 0, an x0 network no finite eps where sigma = 0.
    """
    a, b = coefficients(kind, alpha, sigma)
    det = a * alpha - b * sigma
    return Prediction(x0=(a * z_t - sigma * out) / det, eps=(alpha * out - b * z_t) / det)


def target(kind: str, x0: Data, eps: Data, alpha: Amplitude, sigma: Amplitude) -> Float[Array | np.ndarray, " b *d"]:
    """The regression target [b, ...] of a network of this kind in denoising score matching: a eps + b x0."""
    a, b = coefficients(kind, alpha, sigma)
    return a * eps + b * x0


def like(c: Shaped[Array, "..."], x: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array, "..."]:
    """c with trailing axes of size 1 up to the rank of x, so that it broadcasts over x: [b] -> [b, 1, ..., 1]."""
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim))


def guide(cond: Guided, uncond: Guided, scale: float | Float[Array, "..."]) -> Guided:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): uncond + scale (cond - uncond), leaf by leaf.

    cond and uncond are pytrees of one structure, such as two `Prediction`s; scale is a number, or broadcasts over their
    leaves. scale 1 returns cond, 0 returns uncond.
    """
    return jax.tree.map(lambda c, u: u + scale * (c - u), cond, uncond)

"""Deterministic samplers for teachers and students: from noise to exactly x0.

Each takes `denoise(z_t, t) -> Prediction` (guidance and conditions already inside), the schedule, unit noise of the
first time's level and native times from most to least noisy, and compiles to one loop whatever the number of steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cddistill.diffusion import Prediction, Schedule, guide

Denoise = Callable[[jax.Array, jax.Array], Prediction]


def guided(denoise, text, null, scale: float) -> Denoise:
    """denoise(z, t, text) as a function of (z, t) under classifier-free guidance; scale 1 costs one evaluation, not
    two."""
    if scale == 1.0:
        return lambda z, t: denoise(z, t, text)
    return lambda z, t: guide(denoise(z, t, text), denoise(z, t, null), scale)


def times(schedule: Schedule, n: int, power: float = 1.0) -> jax.Array:
    """The schedule's own n-step grid, or, with power > 1, one that lies closer to the data: u = 1, ..., (1/n)^power.

    Few-step samplers gain from a last step of little noise; times stay distinct on schedules of 1000 steps.
    """
    if power == 1.0:
        return schedule.grid(n)
    u = 1.0 - jnp.arange(n) / n
    return schedule.at(jnp.maximum(u**power, n * u / 1000))


def ddim(denoise: Denoise, schedule: Schedule, noise: jax.Array, times: jax.Array) -> jax.Array:
    """DDIM (Song et al. 2021, eq. 12 with eta = 0); len(times) evaluations."""
    alpha, sigma = levels(schedule, times)

    def step(z, i):
        pred = denoise(z, times[i])
        return alpha[i + 1] * pred.x0 + sigma[i + 1] * pred.eps, None

    return jax.lax.scan(step, first_level(sigma, noise), jnp.arange(len(times)))[0]


def heun(denoise: Denoise, schedule: Schedule, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Heun's second-order steps (Karras et al. 2022, algorithm 1 without churn); 2 len(times) - 1 evaluations.

    Integrates d(z/alpha) / d(sigma/alpha) = eps, so alpha must not vanish at the first time.
    """
    alpha, sigma = schedule.alpha_sigma(times)

    def step(z, i):
        pred = denoise(z, times[i])
        z_s = alpha[i + 1] * pred.x0 + sigma[i + 1] * pred.eps
        span = sigma[i + 1] - alpha[i + 1] * sigma[i] / alpha[i]  # alpha_s d(sigma/alpha)
        return z_s + span * 0.5 * (denoise(z_s, times[i + 1]).eps - pred.eps), None

    z, _ = jax.lax.scan(step, first_level(sigma, noise), jnp.arange(len(times) - 1))
    return denoise(z, times[-1]).x0


def dpm_solver_pp(denoise: Denoise, schedule: Schedule, noise: jax.Array, times: jax.Array) -> jax.Array:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); len(times) evaluations, first and last step of first order."""
    alpha, sigma = levels(schedule, times)
    logsnr_half = jnp.log(alpha) - jnp.log(sigma)

    def step(carry, i):
        z, previous = carry
        x0 = denoise(z, times[i]).x0
        h, h_previous = logsnr_half[i + 1] - logsnr_half[i], logsnr_half[i] - logsnr_half[i - 1]
        slope = jnp.where((i == 0) | (i == len(times) - 1), 0.0, 0.5 * h / h_previous)  # 1/(2r); 0 behind zero SNR
        d = x0 + slope * (x0 - previous)
        shrink = alpha[i] * sigma[i + 1] / (sigma[i] * alpha[i + 1])  # e^-h, finite where alpha_t = 0
        return (sigma[i + 1] / sigma[i] * z + alpha[i + 1] * (1.0 - shrink) * d, x0), None

    z = first_level(sigma, noise)
    return jax.lax.scan(step, (z, jnp.zeros_like(z)), jnp.arange(len(times)))[0][0]


def levels(schedule, times):
    """Alpha and sigma at the times and, behind them, at x0 itself: (1, 0), so that the last step returns x0 exactly."""
    alpha, sigma = schedule.alpha_sigma(times)
    return jnp.append(alpha, 1.0), jnp.append(sigma, 0.0)


def first_level(sigma, noise):
    """Unit noise scaled to the first time's sigma (80 for EDM, 1 for variance-preserving schedules)."""
    return jnp.maximum(sigma[0], 1.0) * noise


SAMPLERS = {"ddim": ddim, "heun": heun, "dpm_solver_pp": dpm_solver_pp}

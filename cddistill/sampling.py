"""Samplers for teachers and students: from noise to x0.

Each takes `denoise(z_t, t) -> Prediction` (guidance and conditions already inside), the schedule, unit noise of the
first time's level and native times from most to least noisy, and compiles to one loop whatever the number of steps.
Euler's method is `ddim` (both are exact where eps is constant) and ancestral Euler is `ddim` with eta = 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cddistill.diffusion import Prediction, Schedule, guide
from cddistill.models.schedulers import Sampling

Denoise = Callable[[jax.Array, jax.Array], Prediction]
LEVELS = 1000  # noise levels, 0 the least noisy, of `native`
Fresh = Callable[[jax.Array], jax.Array]  # step number -> unit noise of z's shape, for samplers that add some


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


def native(schedule: Schedule, levels) -> jax.Array:
    """Native times of some of `LEVELS` noise levels: for DDPM's the times themselves, for EDM a Karras grid of 1,000.

    Methods that were published with t = 999 or 399 count so, whatever the schedule (Yin et al. 2024, released code).
    """
    return schedule.grid(LEVELS)[::-1][jnp.asarray(levels)]


def ddim(denoise: Denoise, schedule: Schedule, noise, times, lands=None, eta: float = 0.0, fresh: Fresh | None = None):
    """DDIM (Song et al. 2021, eq. 12); len(times) evaluations.

    lands = (alpha [n], sigma [n]) is where each step arrives, by default at the next time and, last, at x0 itself.
    With eta > 0, up to 1, that share of the noise is drawn anew: step i adds fresh(i).
    """
    alpha, sigma = schedule.alpha_sigma(times)
    alpha_s, sigma_s = lands or (jnp.append(alpha[1:], 1.0), jnp.append(sigma[1:], 0.0))
    if eta and fresh is None:
        raise ValueError(f"DDIM with eta = {eta} adds noise at every step: pass fresh, or use eta = 0")
    ratio = alpha * sigma_s / (alpha_s * sigma)  # e^-h, finite where alpha_t = 0
    anew = eta * sigma_s * jnp.sqrt(jnp.maximum(1.0 - ratio**2, 0.0))  # eq. 16
    kept = jnp.sqrt(sigma_s**2 - anew**2) if eta else sigma_s

    def step(z, i):
        pred = denoise(z, times[i])
        z_s = alpha_s[i] * pred.x0 + kept[i] * pred.eps
        return z_s + anew[i] * fresh(i) if eta else z_s, None

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


def lcm(denoise: Denoise, schedule: Schedule, noise, times, fresh: Fresh | None = None, scaling: float | None = 10.0):
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): x0 from each time, noised anew to the next.

    len(times) evaluations; step i adds fresh(i), so more than one step needs it. scaling multiplies t in `boundary`;
    None leaves the boundary condition out.
    """
    if fresh is None and len(times) > 1:
        raise ValueError("lcm adds noise between its steps: pass fresh, or sample in one step")
    alpha, sigma = levels(schedule, times)

    def step(z, i):
        x0 = denoise(z, times[i]).x0
        x0 = x0 if scaling is None else boundary(x0, z, times[i], scaling)
        return alpha[i + 1] * x0 + (sigma[i + 1] * fresh(i) if fresh else 0.0), None

    return jax.lax.scan(step, first_level(sigma, noise), jnp.arange(len(times)))[0]


def boundary(x0, z, t, scaling: float = 10.0):
    """c_out x0 + c_skip z (Luo et al. 2023, eq. 9, sigma_data = 0.5), which is z itself at t = 0; t broadcasts over
    z."""
    t = scaling * t
    return t / jnp.sqrt(t**2 + 0.25) * x0 + 0.25 / (t**2 + 0.25) * z


def levels(schedule, times):
    """Alpha and sigma at the times and, behind them, at x0 itself: (1, 0), so that the last step returns x0 exactly."""
    alpha, sigma = schedule.alpha_sigma(times)
    return jnp.append(alpha, 1.0), jnp.append(sigma, 0.0)


def first_level(sigma, noise):
    """Unit noise scaled to the first time's sigma (80 for EDM, 1 for variance-preserving schedules)."""
    return jnp.maximum(sigma[0], 1.0) * noise


SAMPLERS = {"ddim": ddim, "heun": heun, "dpm_solver_pp": dpm_solver_pp, "lcm": lcm}


def sample(how: Sampling, denoise: Denoise, schedule, noise, n: int | None = None, fresh: Fresh | None = None):
    """x0 in n steps, as diffusers' scheduler of this description would compute it; traceable with how and n static.

    noise [b, ...] is N(0, I). n may be left out if `how` has a student's own times. LCM and eta > 0 also need fresh(i),
    noise for step i: lambda i: jax.random.normal(jax.random.fold_in(key, i), noise.shape). Raises ValueError if that is
    missing, or for an n that the grid cannot have.
    """
    times = how.times(schedule, n)
    options = {
        "ddim": {"lands": how.lands(schedule, n), "eta": how.eta, "fresh": fresh},
        "lcm": {"scaling": how.timestep_scaling, "fresh": fresh},
    }.get(how.sampler, {})
    if how.clip_sample_range is not None:
        denoise = clipped(denoise, how.clip_sample_range)
    start = noise if how.unit_noise else schedule.alpha_sigma(times[0])[1] * noise
    return SAMPLERS[how.sampler](denoise, schedule, start, times, **options)


def clipped(denoise, limit: float) -> Denoise:
    """The same predictions with x0 clipped to [-limit, limit]; eps stays, as in diffusers."""

    def clip(z, t):
        pred = denoise(z, t)
        return pred._replace(x0=jnp.clip(pred.x0, -limit, limit))

    return clip

"""Samplers for teachers and students: from noise to x0.

Each takes `denoise(z_t, t) -> Prediction`, with guidance and conditions already applied, the schedule, unit noise
[b, ...] and native timesteps [n] from most to least noisy, and returns x0 [b, ...]. Each compiles to one loop, whatever
the number of steps. Euler's method is `ddim` (both are exact where eps is constant), and ancestral Euler is `ddim` with
eta = 1.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from cddistill.diffusion import DDPM, Data, Prediction, Schedule, guide
from cddistill.method import StepNoise
from cddistill.models.schedulers import Sampling
from cddistill.typed import RISING, within

Denoise = Callable[[jax.Array, jax.Array], Prediction]
Timesteps = Shaped[Array | np.ndarray, " n"]  # native, from most to least noisy
Levels = tuple[Float[Array, "*n"], Float[Array, "*n"]]  # (alpha, sigma)
NUM_LEVELS = 1000  # noise levels of `level_to_time`; 0 is the least noisy
Level = Annotated[int, within(least=0, below=NUM_LEVELS)]
LevelRange = Annotated[tuple[Level, Level], RISING]


def guided(
    denoise: Callable, text: Any, null: Any, scale: float, image_scale: float = 1.0, blind: Callable | None = None
) -> Denoise:
    """denoise(z, t, text) as a function of (z, t) under classifier-free guidance with the null text `null`.

    With image_scale other than 1, guidance also leads away from blind(z, t, text), the network without its image
    (InstructPix2Pix, Brooks et al. 2023, arXiv:2211.09800, eq. 3). The network is evaluated once per call, twice with a
    scale other than 1, and three times with an image_scale other than 1.
    """

    def of_text(z, t):
        given = denoise(z, t, text)
        return given if scale == 1.0 else guide(given, denoise(z, t, null), scale)

    if image_scale == 1.0:
        return of_text

    def of_both(z, t):
        nothing, image, both = blind(z, t, null), denoise(z, t, null), denoise(z, t, text)
        eq3 = lambda nothing, image, both: nothing + image_scale * (image - nothing) + scale * (both - image)
        return jax.tree.map(eq3, nothing, image, both)

    return of_both


def evaluations(scale: float, image_scale: float = 1.0) -> int:
    """How often `guided` evaluates the network per call."""
    return 3 if image_scale != 1.0 else 1 if scale == 1.0 else 2


def timesteps(schedule: Schedule, n: int, power: float = 1.0) -> Timesteps:
    """The schedule's own n-step grid or, with power > 1, one with more steps near the data: u = 1, ..., (1/n)^power.

    Few-step samplers improve when the last step starts at little noise. The timesteps stay distinct on schedules of
    1000 steps.
    """
    if power == 1.0:
        return schedule.grid(n)
    u = 1.0 - jnp.arange(n) / n
    return schedule.at(jnp.maximum(u**power, n * u / 1000))


def level_to_time(
    schedule: Schedule, levels: int | Sequence[int] | Int[Array | np.ndarray, "..."]
) -> Shaped[Array, "..."]:
    """Native timesteps of noise levels 0 ... `NUM_LEVELS` - 1: DDPM's own indices, for EDM a Karras grid of 1,000.

    Published methods name timesteps such as t = 999 or 399 in this way, whatever the schedule (Yin et al. 2024,
    released code).
    """
    return schedule.grid(NUM_LEVELS)[::-1][jnp.asarray(levels)]


def ddim(
    denoise: Denoise, schedule: Schedule, noise: Data, timesteps: Timesteps,
    next_levels: Levels | None = None, eta: float = 0.0, step_noise: StepNoise | None = None,
) -> Data:  # fmt: skip
    """DDIM (Song et al. 2021, eq. 12) in len(timesteps) evaluations.

    next_levels = (alpha [n], sigma [n]) are the levels at the end of each step; the default is the next timestep and,
    for the last step, x0. eta in [0, 1] is the share of the noise that is replaced: step i adds step_noise(i). Raises
    ValueError for eta > 0 without step_noise.
    """
    alpha, sigma = schedule.alpha_sigma(timesteps)
    alpha_s, sigma_s = next_levels or (jnp.append(alpha[1:], 1.0), jnp.append(sigma[1:], 0.0))
    if eta and step_noise is None:
        raise ValueError(f"DDIM with eta = {eta} adds noise at every step: pass step_noise, or use eta = 0")
    ratio = alpha * sigma_s / (alpha_s * sigma)  # e^-h, finite where alpha_t = 0
    added = eta * sigma_s * jnp.sqrt(jnp.maximum(1.0 - ratio**2, 0.0))  # eq. 16
    kept = jnp.sqrt(sigma_s**2 - added**2) if eta else sigma_s

    def step(z, i):
        pred = denoise(z, timesteps[i])
        z_s = alpha_s[i] * pred.x0 + kept[i] * pred.eps
        return z_s + added[i] * step_noise(i) if eta else z_s, None

    return jax.lax.scan(step, scale_noise(sigma, noise), jnp.arange(len(timesteps)))[0]


def heun(denoise: Denoise, schedule: Schedule, noise: Data, timesteps: Timesteps) -> Data:
    """Heun's second-order method (Karras et al. 2022, algorithm 1 without churn) in 2 len(timesteps) - 1 evaluations.

    It integrates d(z/alpha) / d(sigma/alpha) = eps, so alpha must not be 0 at the first timestep.
    """
    alpha, sigma = schedule.alpha_sigma(timesteps)

    def step(z, i):
        pred = denoise(z, timesteps[i])
        z_s = alpha[i + 1] * pred.x0 + sigma[i + 1] * pred.eps
        span = sigma[i + 1] - alpha[i + 1] * sigma[i] / alpha[i]  # alpha_s d(sigma/alpha)
        return z_s + span * 0.5 * (denoise(z_s, timesteps[i + 1]).eps - pred.eps), None

    z, _ = jax.lax.scan(step, scale_noise(sigma, noise), jnp.arange(len(timesteps) - 1))
    return denoise(z, timesteps[-1]).x0


def dpm_solver_pp(denoise: Denoise, schedule: Schedule, noise: Data, timesteps: Timesteps) -> Data:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) in len(timesteps) evaluations.

    The first and the last step are of first order.
    """
    alpha, sigma = append_x0_level(schedule, timesteps)
    logsnr_half = jnp.log(alpha) - jnp.log(sigma)

    def step(carry, i):
        z, previous = carry
        x0 = denoise(z, timesteps[i]).x0
        h = logsnr_half[i + 1] - logsnr_half[i]
        h_previous = logsnr_half[i] - logsnr_half[i - 1]
        first_order = (i == 0) | (i == len(timesteps) - 1)
        slope = jnp.where(first_order, 0.0, 0.5 * h / h_previous)  # 1/(2r); 0 after a step from zero SNR
        d = x0 + slope * (x0 - previous)
        shrink = alpha[i] * sigma[i + 1] / (sigma[i] * alpha[i + 1])  # e^-h, finite where alpha_t = 0
        return (sigma[i + 1] / sigma[i] * z + alpha[i + 1] * (1.0 - shrink) * d, x0), None

    z = scale_noise(sigma, noise)
    return jax.lax.scan(step, (z, jnp.zeros_like(z)), jnp.arange(len(timesteps)))[0][0]


def lcm(
    denoise: Denoise, schedule: Schedule, noise: Data, timesteps: Timesteps,
    step_noise: StepNoise | None = None, scaling: float | None = 10.0,
) -> Data:  # fmt: skip
    """Multistep consistency sampling (Song et al. 2023, algorithm 1) in len(timesteps) evaluations.

    Each step predicts x0 and adds noise up to the next timestep: step i adds step_noise(i). scaling multiplies t in
    `boundary`; None leaves the boundary condition out. Raises ValueError for several steps without step_noise, and for
    a boundary condition on a schedule that has none.
    """
    if step_noise is None and len(timesteps) > 1:
        raise ValueError("lcm adds noise between its steps: pass step_noise, or sample in one step")
    if scaling is not None:
        check_boundary(schedule)
    alpha, sigma = append_x0_level(schedule, timesteps)

    def step(z, i):
        x0 = denoise(z, timesteps[i]).x0
        x0 = x0 if scaling is None else boundary(x0, z, timesteps[i], scaling)
        return alpha[i + 1] * x0 + (sigma[i + 1] * step_noise(i) if step_noise else 0.0), None

    return jax.lax.scan(step, scale_noise(sigma, noise), jnp.arange(len(timesteps)))[0]


def boundary(x0: Data, z: Data, t: Shaped[ArrayLike, "..."], scaling: float = 10.0) -> Data:
    """c_out x0 + c_skip z with sigma_data = 0.5 (Luo et al. 2023, eq. 9), which equals z at t = 0.

    t must broadcast over z.
    """
    t = scaling * t
    return t / jnp.sqrt(t**2 + 0.25) * x0 + 0.25 / (t**2 + 0.25) * z


def check_boundary(schedule: Schedule) -> None:
    """Raises ValueError unless the schedule is a `DDPM`: `boundary` is defined on its timesteps."""
    if not isinstance(schedule, DDPM):
        raise ValueError(
            f"the boundary condition of consistency models (LCM's c_skip, c_out) is defined on a DDPM schedule's "
            f"timesteps, and this is {type(schedule).__name__}: leave it out (method.boundary='none')"
        )


def append_x0_level(schedule: Schedule, timesteps: Timesteps) -> Levels:
    """alpha and sigma [n + 1]: those at the timesteps, then (1, 0) for x0, so that the last step returns x0 exactly."""
    alpha, sigma = schedule.alpha_sigma(timesteps)
    return jnp.append(alpha, 1.0), jnp.append(sigma, 0.0)


def scale_noise(sigma: Float[Array, " n"], noise: Data) -> Data:
    """Unit noise times the first timestep's sigma: 80 for EDM, 1 for variance-preserving schedules."""
    return jnp.maximum(sigma[0], 1.0) * noise


ODE_SAMPLERS = ("ddim", "heun", "dpm_solver_pp")  # deterministic: x0 is a function of the noise
OdeSampler = Literal[*ODE_SAMPLERS]
SAMPLERS = {"ddim": ddim, "heun": heun, "dpm_solver_pp": dpm_solver_pp, "lcm": lcm}


def sample(
    how: Sampling, denoise: Denoise, schedule: Schedule, noise: Data, n: int | None = None,
    step_noise: StepNoise | None = None,
) -> Data:  # fmt: skip
    """x0 in n steps, as diffusers' scheduler with the options `how` computes it; traceable with how and n static.

    noise [b, ...] is N(0, I). n is optional if `how` has a student's own timesteps. LCM and eta > 0 also need
    step_noise(i), unit noise for step i. Raises ValueError if that is missing, or for an n that the grid cannot have.
    """
    timesteps = how.times(schedule, n)
    options = {
        "ddim": {"next_levels": how.next_levels(schedule, n), "eta": how.eta, "step_noise": step_noise},
        "lcm": {"scaling": how.timestep_scaling, "step_noise": step_noise},
    }.get(how.sampler, {})
    if how.clip_sample_range is not None:
        denoise = clipped(denoise, how.clip_sample_range)
    start = noise if how.unit_noise else schedule.alpha_sigma(timesteps[0])[1] * noise
    return SAMPLERS[how.sampler](denoise, schedule, start, timesteps, **options)


def clipped(denoise: Denoise, limit: float) -> Denoise:
    """The same predictions with x0 clipped to [-limit, limit]; eps is not changed, as in diffusers."""

    def clip(z, t):
        pred = denoise(z, t)
        return pred._replace(x0=jnp.clip(pred.x0, -limit, limit))

    return clip

"""Schedules and ways of sampling from and to diffusers' scheduler_config.json.

Every class of scheduler has quirks of its own: defaults, the grid it makes of a number of steps, where its last step
ends. `read_sampling` turns them into values, so that `sampling.sample` computes what diffusers would.
"""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cddistill.diffusion import DDPM

PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
COMMON = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000,
          "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None,
          "timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": True,
          "clip_sample_range": 1.0, "solver_order": 2, "original_inference_steps": 50, "timestep_scaling": 10.0,
          "_timesteps": None}  # fmt: skip
LINSPACE, SD_BETAS = {"timestep_spacing": "linspace"}, {"beta_start": 0.00085, "beta_end": 0.012}
DEFAULTS = {  # what a class assumes where its file is silent, if not the above; also all that `read_sampling` supports
    "DDIMScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False, "clip_sample": False},
    "EulerDiscreteScheduler": LINSPACE,
    "EulerAncestralDiscreteScheduler": LINSPACE,
    "HeunDiscreteScheduler": LINSPACE | SD_BETAS | {"clip_sample": False},
    "DPMSolverMultistepScheduler": LINSPACE,
    "LCMScheduler": SD_BETAS | {"beta_schedule": "scaled_linear", "clip_sample": False},
}
DIVIDE_BY_ALPHA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")
OFF = (False, None)
SIGMAS = {"use_karras_sigmas": OFF, "use_exponential_sigmas": OFF, "use_beta_sigmas": OFF}
SUPPORTED = {  # the values that `read_sampling` takes for the options that `Sampling` cannot tell apart
    "DDIMScheduler": {"thresholding": OFF},
    "PNDMScheduler": {},
    "EulerDiscreteScheduler": SIGMAS | {
        "interpolation_type": ("linear",), "timestep_type": ("discrete",), "final_sigmas_type": ("zero",),
    },
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": SIGMAS | {"clip_sample": OFF, "rescale_betas_zero_snr": OFF},
    "DPMSolverMultistepScheduler": SIGMAS | {
        "algorithm_type": ("dpmsolver++",), "solver_order": (1, 2), "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",), "lambda_min_clipped": (-np.inf,), "use_lu_lambdas": OFF, "use_flow_sigmas": OFF,
        "thresholding": OFF,
    },
    "LCMScheduler": {"thresholding": OFF},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a scheduler samples a DDPM schedule, in values; the defaults are those of our students.

    Names are diffusers' where it has one. Unlike diffusers, a student's own times can be part of it.
    """

    sampler: str = "ddim"  # of sampling.SAMPLERS
    spacing: str = "trailing"  # or "leading", "linspace", "lcm" (LCMScheduler's own)
    steps_offset: int = 0  # added to leading times
    skip_last: bool = False  # leave out the last of n + 1 leading or linspace times (DPM-Solver++)
    fractional: bool = False  # linspace times are not rounded (Euler, Heun)
    timesteps: tuple[int, ...] | None = None  # a student's own times, used where their number is asked for
    stride: bool = False  # every step lands T // n earlier, whether or not that is the next time (DDIM)
    set_alpha_to_one: bool = True  # the last step lands at x0; False: at the noise level of time 0
    unit_noise: bool = True  # False: the first z is sigma_T eps (Euler and Heun, unless leading)
    clip_sample_range: float | None = None  # x0 is clipped to +- this
    eta: float = 0.0  # share of the noise that DDIM draws anew, in [0, 1]
    original_inference_steps: int = 50  # of LCM's training grid
    timestep_scaling: float = 10.0  # in LCM's boundary condition
    guidance: float = 1.0  # classifier-free, that a student needs; in no scheduler's file

    def times(self, schedule: DDPM, n: int | None = None) -> jax.Array:
        """Native times of n steps, from most to least noisy: int32 [n], or float32 where they are fractional.

        A student's own times serve n = their number and n = None. Raises ValueError for an n the grid cannot have.
        """
        if n is None and self.timesteps is None:
            raise ValueError("this scheduler has no times of its own: say how many steps")
        if not isinstance(schedule, DDPM):  # EDM's networks come without a file that says how
            return schedule.grid(n)
        if self.timesteps is not None and n in (None, len(self.timesteps)):
            times = np.array(self.timesteps)
        else:
            times = self.grid(schedule.num_timesteps, n)
        if times.min() < 0 or times.max() >= schedule.num_timesteps:
            raise ValueError(f"times {times.min():g} to {times.max():g} lie outside [0, {schedule.num_timesteps - 1}]")
        return jnp.asarray(times, jnp.float32 if (times % 1).any() else jnp.int32)

    def grid(self, total: int, n: int) -> np.ndarray:
        """n times of a schedule of `total` by the spacing, in diffusers' arithmetic to the bit."""
        most = self.original_inference_steps if self.spacing == "lcm" else total - self.skip_last
        if not 1 <= n <= most:
            raise ValueError(f"{n} steps do not fit this scheduler: 1 to {most} do")
        if self.spacing == "trailing":
            return np.round(np.arange(total, 0, -total / n))[:n] - 1  # arange may give one too many
        if self.spacing == "lcm":
            stride = total // most
            return (most - np.floor(np.linspace(0, most, n, endpoint=False))) * stride - 1
        m = n + self.skip_last
        times = np.arange(m) * (total // m) + self.steps_offset
        if self.spacing == "linspace":
            times = np.linspace(0, total - 1, m)
        return (times if self.fractional else np.round(times))[::-1][:n]

    def lands(self, schedule: DDPM, n: int | None = None) -> tuple[jax.Array, jax.Array]:
        """(alpha [n], sigma [n]) at the end of each step: `sampling.ddim`'s lands."""
        times = self.times(schedule, n)
        ends = jnp.append(times[1:], -1)
        if self.stride and self.timesteps is None:
            ends = times - schedule.num_timesteps // len(times)
        alpha, sigma = schedule.alpha_sigma(jnp.maximum(ends, 0))
        if self.set_alpha_to_one:
            return jnp.where(ends < 0, 1.0, alpha), jnp.where(ends < 0, 0.0, sigma)
        return alpha, sigma


def read_scheduler(path: Path) -> tuple[DDPM, str]:
    """(schedule, what the network predicts) of a scheduler_config.json; defaults are those of the class it names.

    rescale_betas_zero_snr makes the last alpha 0 or, in classes that divide by it, 2^-12 as diffusers does. A missing
    file means Stable Diffusion 1.x. Raises ValueError naming the key for anything unsupported.
    """
    if not path.is_file():
        return DDPM(), "eps"
    name, config = read_config(path)
    check(path, config, {"prediction_type": tuple(PREDICTS)})
    total, betas = config["num_train_timesteps"], config["trained_betas"]
    if betas is None:
        check(path, config, {"beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2")})
    elif not isinstance(betas, list) or len(betas) != total:
        raise ValueError(f"{path}: trained_betas = {str(betas):.40} is not supported, only a list of {total} numbers")
    zero_snr, predicts = bool(config["rescale_betas_zero_snr"]), PREDICTS[config["prediction_type"]]
    if zero_snr and predicts == "eps":
        raise ValueError(
            f"{path}: with rescale_betas_zero_snr the first z is nothing but noise, and a network of prediction_type "
            "epsilon cannot tell x0 from it; only v_prediction and sample can"
        )
    schedule = DDPM(
        num_timesteps=total,
        beta_schedule=config["beta_schedule"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        zero_snr=zero_snr,
        trained_betas=tuple(betas) if betas is not None else None,
        last_alpha=2.0**-12 if zero_snr and name in DIVIDE_BY_ALPHA else 0.0,
    )
    return schedule, predicts


def read_sampling(path: Path) -> Sampling:
    """How the scheduler of a scheduler_config.json samples, for `sampling.sample`; a missing file means Sampling().

    PNDM, which Stable Diffusion 1.x ships, is replaced by DDIM on its grid, with a warning. Raises ValueError naming
    the class or key for anything unsupported.
    """
    if not path.is_file():
        return Sampling()
    name, config = read_config(path)
    if name not in DEFAULTS:
        raise ValueError(f"{path}: _class_name {name!r} cannot sample here, only {', '.join(DEFAULTS)} can")
    check(path, config, SUPPORTED[name] | {"timestep_spacing": ("leading", "linspace", "trailing")})
    if name == "PNDMScheduler":
        logging.warning("%s: PNDM is not supported, sampling by DDIM on its times", path)
    spacing, own = config["timestep_spacing"], config["_timesteps"]
    clip = {"clip_sample_range": config["clip_sample_range"] if config["clip_sample"] else None}
    ddim = clip | {"stride": True, "set_alpha_to_one": config["set_alpha_to_one"]}
    euler = {"fractional": True, "unit_noise": spacing == "leading"}
    settings = {
        "DDIMScheduler": ddim,
        "PNDMScheduler": ddim,
        "EulerDiscreteScheduler": euler,
        "EulerAncestralDiscreteScheduler": euler | {"eta": 1.0},
        "HeunDiscreteScheduler": euler | {"sampler": "heun"},
        "DPMSolverMultistepScheduler": {
            "sampler": "ddim" if config["solver_order"] == 1 else "dpm_solver_pp",
            "skip_last": spacing != "trailing",
        },
        "LCMScheduler": clip | {"sampler": "lcm", "spacing": "lcm"} | {
            key: config[key] for key in ("original_inference_steps", "timestep_scaling")
        },
    }[name]  # fmt: skip
    own = own and falling(own, config["num_train_timesteps"], f"{path}: ")
    common = {"spacing": spacing, "steps_offset": config["steps_offset"], "timesteps": own}
    return Sampling(**(common | settings))


def read_config(path: Path) -> tuple[str, dict]:
    """The class a scheduler_config.json names and its options, the silent ones filled in."""
    config = read_json(path)
    name = config.get("_class_name", "DDIMScheduler").removeprefix("Flax")
    return name, COMMON | DEFAULTS.get(name, {}) | config


def check(path: Path, config: dict, supported: dict) -> None:
    """Raise ValueError for an option whose value is not one of those supported."""
    for key, values in supported.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{path}: {key} = {config[key]!r} is not supported, only {', '.join(map(str, values))}")


def falling(timesteps, total: int, where: str = "") -> tuple[int, ...]:
    """A student's own times, once they are known to be times."""
    own = [t for t in timesteps if isinstance(t, int) and 0 <= t < total] if isinstance(timesteps, list) else []
    if not own or own != timesteps or own != sorted({*own}, reverse=True):
        raise ValueError(f"{where}timesteps {timesteps} are not whole numbers falling from at most {total - 1} to 0")
    return tuple(own)


def write_scheduler(folder: Path, schedule, predicts: str, timesteps=None, sampler: str = "ddim") -> None:
    """scheduler/scheduler_config.json of a DDPM schedule, with the spacing that students are trained on.

    timesteps are a student's own, strictly decreasing: the class is then LCM's for sampler "lcm", and DPM-Solver++ of
    first order, which is DDIM and takes any times, for "ddim". They are kept as "_timesteps"; in PyTorch,
    pipe(..., timesteps=pipe.scheduler.config["_timesteps"]) samples as `sampler` does here. Raises
    ValueError for other schedules, which diffusers folders cannot hold, or times.
    """
    if not isinstance(schedule, DDPM):
        raise ValueError(f"diffusers folders hold DDPM schedules, not {type(schedule).__name__}")
    fields = {k: v for k, v in dataclasses.asdict(schedule).items() if v is not None}
    del fields["last_alpha"]  # follows from the class
    scheduler = {"_class_name": "DDIMScheduler", "set_alpha_to_one": True, "clip_sample": False}
    if timesteps is not None:
        own = {"_timesteps": falling(np.asarray(timesteps).tolist(), schedule.num_timesteps)}
        scheduler = (
            own
            | {
                "ddim": {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1},
                "lcm": {"_class_name": "LCMScheduler", "set_alpha_to_one": True, "clip_sample": False},
            }[sampler]
        )
    config = scheduler | {
        "num_train_timesteps": fields.pop("num_timesteps"),
        "rescale_betas_zero_snr": fields.pop("zero_snr"),
        "timestep_spacing": "trailing",
        "prediction_type": {ours: theirs for theirs, ours in PREDICTS.items()}[predicts],
        **fields,
    }
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict:
    """What a JSON file says, which must be an object."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected a diffusers folder")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # also for bytes that are no text
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object {{...}}: download it again")
    return content

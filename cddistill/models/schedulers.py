"""Noise schedules and sampler settings, read from and written to diffusers' scheduler_config.json.

The scheduler classes differ in their defaults, in the timesteps for a number of steps and in the end of the last step.
`read_sampling` turns these differences into values, so that `sampling.sample` reproduces diffusers.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import io
from cddistill.diffusion import DDPM, Schedule
from cddistill.models.configured import fault, said
from cddistill.models.index import FILE as INDEX
from cddistill.models.index import parts_of, read_index
from cddistill.typed import Natural, Positive, brief, within

PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
COMMON = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000,
          "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None,
          "timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": True,
          "clip_sample_range": 1.0, "solver_order": 2, "original_inference_steps": 50, "timestep_scaling": 10.0,
          "_timesteps": None}  # fmt: skip
LINSPACE, SD_BETAS = {"timestep_spacing": "linspace"}, {"beta_start": 0.00085, "beta_end": 0.012}
LCM = SD_BETAS | {"beta_schedule": "scaled_linear", "clip_sample": False}
DEFAULTS = {  # every class of diffusers for a DDPM process, with its defaults that differ from COMMON
    "DDIMScheduler": {},
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False, "clip_sample": False},
    "EulerDiscreteScheduler": LINSPACE,
    "EulerAncestralDiscreteScheduler": LINSPACE,
    "LMSDiscreteScheduler": LINSPACE,
    "HeunDiscreteScheduler": LINSPACE | SD_BETAS | {"clip_sample": False},
    "KDPM2DiscreteScheduler": LINSPACE | SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": LINSPACE | SD_BETAS,
    "DPMSolverSDEScheduler": LINSPACE | SD_BETAS,
    "DPMSolverMultistepScheduler": LINSPACE,
    "DPMSolverMultistepInverseScheduler": LINSPACE,
    "DPMSolverSinglestepScheduler": {},  # has no timestep_spacing
    "DEISMultistepScheduler": LINSPACE,
    "UniPCMultistepScheduler": LINSPACE,
    "SASolverScheduler": LINSPACE,
    "LCMScheduler": LCM,
    "TCDScheduler": LCM,
}
DIVIDE_BY_ALPHA = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
RESCALING = DIVIDE_BY_ALPHA + (  # the classes that know rescale_betas_zero_snr; the others ignore it
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "LCMScheduler", "TCDScheduler",
)  # fmt: skip
SPACINGS = ("leading", "linspace", "trailing")  # diffusers' options; LCMScheduler has its own
OFF = (False, None)
PROCESS = {  # options that change the noise process or the network's output: their supported values
    "prediction_type": tuple(PREDICTS), "timestep_type": ("discrete",), "use_flow_sigmas": OFF,
    "use_dynamic_shifting": OFF, "predict_epsilon": (True,), "timestep_values": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}  # fmt: skip
HARMLESS = {  # options of samplers, and of old versions, that leave the process as it is
    "algorithm_type", "corrector_order", "disable_corrector", "dtype", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "noise_sampler_seed", "predict_x0", "predictor_order", "sample_max_value", "shift_terminal", "sigma_max",
    "sigma_min", "skip_prk_steps", "solver_p", "solver_type", "tau_func", "tensor_format", "thresholding",
    "time_shift_type", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
Beta = Annotated[float, within(above=0, below=1)]
TimestepsCount = Annotated[int, within(least=1, most=100_000)]
TYPES = {
    "num_train_timesteps": TimestepsCount, "beta_start": Beta, "beta_end": Beta, "rescale_betas_zero_snr": bool | None,
    "steps_offset": Natural, "set_alpha_to_one": bool | None, "clip_sample": bool | None, "clip_sample_range": Positive,
    "solver_order": Annotated[int, within(least=1, most=3)], "original_inference_steps": TimestepsCount,
    "timestep_scaling": Positive, "trained_betas": tuple[Annotated[float, within(least=0, most=1)], ...] | None,
}  # fmt: skip
SIGMAS = {"use_karras_sigmas": OFF, "use_exponential_sigmas": OFF, "use_beta_sigmas": OFF}
SUPPORTED = {  # classes that can be sampled with: the only supported values of options that `Sampling` has no field for
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
    """How a scheduler samples a DDPM schedule; the defaults are those of our students.

    Field names are diffusers' where it has one. Unlike diffusers, a student's own timesteps can be included.
    """

    sampler: str = "ddim"  # of sampling.SAMPLERS
    spacing: str = "trailing"  # or "leading", "linspace", "lcm" (LCMScheduler's own)
    steps_offset: int = 0  # added to leading timesteps
    skip_last: bool = False  # drop the last of n + 1 leading or linspace timesteps (DPM-Solver++)
    fractional: bool = False  # do not round linspace timesteps (Euler, Heun)
    timesteps: tuple[int, ...] | None = None  # a student's own, used for n = their number or None
    stride: bool = False  # each step ends T // n earlier, even if that is not the next timestep (DDIM)
    set_alpha_to_one: bool = True  # the last step ends at x0; False: at the noise level of timestep 0
    unit_noise: bool = True  # False: the first z is sigma_T eps (Euler and Heun, unless leading)
    clip_sample_range: float | None = None  # x0 is clipped to [-r, r]
    eta: float = 0.0  # fraction of the noise that DDIM replaces by new noise, in [0, 1]
    original_inference_steps: int = 50  # of LCM's training grid
    timestep_scaling: float = 10.0  # in LCM's boundary condition
    guidance: float = 1.0  # guidance scale that a student needs; not in a scheduler's file

    def times(self, schedule: Schedule, n: int | None = None) -> jax.Array:
        """Timesteps of n steps, decreasing: int32 [n], or float32 [n] if fractional.

        A student's own timesteps are used for n = their number and for None. Raises ValueError for an impossible n.
        """
        if n is None and self.timesteps is None:
            raise ValueError("this scheduler has no timesteps of its own: pass the number of steps")
        if not isinstance(schedule, DDPM):  # EDM's networks have no scheduler file
            return schedule.grid(n)
        if self.timesteps is not None and n in (None, len(self.timesteps)):
            times = np.array(self.timesteps)
        else:
            times = self.grid(schedule.num_timesteps, n)
        if times.min() < 0 or times.max() >= schedule.num_timesteps:
            first, last, total = times.min(), times.max(), schedule.num_timesteps
            raise ValueError(f"timesteps {first:g} to {last:g} lie outside [0, {total - 1}]")
        return jnp.asarray(times, jnp.float32 if (times % 1).any() else jnp.int32)

    def grid(self, total: int, n: int) -> np.ndarray:
        """n of `total` timesteps by the spacing, decreasing, bit for bit as in diffusers."""
        of_training = self.spacing not in SPACINGS  # LCM's steps are some of those of its training grid
        most = self.original_inference_steps if of_training else total - self.skip_last
        if not 1 <= n <= most:
            raise ValueError(f"this scheduler cannot sample in {n} steps, only in 1 to {most}")
        if self.spacing == "trailing":
            return np.round(np.arange(total, 0, -total / n))[:n] - 1  # arange may return one too many
        if of_training:
            stride = total // most
            return (most - np.floor(np.linspace(0, most, n, endpoint=False))) * stride - 1
        m = n + self.skip_last
        times = np.arange(m) * (total // m) + self.steps_offset
        if self.spacing == "linspace":
            times = np.linspace(0, total - 1, m)
        return (times if self.fractional else np.round(times))[::-1][:n]

    def next_levels(self, schedule: Schedule, n: int | None = None) -> tuple[jax.Array, jax.Array]:
        """(alpha [n], sigma [n]) at the end of each step, for `sampling.ddim`."""
        times = self.times(schedule, n)
        ends = jnp.append(times[1:], -1)
        if self.stride and self.timesteps is None:
            ends = times - schedule.num_timesteps // len(times)
        alpha, sigma = schedule.alpha_sigma(jnp.maximum(ends, 0))
        if self.set_alpha_to_one:
            return jnp.where(ends < 0, 1.0, alpha), jnp.where(ends < 0, 0.0, sigma)
        return alpha, sigma


def scheduler_file(root: Path) -> Path:
    """The scheduler_config.json of a pipeline's folder, in scheduler/ or at the top; it may be missing.

    Raises ValueError if it is and model_index.json names a scheduler.
    """
    name = "scheduler_config.json"
    nested = root / "scheduler" / name
    if "scheduler" in parts_of(read_index(root)) and not (nested.is_file() or (root / name).is_file()):
        raise ValueError(f"{nested} is missing, but {INDEX} names a scheduler: download it too")
    return root / name if (root / name).is_file() and not nested.is_file() else nested


def read_scheduler(path: Path) -> tuple[DDPM, str]:
    """(schedule, prediction type "eps", "v" or "x0") of a scheduler_config.json, with the defaults of its class.

    rescale_betas_zero_snr sets the last alpha to 0 or, for classes that divide by it, to 2^-12 as in diffusers. A
    missing file means Stable Diffusion 1.x, with a warning. Raises ValueError naming the class or key for anything that
    is unsupported or unknown.
    """
    if not path.is_file():
        logging.warning("%s is missing: Stable Diffusion 1.x's schedule and prediction of the noise are assumed", path)
        return DDPM(), "eps"
    name, config = read_config(path)
    total, betas = config["num_train_timesteps"], config["trained_betas"]
    if betas is None:
        check(path, config, {"beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2")})
    elif len(betas) != total:
        raise ValueError(f"{path}: trained_betas has {len(betas)} numbers, but num_train_timesteps = {total}")
    zero_snr, predicts = bool(config["rescale_betas_zero_snr"]), PREDICTS[config["prediction_type"]]
    if zero_snr and name not in RESCALING:
        raise ValueError(
            f"{path}: rescale_betas_zero_snr = True is not supported for {name}, which ignores it; set it to false or, "
            "for a network that was trained with it, change _class_name to DDIMScheduler"
        )
    if zero_snr and predicts == "eps":
        raise ValueError(
            f"{path}: with rescale_betas_zero_snr the first z_t is pure noise, from which prediction_type "
            "epsilon cannot recover x0; use v_prediction or sample"
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
    """The sampler settings of a scheduler_config.json, for `sampling.sample`; a missing file means Sampling().

    PNDM, Stable Diffusion 1.x's default, is replaced by DDIM at its timesteps, with a warning. Raises ValueError naming
    the class or key for anything unsupported.
    """
    if not path.is_file():
        return Sampling()
    name, config = read_config(path)
    if name not in SUPPORTED:
        raise ValueError(
            f"{path}: _class_name {name!r} is not supported, only {', '.join(SUPPORTED)} are, for sampling: change it"
        )
    check(path, config, SUPPORTED[name] | {"timestep_spacing": SPACINGS})
    if name == "PNDMScheduler":
        logging.warning("%s: PNDM is not supported, sampling with DDIM at its timesteps", path)
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
    own = None if own is None else check_timesteps(own, config["num_train_timesteps"], f"{path}: ")
    common = {"spacing": spacing, "steps_offset": config["steps_offset"], "timesteps": own}
    return Sampling(**(common | settings))


def read_config(path: Path) -> tuple[str, dict]:
    """(class name, options) of a scheduler_config.json of a DDPM process, with the defaults of that class filled in.

    Raises ValueError naming the class or key for another process, for an option that is unknown or of the wrong type.
    """
    config = io.read_json(path)
    name = read_class(path, config)
    replaced = config.get("_use_default_values")  # values of another class, which diffusers drops
    replaced = replaced if isinstance(replaced, list) else []
    config = {key: value for key, value in config.items() if key not in replaced}
    known = {*COMMON, *PROCESS, *HARMLESS}
    if unknown := sorted(key for key in config if key not in known and not key.startswith("_")):
        found = ", ".join(said(key, config[key]) for key in unknown[:5])
        raise ValueError(f"{path}: {found} is not supported: remove it if it has no effect on {name}")
    config = COMMON | DEFAULTS[name] | config
    check(path, config, PROCESS)
    for key, kind in TYPES.items():
        if why := fault(config[key], kind):
            raise ValueError(f"{path}: {key} = {brief(config[key])} {why}")
    total = config["num_train_timesteps"]
    if config["steps_offset"] >= total:
        raise ValueError(f"{path}: steps_offset = {config['steps_offset']} must be below num_train_timesteps = {total}")
    return name, config


def read_class(path: Path, config: dict) -> str:
    """The class of a scheduler: of model_index.json, which diffusers follows, else of the file itself.

    Raises ValueError if neither names one, or either one of another process than DDPM's.
    """
    root = path.parent.parent if path.parent.name == "scheduler" else path.parent
    _, pipelines = parts_of(read_index(root)).get("scheduler", ("", None))
    own = config.get("_class_name")
    own = own.removeprefix("Flax") if isinstance(own, str) else own
    if own is None and pipelines is None:
        raise ValueError(f'{path} does not name its class: add "_class_name", such as "DDIMScheduler"')
    for file, name in ((root / INDEX, pipelines), (path, own)):
        if name is not None and name not in [*DEFAULTS]:  # perhaps a list
            raise ValueError(
                f"{file}: the scheduler's _class_name {brief(name)} is not supported, as only DDPM's noise process is, "
                f"with the classes {', '.join(DEFAULTS)}; EDM's, flow matching's and consistency models' are not"
            )
    if own and pipelines and own != pipelines:
        logging.warning("%s says %s, but %s says %s, which is used, as in diffusers", path, own, INDEX, pipelines)
    return pipelines or own


def check(path: Path, config: dict, supported: dict) -> None:
    """Raise ValueError for an option with an unsupported value."""
    for key, values in supported.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{path}: {said(key, config[key])} is not supported, only {', '.join(map(str, values))}")


def check_timesteps(timesteps, total: int, where: str = "") -> tuple[int, ...]:
    """A student's timesteps as a tuple; ValueError unless they are strictly decreasing integers in [0, total - 1]."""
    own = [t for t in timesteps if isinstance(t, int) and 0 <= t < total] if isinstance(timesteps, list) else []
    if not own or own != timesteps or own != sorted({*own}, reverse=True):
        raise ValueError(f"{where}timesteps {timesteps!s:.80} are not strictly decreasing integers in [0, {total - 1}]")
    return tuple(own)


def write_scheduler(folder: Path, schedule, predicts: str, timesteps=None, sampler: str = "ddim") -> None:
    """Write folder/scheduler/scheduler_config.json for a DDPM schedule, with the timestep spacing of our students.

    timesteps are a student's own, strictly decreasing. The class is then LCMScheduler for sampler "lcm" and first-order
    DPM-Solver++, which is DDIM and takes any timesteps, for "ddim". They are stored as "_timesteps"; in PyTorch,
    pipe(..., timesteps=pipe.scheduler.config["_timesteps"]) samples as `sampler` does here. Raises ValueError for other
    schedules, which diffusers folders cannot hold, and for other timesteps.
    """
    if not isinstance(schedule, DDPM):
        raise ValueError(f"diffusers folders hold DDPM schedules, not {type(schedule).__name__}")
    fields = {k: v for k, v in dataclasses.asdict(schedule).items() if v is not None}
    del fields["last_alpha"]  # follows from the class
    scheduler = {"_class_name": "DDIMScheduler", "set_alpha_to_one": True, "clip_sample": False}
    if timesteps is not None:
        own = {"_timesteps": check_timesteps(np.asarray(timesteps).tolist(), schedule.num_timesteps)}
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
    io.write_json(Path(folder) / "scheduler" / "scheduler_config.json", dict(sorted(config.items())))

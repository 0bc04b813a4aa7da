"""No training: a few-step student made elsewhere, drawn as the scheduler in its folder says (LCM, Turbo, DMD2 ...).

python -m cddistill.main --mode=evaluate --config=configs/pretrained.py --config.teacher=FOLDER
"""

import dataclasses
import functools

import jax.numpy as jnp

from cddistill import models, sampling
from cddistill.method import check_choices, fresh
from cddistill.models import adapter
from cddistill.models.blocks import sinusoid
from cddistill.models.schedulers import Sampling, read_sampling
from cddistill.net import Adapted

ODE_SAMPLERS = ("ddim", "heun", "dpm_solver_pp")  # whose x0 is a function of the noise


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """How a network that is not trained here is sampled."""

    scheduler: str = ""  # pipeline folder or Hub id whose scheduler/ says how; "" = sampler on the teacher's own grid
    sampler: str = "ddim"  # or "heun", "dpm_solver_pp": where there is no scheduler
    timesteps: tuple[int, ...] = ()  # in its place where as many steps are asked for: (399,) for DMD2's SDXL in one
    guidance: float = 1.0  # classifier-free; 1 = none
    told_guidance: float = 8.0  # the guidance that networks with an input for it, such as LCM's, are told

    def __post_init__(self):
        check_choices(self, {"sampler": ODE_SAMPLERS})

    def init(self, key, frozen, batch):
        return {}

    def turns(self):
        return {}

    def ema(self):
        return {}

    def sample(self, n, noise, batch, key, steps):
        schedule, told = n.teacher.schedule, {}
        if width := getattr(n.teacher.module, "time_cond_proj_dim", None):
            told = {"timestep_cond": guidance_embedding(self.told_guidance, width, len(noise))}
        text, null = batch["text"] | told, batch["null"] | told
        denoise = sampling.guided(conditioned(n, noise, batch), text, null, self.guidance)
        anew = fresh(key, batch["index"], noise.shape[1:])
        return sampling.sample(self.sampling(schedule, steps), denoise, schedule, noise, steps, anew)

    def sampling(self, schedule, steps):
        how = scheduler_of(self.scheduler) if self.scheduler else Sampling(sampler=self.sampler)
        own = self.timesteps if len(self.timesteps) == steps else how.timesteps
        return dataclasses.replace(how, timesteps=own, guidance=self.guidance)

    def nfe(self, steps):
        calls = 2 * steps - 1 if self.sampling(None, steps).sampler == "heun" else steps
        return calls if self.guidance == 1.0 else 2 * calls


@functools.cache
def scheduler_of(folder: str) -> Sampling:
    """How a pipeline's scheduler samples; looked up once, which for a Hub id asks the network."""
    return read_sampling(models.resolve(folder) / "scheduler" / "scheduler_config.json")


def conditioned(n, noise, batch):
    """The network with the batch's condition, if it has a ControlNet or input channels for one."""
    controlnet = getattr(n, "controlnet", None)
    if controlnet is None and not adapter.concats(n.teacher, noise.shape[-1]):
        return n.teacher
    student = Adapted(n.teacher, controlnet)
    return lambda z, t, text: student(z, t, text, batch["cond"])


def guidance_embedding(scale: float, width: int, n: int):
    """The input by which an LCM is told its guidance (Luo et al. 2023, sec. 4.2): sinusoids of 1000 (w - 1)."""
    return sinusoid(jnp.full(n, 1000.0 * (scale - 1.0)), width, False, 1)

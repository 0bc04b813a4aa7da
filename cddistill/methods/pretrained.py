"""No training: a published few-step student (LCM, Turbo, DMD2 ...), sampled with the scheduler of its folder.

python -m cddistill.main --mode=evaluate --config=configs/pretrained.py --config.teacher=FOLDER
"""

import dataclasses
import functools
from typing import Annotated

import jax.numpy as jnp

from cddistill import sampling
from cddistill.method import Generator, Requires
from cddistill.models import adapter
from cddistill.models.guidance import with_scales
from cddistill.models.schedulers import Sampling
from cddistill.net import Adapted
from cddistill.pipeline import Pipeline
from cddistill.typed import FALLING, Natural, NonNegative


@dataclasses.dataclass(frozen=True)
class Pretrained(Generator):
    """How a network that is not trained here is sampled."""

    scheduler: str = ""  # pipeline folder or Hub id with a scheduler/; "" = `sampler` on the teacher's own grid
    sampler: sampling.OdeSampler = "ddim"  # or "heun", "dpm_solver_pp"; used without a scheduler
    timesteps: Annotated[tuple[Natural, ...], FALLING] = ()  # replace the scheduler's when sampling in that many
    # steps: (399,) for DMD2's SDXL
    guidance: NonNegative = 1.0  # classifier-free guidance scale; 1 = none
    image_guidance: NonNegative = 1.0  # guidance scale of the conditioning image; 1 = none (InstructPix2Pix: 1.5)
    embedded_guidance: NonNegative = 8.0  # guidance scale passed to networks that embed it, such as LCM's

    def init(self, key, frozen, batch):
        return {}

    def turns(self):
        return {}

    def requires(self):
        return Requires(images=False)

    def exports(self):
        return {}

    def sample(self, n, noise, batch, step_noise, steps):
        schedule = n.teacher.schedule
        embedded = jnp.full(len(noise), self.embedded_guidance)
        text, null = (with_scales(n.teacher, batch[name], embedded) for name in ("text", "null"))
        scales = (self.guidance, self.image_guidance)
        denoise = sampling.guided(conditioned(n, noise, batch), text, null, *scales, self.blind(n, noise, batch))
        return sampling.sample(self.sampling(schedule, steps), denoise, schedule, noise, steps, step_noise)

    def blind(self, n, noise, batch):
        """The network without its condition, for image_guidance. ValueError if it takes none."""
        if self.image_guidance == 1.0:
            return None
        denoise = conditioned(n, noise, adapter.without_condition(batch))
        if denoise is n.teacher:
            raise ValueError("method.image_guidance is for networks that take a conditioning image: set it to 1")
        return denoise

    def sampling(self, schedule, steps):
        how = scheduler_of(self.scheduler) if self.scheduler else Sampling(sampler=self.sampler)
        own = self.timesteps if len(self.timesteps) == steps else how.timesteps
        return dataclasses.replace(how, timesteps=own, guidance=self.guidance)

    def nfe(self, steps):
        calls = 2 * steps - 1 if self.sampling(None, steps).sampler == "heun" else steps
        return calls * sampling.evaluations(self.guidance, self.image_guidance)


@functools.cache
def scheduler_of(folder: str) -> Sampling:
    """The options of a pipeline's scheduler; cached, because a Hub id needs network access."""
    return Pipeline(folder).sampling()


def conditioned(n, noise, batch):
    """The network with the batch's condition, if it has a ControlNet or input channels for it."""
    controlnet = getattr(n, "controlnet", None)
    kind = adapter.kind_of(n.teacher, controlnet, noise.shape[-1])
    if kind == "none":
        return n.teacher
    student, cond = Adapted(n.teacher, controlnet), adapter.condition(kind, batch)
    return lambda z, t, text: student(z, t, text, cond)

"""Plain diffusion training: how teachers and fine-tuned baselines are made (Ho et al. 2020, arXiv:2006.11239).

    t ~ U,  eps ~ N(0, I),  z_t = alpha_t x0 + sigma_t eps
    loss = || out(z_t, t, text, cond) - target(x0, eps) ||^2      in the network's own parameterisation

Without a condition it trains the backbone alone; with one (`data.task`), backbone and branch together.
"""

import dataclasses

import jax

from cddistill import sampling
from cddistill.method import Turn, check_choices, drop_text, normal, uniform
from cddistill.models import adapter
from cddistill.models.schedulers import Sampling


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Hyper-parameters of plain diffusion training; the defaults are ours."""

    text_dropout: float = 0.1  # share of samples that see the null text, for classifier-free guidance
    ema_decay: float = 0.999  # per step
    adapter: str = "none"  # how a condition enters: "none", "controlnet", "mu_blend" or "concat"
    freeze_backbone: bool = False  # train the branch alone, as ControlNet does
    sampler: str = "ddim"  # or "heun", "dpm_solver_pp"
    guidance: float = 1.0  # classifier-free guidance when sampling; 1 = none
    grid_power: float = 1.0  # of the sampling times, see `sampling.times`

    def __post_init__(self):
        check_choices(self, {"adapter": ("none", *adapter.ADAPTERS), "sampler": ("ddim", "heun", "dpm_solver_pp")})

    def init(self, key, frozen, batch):
        """The teacher itself, and a fresh branch if there is a condition."""
        return adapter.student_nets(frozen, key, self.adapter, batch, self.freeze_backbone)

    def turns(self):
        return {"student": Turn(moves=adapter.moves(self.adapter, self.freeze_backbone), loss=self.loss)}

    def ema(self):
        return dict.fromkeys(self.turns()["student"].moves, self.ema_decay)

    def loss(self, n, batch, key):
        k_t, k_eps, k_drop = jax.random.split(key, 3)
        x0, index = batch["x0"], batch["index"]
        t = n.teacher.schedule.at(uniform(k_t, index))
        eps = normal(k_eps, index, x0.shape[1:])
        text = drop_text(k_drop, batch, self.text_dropout)
        z_t = n.teacher.noise(x0, eps, t)
        if self.adapter == "none":
            return n.backbone.dsm_loss(z_t, t, x0, eps, text), {}
        return adapter.student(n, self.freeze_backbone).dsm_loss(z_t, t, x0, eps, text, batch["cond"]), {}

    def sample(self, n, noise, batch, key, steps):
        schedule, student = n.teacher.schedule, adapter.student(n, self.freeze_backbone, average=True)
        denoise = student.backbone
        if self.adapter != "none":
            denoise = lambda z, t, text: student(z, t, text, batch["cond"])
        denoise = sampling.guided(denoise, batch["text"], batch["null"], self.guidance)
        return sampling.SAMPLERS[self.sampler](
            denoise, schedule, noise, sampling.times(schedule, steps, self.grid_power)
        )

    def sampling(self, schedule, steps):
        if self.sampler != "ddim":
            return None
        times = tuple(map(int, sampling.times(schedule, steps, self.grid_power)))
        return Sampling(timesteps=times, guidance=self.guidance)

    def nfe(self, steps):
        per_step = 1 if self.guidance == 1.0 else 2
        return per_step * (2 * steps - 1 if self.sampler == "heun" else steps)

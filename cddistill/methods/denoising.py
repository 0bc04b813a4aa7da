"""Plain diffusion training: how teachers and fine-tuned baselines are made (Ho et al. 2020, arXiv:2006.11239).

    t ~ U,  eps ~ N(0, I),  z_t = alpha_t x0 + sigma_t eps
    loss = || out(z_t, t, text, cond) - target(x0, eps) ||^2      in the network's own parameterisation

Without a condition it trains the backbone alone; with one (`data.task`), backbone and branch together.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cddistill import sampling
from cddistill.method import Turn, check_choices, drop_text, normal, uniform
from cddistill.models import adapter
from cddistill.models.schedulers import Sampling
from cddistill.net import Adapted


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Hyper-parameters of plain diffusion training; the defaults are ours."""

    text_dropout: float = 0.1  # share of samples that see the null text, for classifier-free guidance
    ema_decay: float = 0.999  # per step
    adapter: str = "none"  # condition branch: "none", "controlnet" or "mu_blend"
    freeze_backbone: bool = False  # train the branch alone, as ControlNet does
    sampler: str = "ddim"  # or "heun", "dpm_solver_pp"
    guidance: float = 1.0  # classifier-free guidance when sampling; 1 = none
    grid_power: float = 1.0  # of the sampling times, see `sampling.times`

    def __post_init__(self):
        check_choices(self, {"adapter": ("none", *adapter.BRANCHES), "sampler": ("ddim", "heun", "dpm_solver_pp")})

    def init(self, key, frozen, batch):
        """The teacher itself, and a fresh branch if there is a condition."""
        nets = {} if self.freeze_backbone else {"backbone": jax.tree.map(jnp.copy, frozen["teacher"])}
        if self.adapter != "none":
            widths = adapter.embedding_widths(batch["cond"], batch["x0"])
            nets["branch"] = adapter.make_branch(frozen["teacher"], key, self.adapter, batch["cond"].shape[-1], widths)
        return nets

    def turns(self):
        moves = () if self.freeze_backbone else ("backbone",)
        return {"student": Turn(moves=moves + (("branch",) if self.adapter != "none" else ()), loss=self.loss)}

    def ema(self):
        return dict.fromkeys(self.turns()["student"].moves, self.ema_decay)

    def loss(self, n, batch, key):
        k_t, k_eps, k_drop = jax.random.split(key, 3)
        x0, index = batch["x0"], batch["index"]
        t = n.teacher.schedule.at(uniform(k_t, index))
        eps = normal(k_eps, index, x0.shape[1:])
        text = drop_text(k_drop, batch, self.text_dropout)
        backbone = n.teacher if self.freeze_backbone else n.backbone
        z_t = backbone.noise(x0, eps, t)
        if self.adapter == "none":
            return backbone.dsm_loss(z_t, t, x0, eps, text), {}
        return Adapted(backbone, n.branch).dsm_loss(z_t, t, x0, eps, text, batch["cond"]), {}

    def sample(self, n, noise, batch, key, steps):
        backbone = n.teacher if self.freeze_backbone else n.backbone_ema
        schedule = backbone.schedule
        if self.adapter != "none":
            student = Adapted(backbone, n.branch_ema)
            denoise = lambda z, t, text: student(z, t, text, batch["cond"])
        else:
            denoise = backbone
        denoise = sampling.guided(denoise, batch["text"], batch["null"], self.guidance)
        return sampling.SAMPLERS[self.sampler](
            denoise, schedule, noise, sampling.times(schedule, steps, self.grid_power)
        )

    def sampling(self, schedule, steps):
        if self.sampler != "ddim":
            return None
        return Sampling(timesteps=tuple(map(int, sampling.times(schedule, steps, self.grid_power))))

    def nfe(self, steps):
        per_step = 1 if self.guidance == 1.0 else 2
        return per_step * (2 * steps - 1 if self.sampler == "heun" else steps)

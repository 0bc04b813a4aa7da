"""Diffusion training, for teachers and fine-tuned baselines (Ho et al. 2020, arXiv:2006.11239).

    t ~ U,  eps ~ N(0, I),  z_t = alpha_t x0 + sigma_t eps
    loss = || out(z_t, t, text, cond) - target(x0, eps) ||^2      in the network's own parameterisation

Without a condition it trains the backbone; with one (`data.task`) it trains backbone and branch together. The text
encoder may be trained along (Rombach et al. 2022, sec. 3.3): the data then has token ids instead of embeddings.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cddistill import health, sampling
from cddistill.diffusion import like
from cddistill.method import Generator, Requires, Turn, drop_text, normal, uniform, warmed_up
from cddistill.models import adapter
from cddistill.models.adapter import Conditioning
from cddistill.models.prompt import embed_ids
from cddistill.models.schedulers import Sampling
from cddistill.typed import Decay, NonNegative, Positive, Share


@dataclasses.dataclass(frozen=True)
class Diffusion(Generator):
    """Hyper-parameters of diffusion training; the defaults are ours."""

    text_dropout: Share = 0.1  # share of samples with the null text, for classifier-free guidance
    image_dropout: Share = 0.0  # share of samples with a condition of zeros, for image_guidance (InstructPix2Pix: 0.1)
    ema_decay: Decay = 0.999  # per step
    ema_warmup: bool = False  # for random weights: a smaller decay at first, see `method.warmed_up`
    adapter: Conditioning = "none"  # how a condition enters: "controlnet", "mu_blend" or "concat"
    freeze_backbone: bool = False  # train only the branch, as ControlNet does
    train_text_encoder: bool = False  # of teachers with one text encoder; --mode=encode then writes token ids
    sampler: sampling.OdeSampler = "ddim"  # or "heun", "dpm_solver_pp"
    guidance: NonNegative = 1.0  # guidance scale of sampling; 1 = none
    image_guidance: NonNegative = 1.0  # of the conditioning image; 1 = none (InstructPix2Pix: 1.5, for editing)
    grid_power: Positive = 1.0  # of the sampling timesteps, see `sampling.timesteps`

    mutable_on_resume = ("guidance", "image_guidance", "grid_power", "sampler")

    def __post_init__(self):
        if self.adapter == "none" and (self.image_guidance != 1.0 or self.image_dropout):
            raise ValueError("method.image_guidance and image_dropout are for a conditioning image: set method.adapter")

    def init(self, key, frozen, batch):
        """A copy of the teacher, and a new branch if there is a condition."""
        nets = adapter.student_nets(frozen, key, self.adapter, batch, self.freeze_backbone)
        if self.train_text_encoder:
            nets["text_encoder"] = jax.tree.map(jnp.copy, frozen["teacher_text_encoder"])
        return nets

    def turns(self):
        text_encoder = ("text_encoder",) if self.train_text_encoder else ()
        return {"student": Turn(moves=adapter.moves(self.adapter, self.freeze_backbone) + text_encoder, loss=self.loss)}

    def requires(self):
        return Requires(condition=adapter.condition_space(self.adapter), text_encoder=self.train_text_encoder)

    def exports(self):
        text_encoder = {"text_encoder": "text_encoder"} if self.train_text_encoder else {}
        return adapter.exports(self.adapter, self.freeze_backbone) | text_encoder

    def health_rules(self):
        return super().health_rules() | health.COLLAPSE

    def ema(self):
        decay = warmed_up(self.ema_decay) if self.ema_warmup else self.ema_decay
        return dict.fromkeys(self.turns()["student"].moves, decay)

    def loss(self, n, batch, key):
        """Denoising score matching at random timesteps; there are no metrics beside it."""
        k_t, k_eps, k_drop = jax.random.split(key, 3)
        x0, index = batch["x0"], batch["index"]
        t = n.teacher.schedule.at(uniform(k_t, index))
        eps = normal(k_eps, index, x0.shape[1:])
        text = drop_text(k_drop, batch, self.text_dropout)
        if self.train_text_encoder:
            text = embed_ids(n.text_encoder, text["input_ids"])
        z_t = n.teacher.noise(x0, eps, t)
        if self.adapter == "none":
            return n.backbone.dsm_loss(z_t, t, x0, eps, text), {}
        cond = adapter.condition(self.adapter, batch)
        if self.image_dropout:
            dropped = uniform(jax.random.fold_in(k_drop, 1), index) < self.image_dropout
            cond = jnp.where(like(dropped, cond), 0.0, cond)
        return adapter.student(n, self.freeze_backbone).dsm_loss(z_t, t, x0, eps, text, cond), {}

    def sample(self, n, noise, batch, step_noise, steps):
        schedule = n.teacher.schedule
        student = adapter.student(n, self.freeze_backbone, average=True)
        denoise, blind = student.backbone, None
        if self.adapter != "none":
            cond = adapter.condition(self.adapter, batch)
            denoise = lambda z, t, text: student(z, t, text, cond)
            blind = lambda z, t, text: student(z, t, text, jnp.zeros_like(cond))
        texts = [batch["text"], batch["null"]]
        if self.train_text_encoder:
            texts = [embed_ids(n.text_encoder_ema, text["input_ids"]) for text in texts]
        denoise = sampling.guided(denoise, *texts, self.guidance, self.image_guidance, blind)
        timesteps = sampling.timesteps(schedule, steps, self.grid_power)
        return sampling.SAMPLERS[self.sampler](denoise, schedule, noise, timesteps)

    def sampling(self, schedule, steps):
        if self.sampler != "ddim" or self.image_guidance != 1.0:
            return None
        timesteps = tuple(map(int, sampling.timesteps(schedule, steps, self.grid_power)))
        return Sampling(timesteps=timesteps, guidance=self.guidance)

    def nfe(self, steps):
        per_step = sampling.evaluations(self.guidance, self.image_guidance)
        return per_step * (2 * steps - 1 if self.sampler == "heun" else steps)

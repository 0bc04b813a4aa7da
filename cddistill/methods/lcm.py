"""LCM: latent consistency distillation (Luo et al. 2023, arXiv:2310.04378, algorithm 1; LCM-LoRA, arXiv:2311.05556).

    z_t  = alpha_t x0 + sigma_t eps                      t on a grid of the teacher's DDIM steps, s the next one
    z_s  = DDIM step of the guided teacher from z_t to s                        guidance scale w ~ U(guidance_range)
    loss = d( f(z_t, w, t),  sg f_ema(z_s, w, s) )       f(z, w, t) = c_skip z + c_out x^(z, w, t),  f(z, w, 0) = z

The student takes w as an input, so that one evaluation a step does what guidance does with two. A LoRA has no such
input: it learns the mean over w. With a conditional teacher (a ControlNet, or input channels for the condition) this is
the second of two stages, of which CoDi's paper compares itself with ("CM-II").
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from cddistill import health, losses, sampling
from cddistill.diffusion import guide, like
from cddistill.method import Generator, Requires, Turn, normal, uniform
from cddistill.models import adapter, lora
from cddistill.models.adapter import Conditioning
from cddistill.models.guidance import EmbeddingWidth, GuidanceRange, embed_guidance, with_scales
from cddistill.models.lora import LoraLayers
from cddistill.models.schedulers import Sampling
from cddistill.net import Adapted, Denoiser
from cddistill.typed import Decay, NonNegative, Positive, Width, within


@dataclasses.dataclass(frozen=True)
class LCM(Generator):
    """Hyper-parameters of LCM; "ours" marks values that the paper does not give."""

    grid_size: Annotated[int, within(least=2, most=1000)] = 50  # DDIM steps of the teacher; one skips 1000 / grid_size
    # timesteps (paper: k = 20)
    guidance_range: GuidanceRange = (3.0, 15.0)  # of training, as scales (paper: w in [2, 14], scale = 1 + w)
    guidance: NonNegative = 8.0  # guidance scale of sampling, an input of the student (paper)
    embedding_width: EmbeddingWidth = 256  # of that input (released code); 0 = none, for LoRAs and with a branch
    distance: losses.Distance = "l2"
    ema_decay: Decay = 0.95  # per step, of the target and the final weights (paper); 0 = the student itself
    student_lora: LoraLayers = "none"  # LCM-LoRA: the student as a LoRA of the teacher's "attention" or "blocks" layers
    lora_rank: Width = 64  # released code: 64
    lora_alpha: Positive = 64.0  # released code: 64
    adapter: Conditioning = "none"  # how a conditional teacher's condition enters: "controlnet", "mu_blend", "concat"
    freeze_backbone: bool = False  # train the branch only

    mutable_on_resume = ("guidance",)

    def __post_init__(self):
        adapter.moves(self.adapter, self.freeze_backbone)
        if self.embedding_width and (self.student_lora != "none" or self.adapter != "none"):
            raise ValueError("LoRAs and students with a condition take no guidance scale: set method.embedding_width=0")
        if self.student_lora != "none" and self.adapter != "none":
            raise ValueError("method.student_lora and method.adapter cannot be combined: choose one")

    # ---- nets

    def init(self, key, frozen, batch):
        """A copy of the teacher, its guidance input at zero, or a LoRA of it; with a condition also a branch."""
        teacher = frozen["teacher"]
        sampling.check_boundary(teacher.schedule)
        if self.student_lora != "none":
            return {"backbone": lora.make_lora_of(teacher, self.student_lora, key, self.lora_rank, self.lora_alpha)}
        if self.embedding_width:
            return {"backbone": embed_guidance(teacher, self.embedding_width)}
        adapter.check_conditional(frozen, self.adapter, batch)
        return adapter.student_nets(frozen, key, self.adapter, batch, self.freeze_backbone)

    def requires(self):
        text = self.guidance_range != (1.0, 1.0)
        return Requires(condition=adapter.condition_space(self.adapter), text=text)

    def exports(self):
        return adapter.exports(self.adapter, self.freeze_backbone)

    def health_rules(self):
        return super().health_rules() | health.COLLAPSE

    def turns(self):
        return {"student": Turn(moves=adapter.moves(self.adapter, self.freeze_backbone), loss=self.loss)}

    def ema(self):
        return dict.fromkeys(self.turns()["student"].moves, self.ema_decay) if self.ema_decay else {}

    def student(self, n, average: bool = False) -> Denoiser | Adapted:
        """The student of n, or its moving average."""
        average = average and bool(self.ema_decay)
        if self.adapter != "none":
            return adapter.student(n, self.freeze_backbone, average)
        return lora.merge_if_lora(n.teacher, n.backbone_ema if average else n.backbone)

    # ---- loss

    def loss(self, n, batch, key):
        """Algorithm 1, mean over the batch; there are no metrics beside it."""
        k_t, k_eps, k_w = jax.random.split(key, 3)
        x0, index, text = batch["x0"], batch["index"], batch["text"]
        schedule, cond = n.teacher.schedule, adapter.condition(self.adapter, batch)
        t, s = self.random_timesteps(schedule, uniform(k_t, index))
        low, high = self.guidance_range
        scales = low + (high - low) * uniform(k_w, index)
        z_t = n.teacher.noise(x0, normal(k_eps, index, x0.shape[1:]), t)

        step = self.guided_teacher(n, batch, cond, scales)(z_t, t)
        z_s = n.teacher.noise(step.x0, step.eps, s)
        ahead = self.consistent(self.student(n), z_t, t, text, cond, scales)
        target = self.consistent(self.student(n, average=True), z_s, s, text, cond, scales)
        return losses.DISTANCES[self.distance](ahead, jax.lax.stop_gradient(target)).mean(), {}

    def random_timesteps(self, schedule, u):
        """(t, s) [b]: a random timestep of the grid T/L - 1, 2 T/L - 1, ..., T - 1, and the one before it (or 0)."""
        k = jnp.floor(u * self.grid_size)
        return schedule.at((k + 1) / self.grid_size), schedule.at(k / self.grid_size)

    def guided_teacher(self, n, batch, cond, scales):
        """(z, t) -> Prediction of the teacher under classifier-free guidance, one scale per sample."""
        teacher = n.teacher
        if self.adapter != "none":
            conditional = Adapted(teacher, getattr(n, "controlnet", None))
            teacher = lambda z, t, text: conditional(z, t, text, cond)
        if self.guidance_range == (1.0, 1.0):
            return lambda z, t: teacher(z, t, batch["text"])
        return lambda z, t: guide(teacher(z, t, batch["text"]), teacher(z, t, batch["null"]), like(scales, z))

    def consistent(self, net, z, t, text, cond, scales):
        """f(z, w, t) [b, ...]: x^ of a student, bounded so that f(z, w, 0) = z (eq. 9)."""
        x0 = self.predict(net, z, t, text, cond, scales).x0
        return sampling.boundary(x0, z, like(t.astype(jnp.float32), x0))

    def predict(self, net, z, t, text, cond, scales):
        """A student's prediction, given what it takes: the condition, or the guidance scales [b]."""
        if self.adapter != "none":
            return net(z, t, text, cond)
        return net(z, t, with_scales(net, text, scales))

    # ---- sampling

    def sample(self, n, noise, batch, step_noise, steps):
        student, cond = self.student(n, average=True), adapter.condition(self.adapter, batch)
        scales = jnp.full(len(noise), self.guidance)
        denoise = lambda z, t: self.predict(student, z, t, batch["text"], cond, scales)
        timesteps = self.sampling(n.teacher.schedule, steps).times(n.teacher.schedule, steps)
        return sampling.lcm(denoise, n.teacher.schedule, noise, timesteps, step_noise)

    def sampling(self, schedule, steps):
        spaced = Sampling(sampler="lcm", spacing="lcm", original_inference_steps=self.grid_size)
        timesteps = tuple(map(int, spaced.grid(schedule.num_timesteps, steps)))
        return dataclasses.replace(spaced, timesteps=timesteps)

"""Guided progressive distillation (Meng et al. 2023, arXiv:2210.03142; halving: Salimans & Ho 2022, arXiv:2202.00512).

    stage 0   x~ = x_null + scale (x_text - x_null)     of the teacher at z_t, with scale ~ U(guidance_range)
    stage k   z_t'' = two DDIM steps from z_t of the student of stage k - 1; x~ = the x0 whose one DDIM step ends there,
              t, t', t'' = i/N, (i - 1/2)/N, (i - 1)/N with i ~ U{1 ... N} and N = first_steps / 2^k
    loss = max(alpha_t^2 / sigma_t^2, 1) || x^(z_t, t) - x~ ||^2

One run has all stages, `halve_every` steps each. The teacher of one is the average of the student, whose EMA decay is
0 in the last step of a stage and else 1. It depends on the step alone, lies in every checkpoint, and is what is sampled
and exported, the student of the last complete stage. Published code averages nothing else either; it starts Adam anew
in each stage, whose moments are kept here (optim.cycles starts the learning rate anew). With a conditional teacher this
is the second of two stages, with which CoDi's paper compares itself ("GD-II").
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from cddistill import losses, sampling
from cddistill.diffusion import guide, like
from cddistill.method import Generator, Requires, Turn, normal, uniform
from cddistill.models import adapter
from cddistill.models.adapter import Conditioning
from cddistill.models.guidance import EmbeddingWidth, GuidanceRange, embed_guidance, with_scales
from cddistill.models.schedulers import Sampling
from cddistill.typed import Count, NonNegative, SamplingSteps, within


@dataclasses.dataclass(frozen=True)
class GuidedDistillation(Generator):
    """Hyper-parameters of guided progressive distillation; "ours" marks values that the papers do not give."""

    first_steps: SamplingSteps = 64  # DDIM steps of the teacher of the first halving (ours; papers: 512 to 8192)
    halvings: Annotated[int, within(least=1, most=20)] = 4  # the last student takes first_steps / 2^halvings steps
    halve_every: Count = 50_000  # train steps of each stage (published code, CIFAR-10)
    guidance_range: GuidanceRange = (3.0, 15.0)  # scales of stage 0 (paper: w in [2, 14]); (1, 1) = no stage 0
    guidance: NonNegative = 8.0  # guidance scale of sampling, an input of the student (ours)
    embedding_width: EmbeddingWidth = 256  # of that input (ours: LCM's); 0 = none: learn the mean over scales
    adapter: Conditioning = "none"  # how a conditional teacher's condition enters: "controlnet", "mu_blend", "concat"

    mutable_on_resume = ("guidance",)

    def __post_init__(self):
        if self.embedding_width and (self.adapter != "none" or self.guidance_range[1] == 1.0):
            raise ValueError("students with a condition or without guidance need method.embedding_width=0")
        if self.first_steps % 2**self.halvings:
            raise ValueError(
                f"method.first_steps={self.first_steps} cannot be halved method.halvings={self.halvings} times: set a "
                "multiple of 2^halvings"
            )

    @property
    def first_stage(self) -> int:
        """0, or 1 where there is no guidance to learn."""
        return int(self.guidance_range == (1.0, 1.0))

    def check_train_steps(self, steps):
        most = self.halve_every * (self.halvings + 1 - self.first_stage)
        if steps % self.halve_every or steps > most:
            raise ValueError(f"steps={steps} is no number of whole stages: set steps to a multiple of "
                             f"method.halve_every={self.halve_every} up to {most}, which is all of them")  # fmt: skip

    # ---- nets

    def init(self, key, frozen, batch):
        """A copy of the teacher, its guidance input at zero, and of its ControlNet, if there is one."""
        teacher, width = frozen["teacher"], self.embedding_width
        if self.first_steps > getattr(teacher.schedule, "num_timesteps", self.first_steps):
            raise ValueError(f"the teacher has fewer timesteps than method.first_steps={self.first_steps}: reduce it")
        adapter.check_conditional(frozen, self.adapter, batch)
        student = embed_guidance(teacher, width) if width else jax.tree.map(jnp.copy, teacher)
        return adapter.copied(self.adapter, {"student": student}, frozen)

    def requires(self):
        return Requires(condition=adapter.condition_space(self.adapter), text=not self.first_stage)

    def exports(self):
        return dict(zip(("unet", "controlnet"), adapter.parts(self.adapter, "student"), strict=False))

    def turns(self):
        return {"student": Turn(moves=adapter.parts(self.adapter, "student"), loss=self.loss)}

    def ema(self):
        decay = lambda step: jnp.where((step + 1) % self.halve_every == 0, 0.0, 1.0)
        return dict.fromkeys(adapter.parts(self.adapter, "student"), decay)

    # ---- loss

    def loss(self, n, batch, key):
        """Mean over the batch, and the metric `steps`: those of the student that is trained."""
        k_t, k_eps, k_w = jax.random.split(key, 3)
        batch, index, schedule = adapter.with_condition(self.adapter, batch), batch["index"], n.teacher.schedule
        stage = jnp.minimum(self.first_stage + n.step // self.halve_every, self.halvings)
        total = jnp.where(stage == 0, sampling.NUM_LEVELS, self.first_steps >> stage)  # N; stage 0 has all times
        i = jnp.floor(uniform(k_t, index) * total) + 1
        t = schedule.at(i / total)
        z_t = n.teacher.noise(batch["x0"], normal(k_eps, index, batch["x0"].shape[1:]), t)
        low, high = self.guidance_range
        scales = low + (high - low) * uniform(k_w, index)
        student, previous = (adapter.whole(n, self.adapter, "student", average) for average in (False, True))
        text = with_scales(student, batch["text"], scales)
        teacher = lambda name: adapter.teacher(n, self.adapter)(z_t, t, batch[name]).x0
        guided = lambda: guide(teacher("text"), teacher("null"), like(scales, z_t))
        halved = lambda: two_steps(lambda z, t: previous(z, t, text), schedule, z_t, i, total)
        target = halved() if self.first_stage else jax.lax.cond(stage == 0, guided, halved)
        alpha, sigma = schedule.alpha_sigma(t)
        weight = jnp.maximum((alpha / sigma) ** 2, 1.0)  # "truncated SNR", Salimans & Ho 2022, sec. 4
        distance = losses.mse(student(z_t, t, text).x0, jax.lax.stop_gradient(target))
        return (weight * distance).mean(), {"steps": jnp.float32(total)}

    # ---- sampling

    def sample(self, n, noise, batch, step_noise, steps):
        student, schedule = adapter.whole(n, self.adapter, "student", average=True), n.teacher.schedule
        text = adapter.with_condition(self.adapter, batch)["text"]
        text = with_scales(student, text, jnp.full(len(noise), self.guidance))
        return sampling.ddim(lambda z, t: student(z, t, text), schedule, noise, times(schedule, steps))

    def sampling(self, schedule, steps):
        allowed = [self.first_steps >> k for k in range(self.halvings + 1)]
        if steps not in allowed:
            raise ValueError(f"students of this method take {', '.join(map(str, allowed))} steps, according to the "
                             f"stage, not {steps}: set sample_steps={allowed[-1]}")  # fmt: skip
        return Sampling(timesteps=tuple(map(int, times(schedule, steps))))


def times(schedule, steps: int):
    """Native timesteps of a student of N steps: at N/N, ..., 1/N."""
    return schedule.at(jnp.arange(steps, 0, -1) / steps)


def two_steps(denoise, schedule, z_t, i, total):
    """x~ [b, ...]: a DDIM step with it from t = i/N ends at (i - 1)/N where two steps of `denoise` end.

    The x~ of Salimans & Ho 2022, algorithm 2, as a mean of both predictions: a step adds x0 times the change of
    alpha/sigma to z/sigma. The weights are written so that they are finite where sigma is 0.
    """
    t, middle, end = (schedule.at(x / total) for x in (i, i - 0.5, i - 1))
    (a, s), (a1, s1), (a2, s2) = map(schedule.alpha_sigma, (t, middle, end))
    a2, s2 = jnp.where(i > 1, a2, 1.0), jnp.where(i > 1, s2, 0.0)  # the last step ends at x0
    first = denoise(z_t, t)
    second = denoise(like(a1, z_t) * first.x0 + like(s1, z_t) * first.eps, middle)
    share = (a2 * s1 - a1 * s2) * s / ((a2 * s - a * s2) * s1)
    return first.x0 + like(share, z_t) * (second.x0 - first.x0)

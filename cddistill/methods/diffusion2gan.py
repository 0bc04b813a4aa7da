"""Diffusion2GAN: distilling diffusion models into conditional GANs (Kang et al., ECCV 2024, arXiv 2405.05967).

    critic    softplus(-disc(x)) + softplus(disc(x^)): x is the teacher's ODE solution from noise z; x^ = student(z) or
              an x with mismatched image, text or noise;  every 16th step, on some x:  + gamma / 2 |grad_x disc(x)|^2
    student   x^ = student(z) in one step;  d(T x^, T x), T a random transform of both;  + lambda softplus(-disc(x^))

The student is trained on pairs (z, x, text), which --mode=pairs generates once. The discriminator is a copy of the
teacher's whole network, conditioned on the text and the noise. Written from the paper's project page, poster and
released metric; its training code and most of its hyper-parameters are unpublished. "Ours" marks values that are not
the paper's. Labels D1 ... here and in tests are those of docs/diffusion2gan.md.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from cddistill import health, losses, sampling
from cddistill.diffusion import like
from cddistill.method import Generator, Requires, Turn, normal, per_sample, uniform
from cddistill.models import adapter
from cddistill.models.adapter import Conditioning
from cddistill.models.schedulers import Sampling
from cddistill.models.unet_discriminator import make_discriminator
from cddistill.net import Denoiser
from cddistill.perceptual import ensemble, latent_lpips, lpips
from cddistill.sampling import Level, level_to_time
from cddistill.typed import Count, Decay, Natural, NonNegative, Positive, Share


@dataclasses.dataclass(frozen=True)
class Diffusion2GAN(Generator):
    """Hyper-parameters of Diffusion2GAN; the defaults are the paper's where it gives them, "ours" marks the others."""

    adapter: Conditioning = "none"  # of a conditional teacher: "controlnet", "mu_blend" or "concat" (ours)
    time: Level = 999  # the student's timestep (noise level); its input is always pure noise (DMD2's SDXL: 399)
    regression: Literal["latent_lpips", "lpips", "teacher", "l2", "pseudo_huber"] = "latent_lpips"  # "lpips": of
    # decoded images; "teacher": of the teacher's features
    metric: str = ""  # weights of latent_lpips: a file, or a pipeline that has its own, such as "pocket"
    family: str = ""  # autoencoder of those weights, if the file's name does not say: sd15, sd21, sdxl, sd3, flux
    augment: Literal[*ensemble.POLICIES] = "bgo"  # the ensemble's transforms: blit, geometric, cutout, or "none"
    l1_weight: NonNegative = 0.0  # of mean |x^ - x| in the distance (released metric: 1)
    regression_weight: NonNegative = 1.0
    gan_weight: NonNegative = 0.1  # ours; 0 = no discriminator
    warmup: Natural = 0  # train steps with the regression loss only, before the GAN starts (ours)
    disc_noise: bool = True  # the discriminator is conditioned on the noise
    disc_scales: bool = True  # it sees the image at several resolutions and has logits at several depths
    disc_time: Level = 0  # its timestep (noise level) (ours); its images are clean
    r1: Literal["exact", "approximate", "none"] = "exact"  # "approximate": by added noise, no second derivative
    r1_weight: NonNegative = 1.0  # gamma (ours); "approximate": 100 (Lin et al. 2025)
    r1_noise: Positive = 0.01  # standard deviation of the noise of "approximate" (Lin et al. 2025: 0.01)
    r1_every: Count = 16  # train steps between two penalties; each counts r1_every times
    r1_stride: Count = 8  # every r1_stride-th image is penalised (ours: the paper has one per device)
    mix_share: Share = 0.25  # share of negatives that are real images with a mismatched image, text or noise (ours)
    mix: Literal["image", "each"] = "image"  # mismatched part; "each": image, text or noise, at random
    ema_decay: Decay = 0.999  # per step, of the student that is evaluated (ours); 0 = the student itself

    paths = ("metric",)

    def __post_init__(self):
        if not self.regression_weight and not self.gan_weight:
            raise ValueError("method.regression_weight and gan_weight are both 0: the student has no loss")

    def init(self, key, frozen, batch):
        """The student is a copy of the teacher; the discriminator is another, with new layers.

        Raises ValueError if mix_share needs more than one pair in the batch, or if the teacher or the pairs lack the
        condition.
        """
        adapter.check_conditional(frozen, self.adapter, batch)
        if self.adapter != "none" and "cond" not in batch["pairs"]:
            raise ValueError("data.pairs have no condition: make them again, with config.controlnet and data.task")
        teacher = frozen["teacher"]
        if self.gan_weight and self.mix_share and len(batch["index"]) < 2:
            raise ValueError("method.mix_share needs two pairs in a batch: raise batch_size, or set mix_share to 0")
        nets = adapter.copied(self.adapter, {"student": jax.tree.map(jnp.copy, teacher)}, frozen)
        if self.gan_weight:
            nets["disc"] = make_discriminator(teacher, key, noise=self.disc_noise, scales=self.disc_scales)
        return nets

    def turns(self):
        student = {"student": Turn(moves=self.parts(), loss=self.student_loss)}
        if not self.gan_weight:
            return student
        lazy = 0 if self.r1 == "none" else self.r1_every
        return {"critic": Turn(moves=("disc",), loss=self.critic_loss, after=self.warmup, lazy=lazy)} | student

    def parts(self) -> tuple[str, ...]:
        """The nets that make up the student."""
        return adapter.parts(self.adapter, "student")

    def ema(self):
        return dict.fromkeys(self.parts(), self.ema_decay) if self.ema_decay else {}

    def requires(self):
        nets = {}
        if self.regression == "lpips":
            nets["lpips"] = functools.partial(lpips.load, "vgg")
        if self.regression == "latent_lpips":
            nets["latent_lpips"] = functools.partial(
                latent_lpips.required, "method.regression", self.metric, self.family
            )
        outlines = {"latent_lpips": functools.partial(latent_lpips.outline, self.metric, self.family)}
        condition = adapter.condition_space(self.adapter)
        return Requires(nets, outlines, images=False, pairs=True, pairs_only=True, condition=condition)

    def exports(self):
        return dict(zip(("unet", "controlnet"), self.parts(), strict=False))

    def health_rules(self):
        return super().health_rules() | health.COLLAPSE | health.CRITIC | health.DISCRIMINATOR

    # ---- the two losses

    def student_loss(self, n, batch, key):
        """Distance to the teacher's image for the same noise, and the GAN loss conditioned on it (D2, D6, D7)."""
        z, x, text = self.pair(batch["pairs"])
        generated = self.generate(self.student(n), z, text)
        loss = 0.0
        logs = {}
        if self.regression_weight:
            keys = per_sample(key, batch["index"])
            logs["regression"] = self.distance(n, generated, x, text, keys).mean()
            loss = self.regression_weight * logs["regression"]
        if "critic" in n.play:
            logs["gan"] = losses.gan(self.logits(n, generated, z, text), real=True).mean()
            loss = loss + self.gan_weight * logs["gan"]
        return loss, logs | {"l2": losses.mse(jax.lax.stop_gradient(generated), x).mean()}

    def critic_loss(self, n, batch, key):
        """Real images against generated and mismatched ones (D8), and every r1_every steps the R1 penalty (D9)."""
        k_mix, k_r1 = jax.random.split(key)
        z, x, text = self.pair(batch["pairs"])
        generated = jax.lax.stop_gradient(self.generate(self.student(n), z, text))
        real = self.logits(n, x, z, text)
        negative = self.logits(n, *self.mixed(batch, generated, k_mix))
        loss = (losses.gan(real, real=True) + losses.gan(negative, real=False)).mean()
        logs = {"gan": loss, "real_accuracy": share_above(real), "generated_accuracy": 1.0 - share_above(negative)}
        if "critic/lazy" in n.play:
            rows = jax.tree.map(lambda a: a[:: self.r1_stride], (x, z, text, batch["index"]))
            logs["r1"] = self.penalty(n, *rows, k_r1).mean()
            loss = loss + self.r1_every * self.r1_weight * logs["r1"]
        return loss, logs

    # ---- parts of the losses

    def pair(self, pairs):
        """(z, x, text): unit noise, the teacher's ODE solution from it, and the text with the condition."""
        return pairs["noise"], pairs["x0"], adapter.with_condition(self.adapter, pairs)["text"]

    def student(self, n, average: bool = False) -> Denoiser:
        """The student or its moving average, with its branch."""
        return adapter.whole(n, self.adapter, "student", average and bool(self.ema_decay))

    def generate(self, student: Denoiser, z, text):
        """x0 in one step from noise z scaled to the student's timestep (80 z for EDM); any parameterisation (D3)."""
        t = level_to_time(student.schedule, (self.time,))
        return student(sampling.scale_noise(student.schedule.alpha_sigma(t)[1], z), t[0], text).x0

    def distance(self, n, generated, x, text, keys):
        """The regression loss of each sample; its ensemble over transforms is estimated with one at random (D4, D5)."""
        if self.regression == "lpips":
            generated, x = n.autoencoder.decode(generated), n.autoencoder.decode(x)
        metric = {
            "latent_lpips": lambda a, b: n.latent_lpips(a, b),
            "lpips": lambda a, b: n.lpips(a, b),
            "teacher": lambda a, b: self.feature_distance(n, a, b, text),
        }.get(self.regression) or losses.DISTANCES[self.regression]
        return ensemble.ensemble(metric, generated, x, keys, ensemble.POLICIES[self.augment], self.l1_weight)

    def feature_distance(self, n, a, b, text):
        """LPIPS's formula on the teacher's decoder features (ours), for latents without a trained latent LPIPS."""
        text = self.without_branch(text)
        t = level_to_time(n.teacher.schedule, self.disc_time)
        levels = zip(n.teacher.decoder_features(a, t, text), n.teacher.decoder_features(b, t, text), strict=True)
        return sum(losses.direction(level_a[-1], level_b[-1]) for level_a, level_b in levels)

    def logits(self, n, x, z, text):
        """The discriminator's logits for images x with text and noise z: a tuple of maps [b, ...]."""
        return n.disc(x, level_to_time(n.teacher.schedule, self.disc_time), self.without_branch(text), z)

    def without_branch(self, text):
        """The text inputs of a UNet without a branch: the discriminator (ours) and the features see no ControlNet."""
        return {k: x for k, x in text.items() if k != "cond"} if self.adapter in adapter.BRANCHES else text

    def mixed(self, batch, generated, key):
        """Negatives (images, noise, text): generated images, and real ones with a mismatched image, text or noise."""
        k_mix, k_what = jax.random.split(key)
        (z, x, text), index = self.pair(batch["pairs"]), batch["index"]
        mix = uniform(k_mix, index) < self.mix_share
        what = jnp.floor(3.0 * uniform(k_what, index)) if self.mix == "each" else jnp.zeros(len(index))
        z_other, x_other, text_other = self.pair(batch["others"])

        def swapped(ours, others, part):
            return jax.tree.map(lambda a, b: jnp.where(like(mix & (what == part), a), b, a), ours, others)

        images = jnp.where(like(mix, x), swapped(x, x_other, 0), generated)
        return images, swapped(z, z_other, 2), swapped(text, text_other, 1)

    def penalty(self, n, x, z, text, index, key):
        """|grad_x disc|^2 / 2 per sample (D9), or the squared change under noise (D10); the loss has gamma times it."""
        score = lambda x: self.logits(n, x, z, text)
        if self.r1 == "approximate":
            return losses.approximate_r1(score, x, self.r1_noise * normal(key, index, x.shape[1:]))
        return 0.5 * losses.r1(score, x)

    # ---- sampling

    def sample(self, n, noise, batch, step_noise, steps):
        self.check_steps(steps)
        batch = adapter.with_condition(self.adapter, batch)
        return self.generate(self.student(n, average=True), noise, batch["text"])

    def check_steps(self, steps):
        """Raises ValueError unless steps is 1."""
        if steps != 1:
            raise ValueError(f"a Diffusion2GAN student is sampled in one step, not {steps}: set sample_steps to (1,)")

    def sampling(self, schedule, steps):
        self.check_steps(steps)
        return Sampling(sampler="lcm", timesteps=(int(level_to_time(schedule, self.time)),))


def share_above(logits):
    """The share of positive logits (classified as real), mean over the maps."""
    return jnp.stack([(m > 0.0).mean() for m in jax.lax.stop_gradient(logits)]).mean()

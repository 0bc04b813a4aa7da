"""Diffusion2GAN: distilling diffusion models into conditional GANs (Kang et al., ECCV 2024, arXiv 2405.05967).

    critic    softplus(-disc(x)) + softplus(disc(x^)): x is what the teacher's ODE makes of noise z, x^ = student(z) or
              an x beside the wrong image, text or noise;  every 16th step, on some x:  + gamma / 2 |grad_x disc(x)|^2
    student   x^ = student(z) in one call;  d(T x^, T x), T a random transform of both;  + lambda softplus(-disc(x^))

The student learns from pairs (z, x, text), which --mode=pairs makes once. Its discriminator is the teacher's whole
network, and sees the image, the text and the noise. Written from the paper's project page, poster and released metric;
its training code and most of its hyper-parameters were never published: those marked "ours" are not the paper's.
Labels D1 ... here and in tests are those of docs/diffusion2gan.md.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cddistill import augment, losses, sampling
from cddistill.diffusion import like
from cddistill.method import Turn, check_choices, normal, per_sample, uniform
from cddistill.models.schedulers import Sampling
from cddistill.models.unet_discriminator import make_discriminator
from cddistill.net import Denoiser
from cddistill.sampling import LEVELS, native

CHOICES = {
    "regression": ("latent_lpips", "lpips", "teacher", "l2", "pseudo_huber"),
    "augment": tuple(augment.POLICIES),
    "r1": ("exact", "approximate", "none"),
    "mix": ("image", "each"),
}


@dataclasses.dataclass(frozen=True)
class Diffusion2GAN:
    """Hyper-parameters of Diffusion2GAN; the defaults are the paper's where it gives any, "ours" marks the rest."""

    time: int = 999  # the level that the student is told; its input is pure noise at any (DMD2's one-step SDXL: 399)
    regression: str = "latent_lpips"  # or "lpips" of decoded images, "teacher": the teacher's features, "l2" ...
    metric: str = ""  # file with the weights of latent_lpips, such as sd15_latest_vgg16_tuned.pth
    family: str = ""  # of latents that they are for, where the file's name does not say: sd15, sd21, sdxl, sd3, flux
    augment: str = "bgo"  # the ensemble's transforms: blit, geometric, cutout; "none" for the plain metric
    l1_weight: float = 0.0  # of mean |x^ - x|, which the released metric adds (1)
    regression_weight: float = 1.0
    gan_weight: float = 0.1  # ours; 0 = no discriminator
    warmup: int = 0  # steps of regression alone, before the discriminator trains (ours)
    disc_noise: bool = True  # the discriminator sees the noise
    disc_scales: bool = True  # and the image in several sizes, and gives logits at several depths
    disc_time: int = 0  # the level that it is told (ours); what it sees is clean
    r1: str = "exact"  # or "approximate", by noise, which takes no second derivative
    r1_weight: float = 1.0  # gamma (ours); "approximate": 100 (Lin et al. 2025)
    r1_noise: float = 0.01  # of the approximation
    r1_every: int = 16  # steps; the penalty counts as many times
    r1_stride: int = 8  # one image in so many is penalised (ours: the paper has one per device)
    mix_share: float = 0.25  # of drawn images that are replaced by real ones which do not belong to their pair (ours)
    mix: str = "image"  # another pair's image; "each": its image, its text or its noise
    ema_decay: float = 0.999  # of the student that is evaluated (ours); 0 = the student itself

    def __post_init__(self):
        check_choices(self, CHOICES)
        for name in ("time", "disc_time"):
            if not 0 <= getattr(self, name) < LEVELS:
                raise ValueError(f"method.{name} {getattr(self, name)} is not a level in 0 ... {LEVELS - 1}")
        for name in ("r1_every", "r1_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 <= self.mix_share <= 1.0:
            raise ValueError(f"method.mix_share {self.mix_share} is a share, in 0 ... 1")
        if not self.regression_weight and not self.gan_weight:
            raise ValueError("method.regression_weight and gan_weight are both 0: nothing trains the student")

    def init(self, key, frozen, batch):
        """The student is a copy of the teacher, and so is the discriminator but for its new layers."""
        teacher = frozen["teacher"]
        if "pairs" not in batch:
            raise ValueError("Diffusion2GAN learns from pairs: make them with --mode=pairs, and set data.pairs")
        if self.gan_weight and self.mix_share and len(batch["index"]) < 2:
            raise ValueError("method.mix_share needs another pair in the batch: raise batch_size, or set it to 0")
        nets = {"student": jax.tree.map(jnp.copy, teacher)}
        if self.gan_weight:
            nets["disc"] = make_discriminator(teacher, key, noise=self.disc_noise, scales=self.disc_scales)
        return nets

    def turns(self):
        student = {"student": Turn(moves=("student",), loss=self.student_loss)}
        if not self.gan_weight:
            return student
        lazy = 0 if self.r1 == "none" else self.r1_every
        return {"critic": Turn(moves=("disc",), loss=self.critic_loss, after=self.warmup, lazy=lazy)} | student

    def ema(self):
        return {"student": self.ema_decay} if self.ema_decay else {}

    needs_images = False  # pairs are what it learns from

    @property
    def lpips(self) -> bool:
        """Whether a loss needs n.lpips."""
        return self.regression == "lpips"

    @property
    def latent_lpips(self) -> tuple[str, str] | None:
        """File and family of n.latent_lpips, if a loss needs it; ValueError if the file is not named."""
        if self.regression != "latent_lpips":
            return None
        if not self.metric:
            raise ValueError(
                "method.regression='latent_lpips' needs method.metric, a file of weights such as "
                "sd15_latest_vgg16_tuned.pth; without one use 'teacher', or 'lpips' for pixels"
            )
        return self.metric, self.family

    # ---- the two losses

    def student_loss(self, n, batch, key):
        """What the teacher makes of the same noise, and a discriminator that knows the noise too (D2, D6, D7)."""
        z, x, text = self.pair(batch["pairs"])
        drawn, loss, logs = self.generate(n.student, z, text), 0.0, {}
        if self.regression_weight:
            keys = per_sample(key, batch["index"])
            logs["regression"] = self.distance(n, drawn, x, text, keys).mean()
            loss = self.regression_weight * logs["regression"]
        if "critic" in n.play:
            logs["gan"] = losses.gan(self.logits(n, drawn, z, text), real=True).mean()
            loss = loss + self.gan_weight * logs["gan"]
        return loss, logs | {"l2": losses.mse(jax.lax.stop_gradient(drawn), x).mean()}

    def critic_loss(self, n, batch, key):
        """Real against drawn and mixed (D8), and now and then the gradient penalty (D9)."""
        k_mix, k_r1 = jax.random.split(key)
        z, x, text = self.pair(batch["pairs"])
        drawn = jax.lax.stop_gradient(self.generate(n.student, z, text))
        real, wrong = self.logits(n, x, z, text), self.logits(n, *self.mixed(batch, drawn, k_mix))
        loss = (losses.gan(real, real=True) + losses.gan(wrong, real=False)).mean()
        logs = {"gan": loss, "real_accuracy": share_above(real), "drawn_accuracy": 1.0 - share_above(wrong)}
        if "critic/lazy" in n.play:
            rows = jax.tree.map(lambda a: a[:: self.r1_stride], (x, z, text, batch["index"]))
            logs["r1"] = self.penalty(n, *rows, k_r1).mean()
            loss = loss + self.r1_every * self.r1_weight * logs["r1"]
        return loss, logs

    # ---- their parts

    def pair(self, pairs):
        """Unit noise, what the teacher's ODE made of it, and its text."""
        return pairs["noise"], pairs["x0"], pairs["text"]

    def generate(self, student: Denoiser, z, text):
        """One call, whatever the network predicts (D3), on noise at the level that it is told: 80 z for EDM's."""
        t = native(student.schedule, (self.time,))
        return student(sampling.first_level(student.schedule.alpha_sigma(t)[1], z), t[0], text).x0

    def distance(self, n, drawn, x, text, keys):
        """The regression loss of each sample, averaged over an ensemble of transforms by drawing one (D4, D5)."""
        if self.regression == "lpips":
            drawn, x = n.autoencoder.decode(drawn), n.autoencoder.decode(x)
        metric = {
            "latent_lpips": lambda a, b: n.latent_lpips(a, b),
            "lpips": lambda a, b: n.lpips(a, b),
            "teacher": lambda a, b: self.seen_by_teacher(n, a, b, text),
        }.get(self.regression) or losses.DISTANCES[self.regression]
        return augment.ensemble(metric, drawn, x, keys, augment.POLICIES[self.augment], self.l1_weight)

    def seen_by_teacher(self, n, a, b, text):
        """LPIPS's formula on features of the teacher's decoder: for latents whose LPIPS nobody has trained (ours)."""
        t = native(n.teacher.schedule, self.disc_time)
        both = zip(n.teacher.levels(a, t, text), n.teacher.levels(b, t, text), strict=True)
        return sum(losses.direction(level_a[-1], level_b[-1]) for level_a, level_b in both)

    def logits(self, n, x, z, text):
        """The discriminator's maps of logits."""
        return n.disc(x, native(n.teacher.schedule, self.disc_time), text, z)

    def mixed(self, batch, drawn, key):
        """(images, noise, text) that are not to be believed: drawn ones, and real ones beside what is not theirs."""
        k_mix, k_what = jax.random.split(key)
        (z, x, text), index = self.pair(batch["pairs"]), batch["index"]
        mix = uniform(k_mix, index) < self.mix_share
        what = jnp.floor(3.0 * uniform(k_what, index)) if self.mix == "each" else jnp.zeros(len(index))
        z_other, x_other, text_other = self.pair(batch["others"])

        def swapped(ours, others, part):
            return jax.tree.map(lambda a, b: jnp.where(like(mix & (what == part), a), b, a), ours, others)

        images = jnp.where(like(mix, x), swapped(x, x_other, 0), drawn)
        return images, swapped(z, z_other, 2), swapped(text, text_other, 1)

    def penalty(self, n, x, z, text, index, key):
        """R1 of each sample: gamma / 2 of it is what the loss takes, or gamma of its approximation (D9, D10)."""
        score = lambda x: self.logits(n, x, z, text)
        if self.r1 == "approximate":
            return losses.approximate_r1(score, x, self.r1_noise * normal(key, index, x.shape[1:]))
        return 0.5 * losses.r1(score, x)

    # ---- the student in use

    def sample(self, n, noise, batch, key, steps):
        self.check_steps(steps)
        student = n.student_ema if self.ema_decay else n.student
        return self.generate(student, noise, batch["text"])

    def check_steps(self, steps):
        """The student has one step."""
        if steps != 1:
            raise ValueError(f"a Diffusion2GAN student draws in one step, not {steps}: set sample_steps to (1,)")

    def sampling(self, schedule, steps):
        self.check_steps(steps)
        return Sampling(sampler="lcm", timesteps=(int(native(schedule, self.time)),))

    def nfe(self, steps):
        return steps


def share_above(logits):
    """The share of logits, over all maps alike, that call an image real."""
    return jnp.stack([(m > 0.0).mean() for m in jax.lax.stop_gradient(logits)]).mean()

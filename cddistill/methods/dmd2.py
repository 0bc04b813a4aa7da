"""DMD2: Improved Distribution Matching Distillation (Yin et al., NeurIPS 2024, arXiv:2405.14867).

    x    = student(z_k, t_k, text).x0      z_k: noise, or what the student itself made of it in k steps (sec. 4.5)
    z_t  = alpha_t x + sigma_t eps         t ~ U over noise levels 20 ... 980 of 1000
    g    = (fake(z_t).x0 - teacher(z_t).x0) / mean |x - teacher(z_t).x0|                 eqs. 1-2, the gradient at x
    l(x) = disc(bottleneck of fake(alpha_t x + sigma_t eps'))                            sec. 4.3, real or drawn

    every step     fake, disc <- denoising of sg(x)  +  w_c ( softplus(l(sg x)) + softplus(-l(real)) )
    every ratio-th student    <- g  +  w_g d softplus(-l(x)) / dx                        two time scales, sec. 4.2

No regression pairs, no freezing: the score of the student's samples is learned by `fake`, which starts as a copy of the
teacher; with `disc` on top it is the critic. The critic plays first, on samples from before the student's update, as in
the released code. Labels E1 ... here and T1 ... in tests are those of docs/dmd2.md.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cddistill import diffusion, losses, sampling
from cddistill.diffusion import guide, like
from cddistill.method import Turn, check_choices, fresh, normal, uniform
from cddistill.models import discriminator, lora
from cddistill.models.schedulers import Sampling
from cddistill.net import Denoiser
from cddistill.sampling import LEVELS, native

CHOICES = {
    "gan_features": ("fake", "teacher"),
    "weighting": ("dmd", "dmd1", "none"),
    "regression": ("lpips", "l2"),
    "student_lora": ("none", "attention", "blocks"),
    "fake_lora": ("none", "attention", "blocks"),
}


@dataclasses.dataclass(frozen=True)
class DMD2:
    """Hyper-parameters of DMD2; the defaults are those of ImageNet-64 in the paper, "ours" marks what it has not."""

    times: tuple[int, ...] = (999,)  # the student's levels; SDXL: (399,) in one step, (999, 749, 499, 249) in four
    ratio: int = 5  # critic updates per student update (paper: 5; SD 1.5: 10)
    real_guidance: float = 1.0  # classifier-free, in the teacher's score alone (SD 1.5: 1.75; SDXL: 8)
    dm_weight: float = 1.0  # 0: the GAN alone (ablation)
    gan_weight: float = 3e-3  # in the student's loss (SD 1.5: 1e-3; SDXL: 5e-3); 0 = no GAN
    critic_gan_weight: float = 1e-2  # in the critic's
    gan_features: str = "fake"  # whose bottleneck disc sees; the frozen "teacher"'s instead (practice elsewhere)
    gan_noised: bool = True  # the diffusion GAN; False: samples are judged clean, at level 0
    backward_simulation: bool = True  # False: later steps start from noised real data (ablation)
    weighting: str = "dmd"  # of g: as above; "dmd1" has DMD's factor alpha_t too, "none" leaves both out
    dm_range: tuple[int, int] = (20, 980)  # levels, both included, at which scores are compared
    fake_range: tuple[int, int] = (0, 999)  # at which fake is trained
    gan_range: tuple[int, int] = (0, 999)  # at which samples are judged
    regression_weight: float = 0.0  # of data.pairs: SDXL's warm-up (alone, 1), DMD's own loss (ablation; 0.25)
    regression: str = "lpips"  # on decoded pixels, or "l2" on x0
    student_lora: str = "none"  # layers of the teacher that the student changes by a LoRA: "attention" or "blocks"
    fake_lora: str = "none"  # the same for fake (ours): three roles, one set of base weights
    lora_rank: int = 64
    lora_alpha: float = 8.0
    ema_decay: float = 0.0  # of the student that is evaluated, per step (ours); 0 = the student itself, as published

    def __post_init__(self):
        check_choices(self, CHOICES)
        times = self.times
        if not times or list(times) != sorted({*times}, reverse=True) or not 0 <= times[-1] <= times[0] < LEVELS:
            raise ValueError(f"method.times {times} must fall, from at most {LEVELS - 1} to at least 0")
        for name in ("dm_range", "fake_range", "gan_range"):
            low, high = getattr(self, name)
            if not 0 <= low <= high < LEVELS:
                raise ValueError(f"method.{name} {(low, high)} must rise, within 0 ... {LEVELS - 1}")
        if self.ratio < 1:
            raise ValueError(f"method.ratio must be at least 1, not {self.ratio}")
        if not self.dm_weight and not self.gan_weight and not self.regression_weight:
            raise ValueError("method.dm_weight, gan_weight and regression_weight are all 0: nothing trains the student")

    def init(self, key, frozen, batch):
        """Student and fake start as the teacher, or as LoRAs of it that change nothing; disc is random."""
        teacher, keys = frozen["teacher"], jax.random.split(key, 3)
        if self.real_guidance != 1.0 and not getattr(teacher.module, "conditional", True):
            raise ValueError(f"method.real_guidance={self.real_guidance} needs a teacher with classes or text")
        if self.regression_weight and "pairs" not in batch:
            raise ValueError("method.regression_weight needs data.pairs, which --mode=pairs makes")
        nets = {"student": self.copy(teacher, self.student_lora, keys[0])}
        if "critic" in self.turns():
            nets["fake"] = self.copy(teacher, self.fake_lora, keys[1])
        if self.gan_weight:
            look = lambda n, b: n.features(b["x0"], native(n.schedule, 0), b["text"])
            features = jax.eval_shape(look, teacher, batch)
            nets["disc"] = discriminator.make_head(features, keys[2])
        return nets

    def copy(self, teacher, layers: str, key):
        """The teacher's weights to move, or a LoRA for those of its layers."""
        if layers == "none":
            return jax.tree.map(jnp.copy, teacher)
        targets = lora.present(teacher, {"attention": lora.ATTENTION, "blocks": lora.BLOCKS}[layers])
        return lora.make_lora(teacher, key, self.lora_rank, self.lora_alpha, targets)

    def turns(self):
        disc = ("disc",) if self.gan_weight else ()
        critic = {"critic": Turn(moves=("fake", *disc), loss=self.critic_loss)}
        student = {"student": Turn(moves=("student",), loss=self.student_loss, every=self.ratio)}
        return critic | student if self.dm_weight or self.gan_weight else student  # a warm-up needs no critic

    @property
    def needs_images(self) -> bool:
        """Whether texts alone are not enough."""
        return bool(self.gan_weight) or not self.backward_simulation

    @property
    def lpips(self) -> bool:
        """Whether a loss needs n.lpips."""
        return bool(self.regression_weight) and self.regression == "lpips"

    def ema(self):
        return {"student": self.ema_decay} if self.ema_decay else {}

    # ---- the two losses

    def student_loss(self, n, batch, key):
        """0.5 mean |x - sg(x - g)|^2 + w_g softplus(-l(x)) (E10, E11, E15), as a loss that is linear in x."""
        k_gen, k_push = jax.random.split(key)
        loss, logs = 0.0, {}
        if self.dm_weight or self.gan_weight:
            x0 = self.generate(n, batch, k_gen)
            at = jax.lax.stop_gradient(x0)
            (value, slope), logs = jax.lax.stop_gradient(self.push(n, at, batch, k_push))
            loss = value + ((x0 - at) * slope).sum()
        if self.regression_weight:
            logs["regression"] = self.regress(n, batch["pairs"])
            loss = loss + self.regression_weight * logs["regression"]
        return loss, logs

    def push(self, n, x0, batch, key):
        """Value and gradient at x0 of what drives the student. Both terms are needed at x0 alone, and are compared."""
        k_dm, k_gan = jax.random.split(key)
        value, slope, logs = 0.0, jnp.zeros_like(x0), {}
        if self.dm_weight:
            g, seen = self.matching(n, x0, batch, k_dm)
            logs |= {"dm": 0.5 * (g**2).mean(), "dm_gradient": losses.norm(g).mean()} | seen
            value, slope = self.dm_weight * logs["dm"], self.dm_weight * g / g.size
        if self.gan_weight:
            logs["gan"], pull = jax.vjp(lambda x: jax.nn.softplus(-self.logits(n, x, batch, k_gan)).mean(), x0)
            (gan_slope,) = pull(jnp.float32(self.gan_weight))
            if self.dm_weight:
                ours, theirs = losses.norm(gan_slope), losses.norm(slope)
                logs["gan_share"] = (ours / (ours + theirs + 1e-12)).mean()
            value, slope = value + self.gan_weight * logs["gan"], slope + gan_slope
        return (value, slope), logs

    def critic_loss(self, n, batch, key):
        """Denoising of the student's samples, and real against drawn (E12, E13, E16)."""
        k_gen, k_t, k_eps, k_fake, k_real = jax.random.split(key, 5)
        x0 = jax.lax.stop_gradient(self.generate(n, batch, k_gen))
        t = self.random_times(n, k_t, batch, self.fake_range)
        loss, error = denoising(self.fake(n), x0, normal(k_eps, batch["index"], x0.shape[1:]), t, batch["text"])
        logs = {"denoising": loss, "eps_error": self.compared(n, t, error), **statistics("sample", x0)}
        logs |= {} if "imageless" in batch else statistics("real", batch["x0"])
        if self.gan_weight:
            drawn, real = self.logits(n, x0, batch, k_fake), self.logits(n, batch["x0"], batch, k_real)
            gan = jax.nn.softplus(drawn).mean() + jax.nn.softplus(-real).mean()
            logs |= {"gan": gan, "drawn_accuracy": (drawn < 0).mean(), "real_accuracy": (real > 0).mean()}
            loss = loss + self.critic_gan_weight * gan
        return loss, logs

    def regress(self, n, pairs):
        """Distance between what the student makes of a pair's noise and what the teacher's ODE did (DMD, eq. 9)."""
        x0 = self.student(n)(self.start(n, pairs["noise"]), native(n.teacher.schedule, self.times[0]), pairs["text"]).x0
        if self.regression == "l2":
            return losses.mse(x0, pairs["x0"]).mean()
        return n.lpips(n.autoencoder.decode(x0), n.autoencoder.decode(pairs["x0"])).mean()

    # ---- their parts

    def generate(self, n, batch, key):
        """One student call with a gradient, and before it as many without as its time asks for (E4-E6)."""
        k_step, k_noise, k_anew = jax.random.split(key, 3)
        student, index, text = self.student(n), batch["index"], batch["text"]
        times, shape, last = native(n.teacher.schedule, self.times), batch["x0"].shape[1:], len(self.times)
        start = self.start(n, normal(k_noise, index, shape))
        if last == 1:
            return student(start, times[0], text).x0
        if not self.backward_simulation:
            step = jnp.floor(uniform(k_step, index) * last).astype(jnp.int32)
            noised = n.teacher.noise(batch["x0"], normal(k_anew, index, shape), times[step])
            return student(jnp.where(like(step == 0, noised), start, noised), times[step], text).x0
        step = jax.random.randint(k_step, (), 0, last)  # one for the batch, on all devices and hosts
        looking, anew = jax.lax.stop_gradient(student), fresh(k_anew, index, shape)

        def ahead(i, z):
            return n.teacher.noise(looking(z, times[i], text).x0, anew(i), times[i + 1])

        return student(jax.lax.fori_loop(0, step, ahead, start), times[step], text).x0

    def matching(self, n, x0, batch, key):
        """g, the direction in which the student's density exceeds the teacher's at x0 (E8-E10), and what was seen."""
        k_t, k_eps = jax.random.split(key)
        t, eps = self.random_times(n, k_t, batch, self.dm_range), normal(k_eps, batch["index"], x0.shape[1:])
        z_t = n.teacher.noise(x0, eps, t)
        real = n.teacher(z_t, t, batch["text"])
        if self.real_guidance != 1.0:
            real = guide(real, n.teacher(z_t, t, batch["null"]), self.real_guidance)
        fake = self.fake(n)(z_t, t, batch["text"])
        g = fake.x0 - real.x0
        if self.weighting != "none":
            g = g / jnp.maximum(like(jnp.abs(x0 - real.x0).mean(tuple(range(1, x0.ndim))), x0), 1e-6)
        if self.weighting == "dmd1":
            g = g * n.teacher.alpha_sigma(t, x0)[0]
        return g, {"eps_error": losses.mse(fake.eps, eps).mean(), "target_power": (real.x0**2).mean()}

    def compared(self, n, t, error):
        """The mean of those errors whose times are in dm_range: what the student's turn logs as eps_error."""
        first, last = native(n.teacher.schedule, self.dm_range)
        (low, high), (lowest, highest) = self.dm_range, self.fake_range
        return jnp.where((first <= t) & (t <= last), error, 0.0).mean() * (highest - lowest + 1) / (high - low + 1)

    def logits(self, n, x0, batch, key):
        """How real each sample looks behind noise (E14), [b]."""
        judge, t = n.teacher if self.gan_features == "teacher" else self.fake(n), native(n.teacher.schedule, 0)
        if self.gan_noised:
            k_t, k_eps = jax.random.split(key)
            t = self.random_times(n, k_t, batch, self.gan_range)
            x0 = judge.noise(x0, normal(k_eps, batch["index"], x0.shape[1:]), t)
        return n.disc(judge.features(x0, t, batch["text"]))

    def start(self, n, noise):
        """Unit noise at the first time's level: 80 times as large for EDM, as it is for the rest (E4, E5)."""
        schedule = n.teacher.schedule
        return sampling.first_level(schedule.alpha_sigma(native(schedule, self.times))[1], noise)

    def student(self, n, average: bool = False) -> Denoiser:
        return lora.whole(n.teacher, n.student_ema if average and self.ema_decay else n.student)

    def fake(self, n) -> Denoiser:
        return lora.whole(n.teacher, n.fake)

    def random_times(self, n, key, batch, levels):
        """Native times, one per sample, uniform over the levels of a range."""
        low, high = levels
        u = uniform(key, batch["index"])
        return native(n.teacher.schedule, low + jnp.floor(u * (high - low + 1)).astype(jnp.int32))

    # ---- the student in use

    def sample(self, n, noise, batch, key, steps):
        student, schedule = self.student(n, average=True), n.teacher.schedule
        denoise, times = lambda z, t: student(z, t, batch["text"]), native(schedule, self.taken(steps))
        anew = fresh(key, batch["index"], noise.shape[1:])
        return sampling.lcm(denoise, schedule, noise, times, anew, scaling=None)

    def taken(self, steps: int) -> tuple[int, ...]:
        """The levels of so many steps: all that the student has, or every second, third ... of them."""
        if len(self.times) % steps:
            raise ValueError(
                f"a student of method.times={self.times} cannot be sampled in {steps} steps: set sample_steps to "
                f"divisors of {len(self.times)}"
            )
        return self.times[:: len(self.times) // steps]

    def sampling(self, schedule, steps):
        return Sampling(sampler="lcm", timesteps=tuple(map(int, native(schedule, self.taken(steps)))))

    def nfe(self, steps):
        return steps


def denoising(fake, x0, eps, t, text):
    """The loss of fake: mean |out - target|^2 (E13), for EDM's networks weighted (E12); and its error in the
    noise, per sample."""
    pred, (alpha, sigma) = fake(fake.noise(x0, eps, t), t, text), fake.alpha_sigma(t, x0)
    out, target = (diffusion.target(fake.predicts, *x, alpha, sigma) for x in (pred, (x0, eps)))
    loss = losses.mse(out, target)
    if fake.predicts == "x0":
        sigma_data = getattr(fake.module, "sigma_data", 0.5)
        loss = loss * ((alpha / sigma) ** 2 + sigma_data**-2).reshape(loss.shape)
    return loss.mean(), losses.mse(pred.eps, eps)


def statistics(name, x):
    """Mean and mean square: brightness and contrast."""
    x = jax.lax.stop_gradient(x)
    return {f"{name}_mean": x.mean(), f"{name}_power": (x**2).mean()}

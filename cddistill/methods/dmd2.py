"""DMD2: Improved Distribution Matching Distillation (Yin et al., NeurIPS 2024, arXiv:2405.14867).

    x    = student(z_k, t_k, text).x0      z_k: noise, or the student's own sample after k steps from it (sec. 4.5)
    z_t  = alpha_t x + sigma_t eps         t ~ U over noise levels 20 ... 980 of 1000
    g    = (fake(z_t).x0 - teacher(z_t).x0) / mean |x - teacher(z_t).x0|                 eqs. 1-2, the gradient at x
    l(x) = disc(bottleneck of fake(alpha_t x + sigma_t eps'))                            sec. 4.3, real or generated

    every step     fake, disc <- denoising of sg(x)  +  w_c ( softplus(l(sg x)) + softplus(-l(real)) )
    every ratio-th student    <- g  +  w_g d softplus(-l(x)) / dx                        two time scales, sec. 4.2

There are no regression pairs. `fake` learns the score of the student's samples and starts as a copy of the teacher;
fake and `disc`, which reads its features, are the critic. The critic's turn is first, on samples from before the
student's update, as in the released code. Labels E1 ... here and T1 ... in tests are those of docs/dmd2.md.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from cddistill import health, losses, sampling
from cddistill.diffusion import guide, like
from cddistill.method import Generator, Requires, Turn, normal, step_noise, uniform
from cddistill.models import adapter, discriminator, lora
from cddistill.models.adapter import Conditioning
from cddistill.models.lora import LoraLayers
from cddistill.models.schedulers import Sampling
from cddistill.net import Denoiser
from cddistill.perceptual import lpips
from cddistill.sampling import Level, LevelRange, level_to_time
from cddistill.typed import FALLING, SOME, Count, Decay, NonNegative, Positive, Width


@dataclasses.dataclass(frozen=True)
class DMD2(Generator):
    """Hyper-parameters of DMD2; the defaults are the paper's for ImageNet-64, "ours" marks additions."""

    student_timesteps: Annotated[tuple[Level, ...], SOME, FALLING] = (999,)  # noise levels; SDXL: (399,) in one step,
    # (999, 749, 499, 249) in four
    adapter: Conditioning = "none"  # of a conditional teacher: "controlnet", "mu_blend" or "concat" (ours)
    ratio: Count = 5  # critic updates per student update (paper: 5; SD 1.5: 10)
    real_guidance: NonNegative = 1.0  # scale of the teacher's score; fake is not guided (SD 1.5: 1.75; SDXL: 8)
    dm_weight: NonNegative = 1.0  # 0: only the GAN (ablation)
    gan_weight: NonNegative = 3e-3  # w_g, in the student's loss (SD 1.5: 1e-3; SDXL: 5e-3); 0 = no GAN
    critic_gan_weight: NonNegative = 1e-2  # w_c, in the critic's loss (released code: 1e-2)
    gan_features: Literal["fake", "teacher"] = "fake"  # whose bottleneck disc reads; "teacher": reimplementations
    gan_noised: bool = True  # diffusion GAN; False: disc sees clean samples, at level 0
    backward_simulation: bool = True  # False: later steps start from noised real data (ablation)
    weighting: Literal["dmd", "dmd1", "none"] = "dmd"  # of g, as above; "dmd1" also has DMD's factor alpha_t
    dm_float32: Literal["none", "fake", "both"] = "none"  # nets of g that compute in float32 whatever config.dtype
    # is; "fake": released code for SD
    dm_range: LevelRange = (20, 980)  # noise levels of g, both ends included
    fake_range: LevelRange = (0, 999)  # noise levels of fake's training
    gan_range: LevelRange = (0, 999)  # noise levels of disc
    regression_weight: NonNegative = 0.0  # on data.pairs: SDXL's warm-up (1, others 0), DMD's own loss (0.25; ablation)
    regression: Literal["lpips", "l2"] = "lpips"  # on decoded pixels, or "l2" on x0
    student_lora: LoraLayers = "none"  # the student as a LoRA of the teacher's "attention" or "blocks" layers
    fake_lora: LoraLayers = "none"  # the same for fake (ours); then teacher, student and fake share the base weights
    lora_rank: Width = 64  # released code: 64
    lora_alpha: Positive = 8.0  # released code: 8; the update is scaled by alpha / rank
    ema_decay: Decay = 0.0  # per step, of the student that is evaluated (ours); 0 = the student itself, as published

    def __post_init__(self):
        if not self.dm_weight and not self.gan_weight and not self.regression_weight:
            raise ValueError("method.dm_weight, gan_weight and regression_weight are all 0: the student has no loss")
        if self.adapter != "none" and (self.regression_weight or {self.student_lora, self.fake_lora} != {"none"}):
            raise ValueError(
                f"method.adapter={self.adapter!r} goes with neither regression_weight (pairs have no condition) nor "
                "student_lora and fake_lora: set those to 0 and 'none'"
            )

    def init(self, key, frozen, batch):
        """Student and fake are copies of the teacher, or LoRAs of it with zero update; disc is random.

        Raises ValueError for a condition that the teacher does not take.
        """
        adapter.check_conditional(frozen, self.adapter, batch)
        teacher, keys = frozen["teacher"], jax.random.split(key, 3)
        nets = {"student": self.copy(teacher, self.student_lora, keys[0])}
        if "critic" in self.turns():
            nets["fake"] = self.copy(teacher, self.fake_lora, keys[1])
        nets = adapter.copied(self.adapter, nets, frozen)
        if self.gan_weight:
            bottleneck = lambda n, b: n.features(b["x0"], level_to_time(n.schedule, 0), b["text"])
            whole = self.teacher(SimpleNamespace(**frozen))
            features = jax.eval_shape(bottleneck, whole, adapter.with_condition(self.adapter, batch))
            nets["disc"] = discriminator.make_head(features, keys[2])
        return nets

    def copy(self, teacher, layers: str, key):
        """A trainable copy of the teacher, or a LoRA for these of its layers."""
        if layers == "none":
            return jax.tree.map(jnp.copy, teacher)
        return lora.make_lora_of(teacher, layers, key, self.lora_rank, self.lora_alpha)

    def turns(self):
        disc = ("disc",) if self.gan_weight else ()
        fake, student = (adapter.parts(self.adapter, name) for name in ("fake", "student"))
        critic = {"critic": Turn(moves=(*fake, *disc), loss=self.critic_loss)}
        student = {"student": Turn(moves=student, loss=self.student_loss, every=self.ratio)}
        return critic | student if self.dm_weight or self.gan_weight else student  # the warm-up has no critic

    def requires(self):
        use_lpips = bool(self.regression_weight) and self.regression == "lpips"
        return Requires(
            nets={"lpips": functools.partial(lpips.load, "vgg")} if use_lpips else {},
            images=bool(self.gan_weight) or not self.backward_simulation,
            pairs=bool(self.regression_weight),
            text=self.real_guidance != 1.0,
            condition=adapter.condition_space(self.adapter),
        )

    def exports(self):
        return dict(zip(("unet", "controlnet"), adapter.parts(self.adapter, "student"), strict=False))

    def health_rules(self):
        rules = health.COLLAPSE | health.CRITIC | health.DISTRIBUTION_MATCHING | health.DISCRIMINATOR
        return super().health_rules() | rules

    def ema(self):
        return dict.fromkeys(adapter.parts(self.adapter, "student"), self.ema_decay) if self.ema_decay else {}

    # ---- the two losses

    def student_loss(self, n, batch, key):
        """0.5 mean |x - sg(x - g)|^2 + w_g softplus(-l(x)) (E10, E11, E15), linearised at the sample x.

        Value and gradient are those of the loss; the gradient at x is computed once, in `student_gradient`.
        """
        k_gen, k_gradient = jax.random.split(key)
        batch = adapter.with_condition(self.adapter, batch)
        loss, logs = 0.0, {}
        if self.dm_weight or self.gan_weight:
            x0 = self.generate(n, batch, k_gen)
            fixed = jax.lax.stop_gradient(x0)
            (value, slope), logs = jax.lax.stop_gradient(self.student_gradient(n, fixed, batch, k_gradient))
            loss = value + ((x0 - fixed) * slope).sum()
        if self.regression_weight:
            logs["regression"] = self.regress(n, batch["pairs"])
            loss = loss + self.regression_weight * logs["regression"]
        return loss, logs

    def student_gradient(self, n, x0, batch, key):
        """((value, gradient at x0), metrics) of the student's two terms; "gan_share" compares their gradients."""
        k_dm, k_gan = jax.random.split(key)
        value, slope, logs = 0.0, jnp.zeros_like(x0), {}
        if self.dm_weight:
            g, metrics = self.matching(n, x0, batch, k_dm)
            logs |= {"dm": 0.5 * (g**2).mean(), "dm_gradient": losses.norm(g).mean()} | metrics
            value, slope = self.dm_weight * logs["dm"], self.dm_weight * g / g.size
        if self.gan_weight:
            logs["gan"], vjp = jax.vjp(lambda x: jax.nn.softplus(-self.logits(n, x, batch, k_gan)).mean(), x0)
            (gan_slope,) = vjp(jnp.float32(self.gan_weight))
            if self.dm_weight:
                gan_norm = losses.norm(gan_slope)
                logs["gan_share"] = (gan_norm / (gan_norm + losses.norm(slope) + 1e-12)).mean()
            value, slope = value + self.gan_weight * logs["gan"], slope + gan_slope
        return (value, slope), logs

    def critic_loss(self, n, batch, key):
        """Denoising of the student's samples (E12, E13) and the GAN loss of real and generated images (E16)."""
        k_gen, k_t, k_eps, k_fake, k_real = jax.random.split(key, 5)
        batch = adapter.with_condition(self.adapter, batch)
        x0 = jax.lax.stop_gradient(self.generate(n, batch, k_gen))
        t = self.random_timesteps(n, k_t, batch, self.fake_range)
        eps = normal(k_eps, batch["index"], x0.shape[1:])
        loss, error = losses.denoising(self.fake(n), x0, eps, t, batch["text"])
        logs = {"denoising": loss, "eps_error": self.mean_in_dm_range(n, t, error), **health.statistics("sample", x0)}
        logs |= {} if "imageless" in batch else health.statistics("real", batch["x0"])
        if self.gan_weight:
            generated = self.logits(n, x0, batch, k_fake)
            real = self.logits(n, batch["x0"], batch, k_real)
            gan = jax.nn.softplus(generated).mean() + jax.nn.softplus(-real).mean()
            logs |= {"gan": gan, "generated_accuracy": (generated < 0).mean(), "real_accuracy": (real > 0).mean()}
            loss = loss + self.critic_gan_weight * gan
        return loss, logs

    def regress(self, n, pairs):
        """Distance between the images of student and teacher for the noise of the same pair (DMD, eq. 9)."""
        t = level_to_time(n.teacher.schedule, self.student_timesteps[0])
        x0 = self.student(n)(self.start(n, pairs["noise"]), t, pairs["text"]).x0
        if self.regression == "l2":
            return losses.mse(x0, pairs["x0"]).mean()
        return n.lpips(n.autoencoder.decode(x0), n.autoencoder.decode(pairs["x0"])).mean()

    # ---- parts of the losses

    def generate(self, n, batch, key):
        """A sample x0 of the student at one of its timesteps, after the steps before it without a gradient (E4-E6)."""
        k_step, k_noise, k_steps = jax.random.split(key, 3)
        student, index, text = self.student(n), batch["index"], batch["text"]
        timesteps = level_to_time(n.teacher.schedule, self.student_timesteps)
        count, shape = len(self.student_timesteps), batch["x0"].shape[1:]
        start = self.start(n, normal(k_noise, index, shape))
        if count == 1:
            return student(start, timesteps[0], text).x0
        if not self.backward_simulation:
            i = jnp.floor(uniform(k_step, index) * count).astype(jnp.int32)
            noised = n.teacher.noise(batch["x0"], normal(k_steps, index, shape), timesteps[i])
            return student(jnp.where(like(i == 0, noised), start, noised), timesteps[i], text).x0
        last = jax.random.randint(k_step, (), 0, count)  # one for the batch, on all devices and hosts
        frozen_student = jax.lax.stop_gradient(student)
        noise_of = step_noise(k_steps, index, shape)

        def simulate(i, z):
            return n.teacher.noise(frozen_student(z, timesteps[i], text).x0, noise_of(i), timesteps[i + 1])

        return student(jax.lax.fori_loop(0, last, simulate, start), timesteps[last], text).x0

    def matching(self, n, x0, batch, key):
        """(g, metrics): g is the gradient of distribution matching at x0 (E8-E10), of x0's shape."""
        k_t, k_eps = jax.random.split(key)
        t = self.random_timesteps(n, k_t, batch, self.dm_range)
        eps = normal(k_eps, batch["index"], x0.shape[1:])
        z_t = n.teacher.noise(x0, eps, t)
        teacher = self.teacher(n).in_float32() if self.dm_float32 == "both" else self.teacher(n)
        real = teacher(z_t, t, batch["text"])
        if self.real_guidance != 1.0:  # guidance drops the text and keeps the condition
            real = guide(real, teacher(z_t, t, batch["null"]), self.real_guidance)
        fake_net = self.fake(n) if self.dm_float32 == "none" else self.fake(n).in_float32()
        fake = fake_net(z_t, t, batch["text"])
        g = fake.x0 - real.x0
        if self.weighting != "none":
            g = g / jnp.maximum(like(jnp.abs(x0 - real.x0).mean(tuple(range(1, x0.ndim))), x0), 1e-6)
        if self.weighting == "dmd1":
            g = g * n.teacher.alpha_sigma(t, x0)[0]
        return g, {"eps_error": losses.mse(fake.eps, eps).mean(), "target_power": (real.x0**2).mean()}

    def mean_in_dm_range(self, n, t, error):
        """The mean of the errors [b] with t in dm_range, comparable to the eps_error of the student's turn."""
        first, last = level_to_time(n.teacher.schedule, self.dm_range)
        (low, high), (lowest, highest) = self.dm_range, self.fake_range
        return jnp.where((first <= t) & (t <= last), error, 0.0).mean() * (highest - lowest + 1) / (high - low + 1)

    def logits(self, n, x0, batch, key):
        """disc's logits [b] for samples x0, noised to a random level if `gan_noised` (E14)."""
        net = self.teacher(n) if self.gan_features == "teacher" else self.fake(n)
        t = level_to_time(n.teacher.schedule, 0)
        if self.gan_noised:
            k_t, k_eps = jax.random.split(key)
            t = self.random_timesteps(n, k_t, batch, self.gan_range)
            x0 = net.noise(x0, normal(k_eps, batch["index"], x0.shape[1:]), t)
        return n.disc(net.features(x0, t, batch["text"]))

    def start(self, n, noise):
        """Unit noise scaled to the first timestep: times 80 for EDM, unchanged for the others (E4, E5)."""
        schedule = n.teacher.schedule
        return sampling.scale_noise(schedule.alpha_sigma(level_to_time(schedule, self.student_timesteps))[1], noise)

    def student(self, n, average: bool = False) -> Denoiser:
        return lora.merge_if_lora(n.teacher, adapter.whole(n, self.adapter, "student", average and self.ema_decay > 0))

    def fake(self, n) -> Denoiser:
        return lora.merge_if_lora(n.teacher, adapter.whole(n, self.adapter, "fake"))

    def teacher(self, n) -> Denoiser:
        return adapter.teacher(n, self.adapter)

    def random_timesteps(self, n, key, batch, levels):
        """Native timesteps [b], uniform over a range of noise levels, both ends included."""
        low, high = levels
        u = uniform(key, batch["index"])
        return level_to_time(n.teacher.schedule, low + jnp.floor(u * (high - low + 1)).astype(jnp.int32))

    # ---- sampling

    def sample(self, n, noise, batch, step_noise, steps):
        student, batch = self.student(n, average=True), adapter.with_condition(self.adapter, batch)
        denoise = lambda z, t: student(z, t, batch["text"])
        timesteps = level_to_time(n.teacher.schedule, self.sampling_levels(steps))
        return sampling.lcm(denoise, n.teacher.schedule, noise, timesteps, step_noise, scaling=None)

    def sampling_levels(self, steps: int) -> tuple[int, ...]:
        """The noise levels of `steps` steps: every n-th one of the student. Raises ValueError if they do not divide."""
        if len(self.student_timesteps) % steps:
            raise ValueError(
                f"a student of method.student_timesteps={self.student_timesteps} cannot be sampled in {steps} steps: "
                f"set sample_steps to divisors of {len(self.student_timesteps)}"
            )
        return self.student_timesteps[:: len(self.student_timesteps) // steps]

    def sampling(self, schedule, steps):
        return Sampling(sampler="lcm", timesteps=tuple(map(int, level_to_time(schedule, self.sampling_levels(steps)))))

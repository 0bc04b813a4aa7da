"""CoDi: Conditional Diffusion Distillation (Mei et al., CVPR 2024, arXiv:2310.01407).

    z_t    = alpha_t x0 + sigma_t eps                                   the student: teacher + condition branch
    x^, e^ = student(z_t, t, cond)
    z_s    = sg( alpha_s x^ + sigma_s eps )     s = t - dt              PREv predictor, eq. 7 (or DDIM: e^ for eps)
    loss   = || e_ema(z_s, s, cond) - e^ ||^2  +  || x^ - x0 ||^2       noise consistency + conditional signal, eq. 8

There is one stage and one turn: the pretrained teacher is not fine-tuned to a conditional diffusion model first. CoDi
trains backbone and branch, PE-CoDi (`freeze_backbone`) only the branch. The paper's text and the released code differ
in almost every detail, so each is an option; the defaults are the paper's, preset "released" has the code's values.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from cddistill import health, losses, sampling
from cddistill.diffusion import Prediction, guide, like
from cddistill.method import Generator, Requires, Turn, drop_text, normal, uniform
from cddistill.models import adapter
from cddistill.models.adapter import Conditioning
from cddistill.models.guidance import GuidanceRange
from cddistill.models.schedulers import Sampling
from cddistill.net import Adapted
from cddistill.perceptual import latent_lpips, lpips
from cddistill.typed import Decay, NonNegative, Positive, Share, within

RELEASED = {  # the released code's values where it differs from the paper
    "ode": "teacher", "noise": "predicted", "space": "x0", "boundary": "lcm", "shared_t": False, "delta_t": 20,
    "grid_size": 50,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CoDi(Generator):
    """Hyper-parameters of CoDi; "ours" marks values that the paper does not give."""

    freeze_backbone: bool = False  # PE-CoDi: train the branch only (sec. 3.4)
    adapter: Conditioning = "controlnet"  # zero convolutions (the figure, the code); "mu_blend" (eq. 5 of the text);
    # "concat"; "none": class or text as the only condition (ours)
    ode: Literal["adapted", "teacher"] = "adapted"  # the net that predicts x^ of z_s: the student (paper) or the
    # frozen "teacher" (released code)
    noise: Literal["real", "predicted"] = "real"  # of z_s: the "real" eps (PREv, eq. 7) or the "predicted" one
    # (DDIM, the paper's appendix)
    space: Literal["eps", "x0"] = "eps"  # of the consistency term: noise (paper) or "x0" (released code)
    boundary: Literal["none", "lcm"] = "none"  # or "lcm": c_skip z + c_out x^ with f(z, 0) = z; for space="x0" only
    shared_t: bool = True  # one t for the whole batch (paper: better at 1-4 steps) or one per sample
    delta_t: Annotated[int, within(least=1, below=1000)] = 1  # t - s, thousandths of the schedule (paper: "empirically
    # 1"; released code: 20)
    grid_size: Annotated[int, within(off=0, least=2, most=1000)] = 0  # number of timesteps of a grid for t, as in
    # the released code (50); 0 = every t
    distance: losses.Distance = "l2"  # d_eps of the consistency term
    signal: Literal["l2", "pixel_l2", "reencoded_l2", "lpips", "latent_lpips"] = "l2"  # d_x: in latent space (paper's
    # choice), on decoded pixels, re-encoded, LPIPS on pixels, or LatentLPIPS, which decodes nothing (ours)
    metric: str = ""  # weights of latent_lpips: a file, or a pipeline that has its own, such as "pocket"
    consistency_weight: NonNegative = 1.0  # of the first term of eq. 8 (paper: 1)
    signal_weight: NonNegative = 1.0  # of the second (paper: 1); 0 = without it, as in diffusers PR 8313 (the authors')
    snr_gamma: NonNegative = 0.0  # min-SNR weight of the consistency term; 0 = off (released code, off by default)
    guidance_range: GuidanceRange = (1.0, 1.0)  # of training: scale ~ U per step, both predictions; (1, 1) = off
    guided_ode: bool = False  # with ode="teacher": z_s from the teacher guided at that scale too, as LCM does (ours;
    # published code leaves the teacher unguided); the student's own x^ is always the guided one
    guidance: NonNegative = 1.0  # guidance scale of sampling; 1 = none
    grid_power: Positive = 1.0  # of the sampling timesteps, see `sampling.timesteps`; 1 = uniform (ours)
    text_dropout: Share = 0.0  # share of samples with the null text (ours)
    ema_decay: Decay = 0.999  # per step, of the target and the final weights (released code; the paper gives none)

    mutable_on_resume = ("guidance", "grid_power")
    paths = ("metric",)
    presets = {"paper": {}, "released": RELEASED}

    def __post_init__(self):
        adapter.moves(self.adapter, self.freeze_backbone)
        if self.ode == "teacher" and self.space == "eps":
            raise ValueError(
                "method.ode='teacher' with method.space='eps' is incoherent: noise consistency needs trajectories that "
                "are straight in (alpha, sigma), and the frozen teacher's are curved; use space='x0' or ode='adapted'"
            )
        if self.boundary == "lcm" and self.space == "eps":
            raise ValueError("method.boundary='lcm' requires x0 = z at t = 0, not noise = z: use space='x0'")
        if self.guided_ode and (self.ode != "teacher" or self.guidance_range == (1.0, 1.0)):
            raise ValueError("method.guided_ode guides the frozen teacher: set ode='teacher' and a guidance_range")

    def init(self, key, frozen, batch):
        """A copy of the teacher, and a branch: a copy of its encoder with zero output, or a loaded ControlNet."""
        if self.boundary == "lcm":
            sampling.check_boundary(frozen["teacher"].schedule)
        return adapter.student_nets(frozen, key, self.adapter, batch, self.freeze_backbone)

    def requires(self):
        nets = {
            "lpips": {"lpips": functools.partial(lpips.load, "vgg")},
            "latent_lpips": {"latent_lpips": functools.partial(latent_lpips.required, "method.signal", self.metric)},
        }
        outlines = {"latent_lpips": functools.partial(latent_lpips.outline, self.metric)}
        return Requires(nets.get(self.signal, {}), outlines, condition=adapter.condition_space(self.adapter))

    def exports(self):
        return adapter.exports(self.adapter, self.freeze_backbone)

    def health_rules(self):
        return super().health_rules() | health.COLLAPSE

    def turns(self):
        return {"student": Turn(moves=adapter.moves(self.adapter, self.freeze_backbone), loss=self.loss)}

    def ema(self):
        return dict.fromkeys(self.turns()["student"].moves, self.ema_decay)

    def loss(self, n, batch, key):
        """eq. 8: noise consistency + conditional signal, mean over the batch."""
        k_t, k_eps, k_w, k_drop = jax.random.split(key, 4)
        x0 = batch["x0"]
        cond = adapter.condition(self.adapter, batch)
        schedule = n.teacher.schedule
        t, s = self.random_timesteps(schedule, k_t, batch["index"])
        eps = normal(k_eps, batch["index"], x0.shape[1:])
        text = drop_text(k_drop, batch, self.text_dropout)
        w = jax.random.uniform(k_w, (), minval=self.guidance_range[0], maxval=self.guidance_range[1])

        def view(net, z, t):  # guidance drops the text and keeps the condition image
            pred = net(z, t, text, cond)
            if self.guidance_range == (1.0, 1.0):
                return pred
            return guide(pred, net(z, t, batch["null"], cond), w)

        z_t = n.teacher.noise(x0, eps, t)
        online = view(self.student(n), z_t, t)
        z_s = self.jump(n, online, z_t, t, s, eps, text, batch["null"], w)
        anchor = jax.lax.stop_gradient(view(self.target(n), z_s, s))  # also stops the gradient through z_s

        consistency = self.consistency(schedule, online, z_t, t, anchor, z_s, s)
        signal = self.signal_distance(n, self.bounded(online.x0, z_t, t), x0).mean()  # of what is sampled
        loss = self.consistency_weight * consistency.mean() + self.signal_weight * signal
        return loss, {"consistency": consistency.mean(), "signal": signal}

    def student(self, n) -> Adapted:
        """The network that is trained."""
        return adapter.student(n, self.freeze_backbone)

    def target(self, n) -> Adapted:
        """The EMA of the student, with the same frozen backbone in PE-CoDi."""
        return adapter.student(n, self.freeze_backbone, average=True)

    def random_timesteps(self, schedule, key, index):
        """Native timesteps t in [dt, T] and s = t - dt: one for the batch (shape [1]) or one per sample ([b])."""
        u = jax.random.uniform(key, (1,)) if self.shared_t else uniform(key, index)
        if self.grid_size:  # released code: k ~ U{0..L-1}, t = k T/L, s = max(k - 1, 0) T/L
            k = jnp.floor(u * self.grid_size)
            return self.grid_timestep(schedule, k), self.grid_timestep(schedule, jnp.maximum(k - 1, 0))
        du = self.delta_t / 1000
        u = du + (jnp.floor(u * (1000 - self.delta_t)) + 1) / 1000
        return schedule.at(u), schedule.at(u - du)

    def grid_timestep(self, schedule, k):
        """The k-th timestep of the released code's grid, 0, T/L, 2T/L, ... ("leading" spacing)."""
        return schedule.at(k / self.grid_size + 1e-3)

    def jump(self, n, online: Prediction, z_t, t, s, eps, text, null=None, scale=1.0):
        """z_s: one step from t to s, with x^ of the student (paper) or of the frozen teacher; see `ode` and `noise`."""
        source = online if self.ode == "adapted" else n.teacher(z_t, t, text)
        if self.guided_ode:
            source = guide(source, n.teacher(z_t, t, null), scale)
        return n.teacher.noise(source.x0, eps if self.noise == "real" else source.eps, s)

    def consistency(self, schedule, online, z_t, t, anchor, z_s, s):
        """The first term of eq. 8, one number per sample."""
        if self.space == "eps":
            d = losses.DISTANCES[self.distance](online.eps, anchor.eps)
        else:
            at_t = self.bounded(online.x0, z_t, t)
            at_s = self.bounded(anchor.x0, z_s, s)
            d = losses.DISTANCES[self.distance](at_t, at_s)
        return d * losses.min_snr(*schedule.alpha_sigma(t), self.snr_gamma) if self.snr_gamma else d

    def bounded(self, x0, z, t):
        """x^, or c_skip z + c_out x^ with boundary="lcm" (Luo et al. 2023, eq. 9; sigma_d = 0.5, t scaled by 10)."""
        return x0 if self.boundary == "none" else sampling.boundary(x0, z, like(t.astype(jnp.float32), x0))

    def signal_distance(self, n, x0_hat, x0):
        """The second term of eq. 8, one number per sample: the four choices of the paper's figure 2, and ours."""
        if self.signal == "l2":
            return losses.mse(x0_hat, x0)
        if self.signal == "latent_lpips":
            return n.latent_lpips(x0_hat, x0)
        decode = n.autoencoder.decode
        if self.signal == "pixel_l2":
            return losses.mse(decode(x0_hat), decode(x0))
        if self.signal == "reencoded_l2":
            return losses.mse(n.autoencoder.encode(decode(x0_hat)), x0)
        return n.lpips(decode(x0_hat), decode(x0))

    def sample(self, n, noise, batch, step_noise, steps):
        student = self.target(n)
        schedule = n.teacher.schedule
        cond = adapter.condition(self.adapter, batch)

        def denoise(z, t, text):
            pred = student(z, t, text, cond)
            return pred._replace(x0=self.bounded(pred.x0, z, jnp.broadcast_to(t, z.shape[:1])))

        guided = sampling.guided(denoise, batch["text"], batch["null"], self.guidance)
        return sampling.ddim(guided, schedule, noise, self.sampling_timesteps(schedule, steps))

    def sampling_timesteps(self, schedule, steps: int):
        """Trained timesteps [steps], strictly decreasing from the largest; the last one is above 0.

        Raises ValueError if the grid of training is too small.
        """
        if not self.grid_size:
            return sampling.timesteps(schedule, steps, self.grid_power)
        size = self.grid_size
        stride = next((r for r in (-(-size // steps), size // steps) if r and (steps - 1) * r < size - 1), None)
        if stride is None:
            raise ValueError(f"{steps} steps do not fit a grid of {size} timesteps; at most {size - 1}")
        return self.grid_timestep(schedule, size - 1 - stride * jnp.arange(steps))

    def sampling(self, schedule, steps):
        if self.boundary == "lcm":
            return None
        return Sampling(timesteps=tuple(map(int, self.sampling_timesteps(schedule, steps))), guidance=self.guidance)

    def nfe(self, steps):
        return steps * sampling.evaluations(self.guidance)

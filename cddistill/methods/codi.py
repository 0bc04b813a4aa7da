"""CoDi: Conditional Diffusion Distillation (Mei et al., CVPR 2024, arXiv:2310.01407).

    z_t    = alpha_t x0 + sigma_t eps                                   the student: teacher + condition branch
    x^, e^ = student(z_t, t, cond)
    z_s    = sg( alpha_s x^ + sigma_s eps )     s = t - dt              PREv predictor, eq. 7 (or DDIM: e^ for eps)
    loss   = || e_ema(z_s, s, cond) - e^ ||^2  +  || x^ - x0 ||^2       noise consistency + conditional signal, eq. 8

One stage, one turn: the pretrained teacher never becomes a conditional diffusion model first. CoDi trains backbone and
branch; PE-CoDi (`freeze_backbone`) the branch alone. The paper's text and the released code disagree on almost every
detail, so each is an option; the defaults are the paper's, `codi_released` is the code's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cddistill import losses, sampling
from cddistill.diffusion import Prediction, guide, like
from cddistill.method import Turn, check_choices, drop_text, normal, uniform
from cddistill.models import adapter
from cddistill.models.schedulers import Sampling
from cddistill.net import Adapted

CHOICES = {
    "adapter": ("none", *adapter.ADAPTERS),
    "ode": ("adapted", "teacher"),
    "noise": ("real", "predicted"),
    "space": ("eps", "x0"),
    "boundary": ("none", "lcm"),
    "distance": tuple(losses.DISTANCES),
    "signal": ("l2", "pixel_l2", "reencoded_l2", "lpips"),
}


@dataclasses.dataclass(frozen=True)
class CoDi:
    """Hyper-parameters of CoDi; "ours" marks what the paper does not give."""

    freeze_backbone: bool = False  # PE-CoDi: train the branch only (sec. 3.4)
    adapter: str = "controlnet"  # zero convolutions (the figure, the code); "mu_blend" (eq. 5 of the text); "concat";
    # "none": the class or text is the only condition (ours)
    ode: str = "adapted"  # whose x^ makes z_s: the student itself (paper) or the frozen "teacher" (released code)
    noise: str = "real"  # in z_s: the "real" eps (PREv, eq. 7) or the "predicted" one (DDIM, the paper's appendix)
    space: str = "eps"  # of the consistency term: noise (paper) or "x0" (released code)
    boundary: str = "none"  # or "lcm": c_skip z + c_out x^ with f(z, 0) = z; for space="x0" only
    shared_t: bool = True  # one t for the whole batch (paper: better at 1-4 steps) or one per sample
    delta_t: int = 1  # t - s, thousandths of the schedule (paper: "empirically 1"; released code: 20)
    grid_size: int = 0  # restrict t to a grid of that many times, as the released code does (50); 0 = every t
    distance: str = "l2"  # d_eps of the consistency term
    signal: str = "l2"  # d_x: in latent space (paper's choice), on decoded pixels, re-encoded, or LPIPS on pixels
    consistency_weight: float = 1.0
    signal_weight: float = 1.0
    snr_gamma: float = 0.0  # min-SNR weight of the consistency term; 0 = off (released code, off by default)
    guidance_range: tuple[float, float] = (1.0, 1.0)  # CFG-aware: w ~ U per step, in both predictions; (1, 1) = off
    guidance: float = 1.0  # when sampling; 1 = none
    grid_power: float = 1.0  # of the sampling times, see `sampling.times`; 1 = even (ours)
    text_dropout: float = 0.0  # share of samples that see the null text (ours)
    ema_decay: float = 0.999  # of the target and the final weights (released code; the paper gives none)

    def __post_init__(self):
        check_choices(self, CHOICES)
        adapter.moves(self.adapter, self.freeze_backbone)
        if self.ode == "teacher" and self.space == "eps":
            raise ValueError(
                "method.ode='teacher' with method.space='eps' is incoherent: noise consistency asks for trajectories "
                "straight in (alpha, sigma), and the frozen teacher's are curved; use space='x0', or ode='adapted'"
            )
        if self.boundary == "lcm" and self.space == "eps":
            raise ValueError("method.boundary='lcm' would equate the noise at t = 0 with the data; it needs space='x0'")

    def init(self, key, frozen, batch):
        """The teacher, and a branch that starts as a copy of its encoder and adds nothing (or a ControlNet)."""
        return adapter.student_nets(frozen, key, self.adapter, batch, self.freeze_backbone)

    @property
    def lpips(self) -> bool:
        """Whether a loss needs n.lpips."""
        return self.signal == "lpips"

    def turns(self):
        return {"student": Turn(moves=adapter.moves(self.adapter, self.freeze_backbone), loss=self.loss)}

    def ema(self):
        return dict.fromkeys(self.turns()["student"].moves, self.ema_decay)

    def loss(self, n, batch, key):
        k_t, k_eps, k_w, k_drop = jax.random.split(key, 4)
        x0, cond, index = batch["x0"], self.picture(batch), batch["index"]
        schedule = n.teacher.schedule
        t, s = self.times(schedule, k_t, index)
        eps = normal(k_eps, index, x0.shape[1:])
        text = drop_text(k_drop, batch, self.text_dropout)
        w = jax.random.uniform(k_w, (), minval=self.guidance_range[0], maxval=self.guidance_range[1])

        def view(net, z, t):  # both halves keep the condition image; only the text is dropped
            pred = net(z, t, text, cond)
            if self.guidance_range == (1.0, 1.0):
                return pred
            return guide(pred, net(z, t, batch["null"], cond), w)

        z_t = n.teacher.noise(x0, eps, t)
        online = view(self.student(n), z_t, t)
        z_s = self.jump(n, online, z_t, t, s, eps, text)
        anchor = jax.lax.stop_gradient(view(self.target(n), z_s, s))  # and with it z_s, which the student made

        consistency = self.consistency(schedule, online, z_t, t, anchor, z_s, s)
        signal = self.signal_distance(n, online.x0, x0).mean()
        loss = self.consistency_weight * consistency.mean() + self.signal_weight * signal
        return loss, {"consistency": consistency.mean(), "signal": signal}

    def picture(self, batch):
        """The condition image, if there is one."""
        return None if self.adapter == "none" else batch["cond"]

    def student(self, n) -> Adapted:
        """The network being trained."""
        return adapter.student(n, self.freeze_backbone)

    def target(self, n) -> Adapted:
        """Its exponential moving average; the frozen backbone of PE-CoDi is shared."""
        return adapter.student(n, self.freeze_backbone, average=True)

    def times(self, schedule, key, index):
        """t in [dt, T] and s = t - dt, native times: one for the batch (shape [1]) or one per sample ([b])."""
        u = jax.random.uniform(key, (1,)) if self.shared_t else uniform(key, index)
        if self.grid_size:  # released code: k ~ U{0..L-1}, t = k T/L, s = max(k - 1, 0) T/L
            k = jnp.floor(u * self.grid_size)
            return self.grid_time(schedule, k), self.grid_time(schedule, jnp.maximum(k - 1, 0))
        du = self.delta_t / 1000
        u = du + (jnp.floor(u * (1000 - self.delta_t)) + 1) / 1000
        return schedule.at(u), schedule.at(u - du)

    def grid_time(self, schedule, k):
        """The k-th time of the released code's grid, 0, T/L, 2T/L, ... ("leading" spacing)."""
        return schedule.at(k / self.grid_size + 1e-3)

    def jump(self, n, online: Prediction, z_t, t, s, eps, text):
        """z_s: one step from t to s along the ODE of the student itself (paper) or of the frozen teacher."""
        source = online if self.ode == "adapted" else n.teacher(z_t, t, text)
        return n.teacher.noise(source.x0, eps if self.noise == "real" else source.eps, s)

    def consistency(self, schedule, online, z_t, t, anchor, z_s, s):
        """First term of eq. 8, per sample."""
        if self.space == "eps":
            d = losses.DISTANCES[self.distance](online.eps, anchor.eps)
        else:
            at_t, at_s = self.bounded(online.x0, z_t, t), self.bounded(anchor.x0, z_s, s)
            d = losses.DISTANCES[self.distance](at_t, at_s)
        return d * losses.min_snr(*schedule.alpha_sigma(t), self.snr_gamma) if self.snr_gamma else d

    def bounded(self, x0, z, t):
        """c_skip z + c_out x^ (Luo et al. 2023, eq. 9, with sigma_d = 0.5 and time scaled by 10): f(z, 0) = z."""
        return x0 if self.boundary == "none" else sampling.boundary(x0, z, like(t.astype(jnp.float32), x0))

    def signal_distance(self, n, x0_hat, x0):
        """Second term of eq. 8, per sample: the four choices of the paper's figure 2."""
        if self.signal == "l2":
            return losses.mse(x0_hat, x0)
        decode = n.autoencoder.decode
        if self.signal == "pixel_l2":
            return losses.mse(decode(x0_hat), decode(x0))
        if self.signal == "reencoded_l2":
            return losses.mse(n.autoencoder.encode(decode(x0_hat)), x0)
        return n.lpips(decode(x0_hat), decode(x0))

    def sample(self, n, noise, batch, key, steps):
        student, schedule = self.target(n), n.teacher.schedule

        def denoise(z, t, text):
            pred = student(z, t, text, self.picture(batch))
            return pred._replace(x0=self.bounded(pred.x0, z, jnp.broadcast_to(t, z.shape[:1])))

        guided = sampling.guided(denoise, batch["text"], batch["null"], self.guidance)
        return sampling.ddim(guided, schedule, noise, self.sample_times(schedule, steps))

    def sample_times(self, schedule, steps: int):
        """The first `steps` of a strictly decreasing grid of trained times, the largest first and the last above 0."""
        if not self.grid_size:
            return sampling.times(schedule, steps, self.grid_power)
        size = self.grid_size
        stride = next((r for r in (-(-size // steps), size // steps) if r and (steps - 1) * r < size - 1), None)
        if stride is None:
            raise ValueError(f"{steps} steps do not fit a grid of {size} times; at most {size - 1}")
        return self.grid_time(schedule, size - 1 - stride * jnp.arange(steps))

    def sampling(self, schedule, steps):
        if self.boundary == "lcm":
            return None
        return Sampling(timesteps=tuple(map(int, self.sample_times(schedule, steps))), guidance=self.guidance)

    def nfe(self, steps):
        return steps if self.guidance == 1.0 else 2 * steps


def codi_paper(**changes) -> CoDi:
    """The paper's text: own ODE, PREv, noise space, shared t, dt = 1."""
    return CoDi(**changes)


def codi_released(**changes) -> CoDi:
    """The released code with its bugs mended: frozen teacher's DDIM, x0 space, LCM boundary, dt = 20 on a grid of
    50."""
    released = dict(
        ode="teacher", noise="predicted", space="x0", boundary="lcm", shared_t=False, grid_size=50, delta_t=20
    )
    return CoDi(**(released | changes))

"""CoDi's equations one by one: identities, reference values and problems with a known solution.

Labels I1 ... I22 are referred to in docs/codi.md.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import config, losses, models, sampling
from cddistill.diffusion import DDPM, Prediction, RectifiedFlow, like
from cddistill.method import normal
from cddistill.methods.codi import RELEASED, CoDi
from cddistill.net import Adapted, Autoencoder, Denoiser, Net

SD = DDPM()
KEY = jax.random.key(0)


def world(apply, predicts="v", schedule=SD, params=None, ema=None):
    """Roles n whose backbone is apply(params, z, t, residuals) and whose branch returns the condition."""
    branch = Net({}, lambda p, z, t, text, cond: cond)
    net = Denoiser(
        {} if params is None else params,
        lambda p, z, t, text, residuals=0.0: apply(p, z, t, residuals),
        schedule,
        predicts,
    )
    average = net.replace(params=net.params if ema is None else ema)
    return types.SimpleNamespace(teacher=net, backbone=net, backbone_ema=average, branch=branch, branch_ema=branch,
                                 autoencoder=Autoencoder())  # fmt: skip


def batch(size=8, dim=3):
    x0, cond = tiny.randn(0, size, dim), tiny.randn(1, size, dim)
    zeros = jnp.zeros(size, jnp.int32)
    return {"x0": x0, "cond": cond, "text": zeros, "null": zeros, "index": jnp.arange(size)}


def fixed(method, t, s):
    """The method with fixed timesteps: only the noise is random."""
    object.__setattr__(method, "random_timesteps", lambda schedule, key, index: (jnp.array([t]), jnp.array([s])))
    return method


WEIGHT = jnp.array([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6], [-0.1, 0.2, 0.7]])


def linear(p, z, t, cond):
    """An arbitrary nonlinear network."""
    return jnp.tanh(z @ WEIGHT + 0.3 * cond + 0.1 * (p["b"][None] if p else 0.0)) + 1e-3 * like(
        t.astype(jnp.float32), z
    )


# ---- initialisation


@pytest.mark.parametrize("adapter", ["controlnet", "mu_blend"])
@pytest.mark.parametrize("freeze", [False, True])
def test_initial_student_equals_the_teacher(adapter, freeze):
    """I1: student == EMA == teacher, bit for bit, with a condition and (ControlNet) without."""
    method, frozen, b = CoDi(adapter=adapter, freeze_backbone=freeze), tiny.frozen(), tiny.make_batch()
    nets = jax.jit(method.init)(jax.random.key(0), frozen, b)
    n = types.SimpleNamespace(**frozen, **nets, **{f"{k}_ema": v for k, v in nets.items()})
    z, t = tiny.randn(0, 16, 8, 8, 3), jnp.full(16, 300)
    want = jax.jit(lambda net: net(z, t, b["text"]).x0)(frozen["teacher"])
    for net in (method.student(n), method.target(n)):
        for cond in (b["cond"], None) if adapter == "controlnet" else (b["cond"],):
            got = jax.jit(lambda net, cond=cond: net(z, t, b["text"], cond).x0)(net)
            np.testing.assert_array_equal(got, want)


def test_parameter_efficient_codi_trains_and_saves_only_the_branch():
    """I3: the state holds no backbone, so no update can reach it and no checkpoint carries it."""
    state = tiny.start("codi_pe")
    assert set(state.nets) == set(state.ema) == {"branch"}
    full = tiny.start("codi")
    assert set(full.nets) == set(full.ema) == {"backbone", "branch"}


# ---- the prediction of z_s


def pieces(t=500, s=480):
    """Roles, batch, noise, z_t and the student's prediction."""
    n, b, eps = world(linear), batch(), tiny.randn(2, 8, 3)
    z_t = n.teacher.noise(b["x0"], eps, jnp.array([t]))
    return n, b, eps, z_t, CoDi().student(n)(z_t, jnp.array([t]), b["text"], b["cond"])


def test_prev_and_ddim_differ_by_the_noise_error():
    """I9: z_prev - z_ddim = sigma_s (eps - eps^); at s = t PREv is z + alpha (x^ - x0); if x^ = x0 it re-noises x0."""
    n, b, eps, z_t, online = pieces()
    t, s = jnp.array([500]), jnp.array([480])
    alpha_s, sigma_s = n.teacher.alpha_sigma(s, z_t)
    prev = CoDi(noise="real").jump(n, online, z_t, t, s, eps, b["text"])
    ddim = CoDi(noise="predicted").jump(n, online, z_t, t, s, eps, b["text"])
    np.testing.assert_allclose(prev - ddim, sigma_s * (eps - online.eps), atol=1e-5)
    stay = CoDi().jump(n, online, z_t, t, t, eps, b["text"])
    alpha_t, _ = n.teacher.alpha_sigma(t, z_t)
    np.testing.assert_allclose(stay, z_t + alpha_t * (online.x0 - b["x0"]), atol=1e-5)
    perfect = CoDi().jump(n, Prediction(b["x0"], online.eps), z_t, t, s, eps, b["text"])
    np.testing.assert_allclose(perfect, alpha_s * b["x0"] + sigma_s * eps, atol=1e-6)


def test_ddim_step_with_s_equal_t_is_the_identity():
    """I6 in the method: with predicted noise and s = t, z_s is z_t."""
    n, b, eps, z_t, online = pieces()
    got = CoDi(noise="predicted").jump(n, online, z_t, jnp.array([500]), jnp.array([500]), eps, b["text"])
    np.testing.assert_allclose(got, z_t, atol=1e-5)


def test_ode_step_of_the_student_or_of_the_frozen_teacher():
    """The student's step uses the condition; the frozen teacher's does not."""
    n, b, eps, z_t, online = pieces()
    n.teacher = n.teacher.replace(apply=lambda p, z, t, text, residuals=0.0: jnp.zeros_like(z))
    own, other = (CoDi(ode=ode, space="x0").jump(n, online, z_t, jnp.array([500]), jnp.array([480]), eps, b["text"])
                  for ode in ("adapted", "teacher"))  # fmt: skip
    alpha_t, sigma_t = n.teacher.alpha_sigma(jnp.array([500]), z_t)
    alpha_s, sigma_s = n.teacher.alpha_sigma(jnp.array([480]), z_t)
    np.testing.assert_allclose(other, alpha_s * alpha_t * z_t + sigma_s * eps, atol=1e-5)  # v = 0: x^ = alpha z
    np.testing.assert_allclose(own, alpha_s * online.x0 + sigma_s * eps, atol=1e-5)


# ---- consistency


def test_eps_and_x0_consistency_differ_by_the_snr():
    """I8: along the model's own DDIM step, dx = -(sigma_s / alpha_s) deps, so the losses' ratio is 1 / SNR(s)."""
    n, b, eps, z_t, online = pieces()
    t, s = jnp.array([500]), jnp.array([480])
    z_s = CoDi(noise="predicted").jump(n, online, z_t, t, s, eps, b["text"])
    anchor = CoDi().target(n)(z_s, s, b["text"], b["cond"])
    alpha_s, sigma_s = n.teacher.alpha_sigma(s, z_t)
    np.testing.assert_allclose(anchor.x0 - online.x0, -(sigma_s / alpha_s) * (anchor.eps - online.eps), atol=2e-5)
    in_eps, in_x0 = (
        CoDi(space=space).consistency(SD, online, z_t, t, anchor, z_s, s).mean() for space in ("eps", "x0")
    )
    np.testing.assert_allclose(in_x0 / in_eps, 2.292785910547, rtol=1e-3)  # float32 differences of close numbers


def exact_map(t, z):
    """The end point of the exact ODE through z_t for data N(0, 0.5^2), in float64."""
    alpha, sigma = alpha_sigma64(t)
    return z * 0.5 / np.sqrt(alpha**2 * 0.25 + sigma**2)


def alpha_sigma64(t):
    alpha = np.sqrt(np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))[t]
    return alpha, np.sqrt(1.0 - alpha**2)


def test_exact_solution_has_zero_x0_loss_and_nonzero_eps_loss():
    """I10: with the exact consistency function and the exact ODE the x0 loss vanishes, and the eps loss is O(dt): eps
    consistency holds for straight trajectories only. This is why teacher ODE with eps space is refused."""
    golden = {1: 7.29e-4, 5: 3.65e-3, 10: 7.34e-3, 20: 1.48e-2, 40: 3.01e-2}
    z_t = np.random.default_rng(0).normal(size=200_000)
    alpha_t, sigma_t = alpha_sigma64(500)
    z_t *= np.sqrt(alpha_t**2 * 0.25 + sigma_t**2)
    for dt, want in golden.items():
        s = 500 - dt
        alpha_s, sigma_s = alpha_sigma64(s)
        z_s = z_t * np.sqrt((alpha_s**2 * 0.25 + sigma_s**2) / (alpha_t**2 * 0.25 + sigma_t**2))
        eps_t = (z_t - alpha_t * exact_map(500, z_t)) / sigma_t
        eps_s = (z_s - alpha_s * exact_map(s, z_s)) / sigma_s
        assert np.abs(exact_map(500, z_t) - exact_map(s, z_s)).max() < 1e-12
        np.testing.assert_allclose(
            np.sqrt(np.mean((eps_t - eps_s) ** 2)), want, rtol=1.5e-2
        )  # 1/sqrt(2n) = 0.2 %, 3 digits
    with pytest.raises(ValueError, match="incoherent"):
        CoDi(ode="teacher", space="eps")


@pytest.mark.parametrize("case", ["s = t with DDIM", "constant eps"])
def test_consistency_loss_is_zero_for_s_equal_t_or_constant_eps(case):
    """I10 (a), (c): EMA = student with a DDIM step of s = t, or a constant eps^."""
    if case == "constant eps":
        n, method = (
            world(lambda p, z, t, c: jnp.ones_like(z), "eps"),
            fixed(CoDi(noise="predicted", signal_weight=0.0), 500, 300),
        )
    else:
        n, method = world(linear), fixed(CoDi(noise="predicted", signal_weight=0.0), 500, 500)
    loss, _ = method.loss(n, batch(), jax.random.key(0))
    assert loss < 1e-10


def test_boundary_condition_values():
    """I11: identity at t = 0, and c_out -> 1 (not 1/2) at every other timestep."""
    method, one = CoDi(**RELEASED), jnp.ones((1, 3))
    np.testing.assert_array_equal(method.bounded(5.0 * one, one, jnp.array([0])), one)
    c_skip = method.bounded(0.0 * one, one, jnp.array([1]))
    c_out = method.bounded(one, 0.0 * one, jnp.array([1]))
    np.testing.assert_allclose(c_skip, 0.0024937656, rtol=1e-5)
    np.testing.assert_allclose(c_out, 0.9987523389, rtol=1e-6)


def test_consistency_loss_is_zero_at_timestep_zero():
    """I12: at k = 0 of the released grid, t = s = 0, and both sides are the same z."""
    method = CoDi(**RELEASED)
    t, s = method.random_timesteps(SD, jax.random.key(0), jnp.arange(4000))
    assert np.any(np.asarray(t) == 0)
    assert set(np.unique(t - s)) == {0, 20}
    loss, logs = fixed(method, 0, 0).loss(world(linear), batch(), jax.random.key(0))
    assert logs["consistency"] < 1e-7  # one float32 DDIM step from t = 0 to itself


def test_the_signal_term_is_on_what_is_sampled():
    """With the boundary condition that is z_0 at t = 0, whatever the network says: |z_0 - x0|^2, without a gradient."""
    method, b = fixed(CoDi(**RELEASED), 0, 0), batch()

    def signal(params):
        return method.loss(world(linear, params=params), b, KEY)[1]["signal"]

    value, slope = jax.jit(jax.value_and_grad(signal))({"b": jnp.ones(3)})
    eps = normal(jax.random.split(KEY, 4)[1], b["index"], (3,))
    np.testing.assert_allclose(value, ((world(linear).teacher.noise(b["x0"], eps, 0) - b["x0"]) ** 2).mean(), rtol=1e-5)
    np.testing.assert_array_equal(slope["b"], 0.0)


def test_training_timesteps_of_paper_and_released_code():
    """Paper: t in [dt, T], s = t - dt. Released code: multiples of 20, up to 980."""
    t, s = CoDi(shared_t=False).random_timesteps(SD, jax.random.key(0), jnp.arange(50_000))
    assert t.min() == 1
    assert t.max() == 999
    assert np.all(np.asarray(t - s) == 1)
    t, _ = CoDi(**RELEASED).random_timesteps(SD, jax.random.key(1), jnp.arange(20_000))
    assert set(np.unique(t)) == set(range(0, 1000, 20))


# ---- gradients


def test_no_gradient_reaches_the_ema_or_z_s():
    """I13: the gradient is that of the loss with target and z_s held fixed; the EMA still changes the loss."""
    params, ema = {"b": jnp.array([0.3, -0.5, 0.8])}, {"b": jnp.array([0.2, -0.4, 0.9])}
    method, b, key = fixed(CoDi(), 500, 400), batch(), jax.random.key(3)

    def loss(params, ema):
        n = world(linear, params=params, ema=ema)
        n.teacher = n.teacher.replace(params=ema)
        return method.loss(n, b, key)[0]

    np.testing.assert_array_equal(jax.grad(loss, 1)(params, ema)["b"], 0.0)
    assert abs(loss(params, ema) - loss(params, {"b": ema["b"] + 1.0})) > 1e-5
    n = world(linear, params=params, ema=ema)
    k_eps = jax.random.split(key, 4)[1]
    eps, t, s = normal(k_eps, b["index"], (3,)), jnp.array([500]), jnp.array([400])
    z_t = n.teacher.noise(b["x0"], eps, t)
    z_s = method.jump(n, method.student(n)(z_t, t, b["text"], b["cond"]), z_t, t, s, eps, b["text"])
    anchor = method.target(n)(z_s, s, b["text"], b["cond"]).eps

    def held(params):
        online = method.student(world(linear, params=params))(z_t, t, b["text"], b["cond"])
        return ((online.eps - anchor) ** 2).mean() + ((online.x0 - b["x0"]) ** 2).mean()

    np.testing.assert_allclose(jax.grad(loss)(params, ema)["b"], jax.grad(held)(params)["b"], rtol=1e-4)


def test_losses_equal_an_independent_numpy_computation():
    """Equations 1-11 for every preset, against float64 numpy (by_hand)."""
    b = batch()
    for method in (CoDi(), CoDi(noise="predicted"), CoDi(**RELEASED)):
        loss, logs = fixed(method, 500, 480).loss(
            world(linear, params={"b": jnp.ones(3)}, ema={"b": -jnp.ones(3)}), b, jax.random.key(0)
        )
        eps = np.float64(normal(jax.random.split(jax.random.key(0), 4)[1], b["index"], (3,)))
        consistency, signal = by_hand(method, np.float64(b["x0"]), np.float64(b["cond"]), eps)
        np.testing.assert_allclose(logs["consistency"], consistency, rtol=2e-4)
        np.testing.assert_allclose(logs["signal"], signal, rtol=2e-5)
        np.testing.assert_allclose(loss, consistency + signal, rtol=1e-4)


def by_hand(method, x0, cond, eps):
    """Equations 1-11 at t = 500, s = 480 without any of the package's code."""
    (a, o), (a_s, o_s) = alpha_sigma64(500), alpha_sigma64(480)
    net = lambda z, t, b, c: np.tanh(z @ np.float64(WEIGHT) + 0.3 * c + 0.1 * b) + 1e-3 * t
    z_t = a * x0 + o * eps
    v = net(z_t, 500, 1.0, cond)
    x_hat, e_hat = a * z_t - o * v, a * v + o * z_t
    v_teacher = net(z_t, 500, 1.0, 0.0)
    x_ode, e_ode = (x_hat, e_hat) if method.ode == "adapted" else (a * z_t - o * v_teacher, a * v_teacher + o * z_t)
    z_s = a_s * x_ode + o_s * (eps if method.noise == "real" else e_ode)
    v_s = net(z_s, 480, -1.0, cond)
    if method.space == "eps":
        consistency = np.mean((a_s * v_s + o_s * z_s - e_hat) ** 2)
    else:
        f = lambda z, x, t: 0.25 / ((10 * t) ** 2 + 0.25) * z + 10 * t / np.sqrt((10 * t) ** 2 + 0.25) * x
        x_hat = f(z_t, x_hat, 500)
        consistency = np.mean((f(z_s, a_s * z_s - o_s * v_s, 480) - x_hat) ** 2)
    return consistency, np.mean((x_hat - x0) ** 2)


def test_eps_error_is_snr_times_x0_error():
    """I14: |eps^ - eps|^2 = SNR |x^ - x0|^2, so the signal loss bounds the eps error as well."""
    n, b, eps, z_t, online = pieces()
    alpha, sigma = SD.alpha_sigma(jnp.array([500]))
    np.testing.assert_allclose(
        ((online.eps - eps) ** 2).mean(),
        (alpha / sigma) ** 2 * ((online.x0 - b["x0"]) ** 2).mean() * jnp.ones(1),
        rtol=1e-3,
    )


def test_min_snr_weights():
    """I17: one weight per timestep, min(SNR, gamma) / SNR; a large gamma changes nothing."""
    n, b = world(linear), batch()
    plain, wide, tight = (
        fixed(CoDi(snr_gamma=g), 100, 80).loss(n, b, jax.random.key(0))[1]["consistency"] for g in (0.0, 1e9, 1.0)
    )
    alpha, sigma = alpha_sigma64(100)
    np.testing.assert_allclose(wide, plain, rtol=1e-6)
    np.testing.assert_allclose(tight, plain * sigma**2 / alpha**2, rtol=1e-4)


@pytest.mark.parametrize(("snr", "weight"), [(0.0, 1.0), (1.0, 1.0), (5.0, 1.0), (20.0, 0.25), (np.inf, 0.0)])
def test_min_snr_weight_is_one_up_to_gamma(snr, weight):
    """Also at zero terminal SNR, where min(SNR, gamma) / SNR is 0 / 0."""
    alpha, sigma = (1.0, 0.0) if snr == np.inf else (snr**0.5, 1.0)
    np.testing.assert_allclose(losses.min_snr(jnp.float32([alpha]), jnp.float32([sigma]), 5.0), weight, rtol=1e-6)


def test_timestep_is_shared_by_the_batch_or_per_sample():
    """I16: one t for the whole global batch, as in the paper, or one per sample."""
    t, _ = CoDi().random_timesteps(SD, jax.random.key(0), jnp.arange(64))
    assert t.shape == (1,)
    t, _ = CoDi(shared_t=False).random_timesteps(SD, jax.random.key(0), jnp.arange(64))
    assert len(np.unique(t)) > 50


def test_cfg_aware_training_uses_the_guided_prediction():
    """With guidance scale w = 7 the trained v^ is uncond + 7 (cond - uncond) = 5.8."""
    n, b = world(linear), batch()
    n.backbone = n.backbone.replace(
        apply=lambda p, z, t, text, residuals=0.0: jnp.where(text[:, None] == 0, 1.0, 0.2) * jnp.ones_like(z)
    )
    n.backbone_ema = n.backbone
    b |= {"null": b["text"] + 1}
    method = fixed(CoDi(guidance_range=(7.0, 7.0 + 1e-6)), 500, 480)
    _, logs = method.loss(n, b, jax.random.key(0))
    alpha, sigma = alpha_sigma64(500)
    eps = normal(jax.random.split(jax.random.key(0), 4)[1], b["index"], (3,))
    z_t = alpha * b["x0"] + sigma * eps
    np.testing.assert_allclose(logs["signal"], ((alpha * z_t - sigma * 5.8 - b["x0"]) ** 2).mean(), rtol=1e-4)


@pytest.mark.parametrize("guided_ode", [False, True])
def test_networks_are_told_their_timestep_text_and_condition(guided_ode):
    """Guidance drops the text and keeps the condition, in training and in sampling, which uses the averages. The frozen
    teacher has no condition, and is guided only with guided_ode: z_s is then made of 6100 = 5300 + 2 (5700 - 5300)."""
    calls, b = [], batch() | {name: jnp.full(8, label) for name, label in (("text", 7), ("null", 3))}
    b |= {"x0": jnp.full((8, 3), 1000.0), "cond": jnp.full((8, 3), 5.0)}
    nets = {"backbone": "student", "backbone_ema": "average", "branch": "branch", "branch_ema": "average branch"}
    n = types.SimpleNamespace(**{name: tiny.noting(calls, role) for name, role in nets.items()})
    n.branch, n.branch_ema = Net({}, n.branch.apply), Net({}, n.branch_ema.apply)
    n.teacher = tiny.noting(calls, "teacher", 5000.0)
    options = {"guidance_range": (2.0, 2.0), "guidance": 2.0, "guided_ode": guided_ode}
    method = fixed(CoDi(ode="teacher", space="x0", **options), 500, 480)

    def guided(backbone, branch, t, *z):  # the residuals are the branch's output
        return [x for y in (7, 3) for x in ((branch, t, y, *z, 5.0), (backbone, t, y, *z, 100.0 * y))]

    tiny.run_noting(lambda: method.loss(n, b, KEY))
    z_t, z_s = near(500, 1000.0), near(480, 6100.0 if guided_ode else 5700.0)
    teacher = [("teacher", 500, 7, z_t), ("teacher", 500, 3, z_t)][: 1 + guided_ode]
    online, target = guided("student", "branch", 500, z_t), guided("average", "average branch", 480, z_s)
    assert calls == online + teacher + target
    calls.clear()
    tiny.run_noting(jax.jit(lambda: method.sample(n, tiny.randn(5, 8, 3), b, None, 2)))
    steps = [guided("average", "average branch", t) for t in (999, 499)]
    assert [(*call[:3], call[4]) for call in calls] == sum(steps, [])


def near(t, x0):
    """The mean of x0 noised to t, up to the noise's."""
    return pytest.approx(float(SD.alpha_sigma(t)[0]) * x0, abs=2.0)


def test_the_signal_distances():
    """Fig. 2 of the paper, and LatentLPIPS, with an autoencoder that is not the identity: D(z) = 2z, E(x) = x / 4."""
    n, a, b = world(linear), tiny.randn(0, 5, 3), tiny.randn(1, 5, 3)
    n.autoencoder = Autoencoder(None, lambda p, x: x / 4, lambda p, z: 2 * z)
    n.lpips = lambda x, y: jnp.abs(x - y).max(1)
    n.latent_lpips = lambda x, y: jnp.abs(x - y).min(1)
    want = {
        "l2": ((a - b) ** 2).mean(1),
        "pixel_l2": 4 * ((a - b) ** 2).mean(1),
        "reencoded_l2": ((a / 2 - b) ** 2).mean(1),
        "lpips": 2 * jnp.abs(a - b).max(1),
        "latent_lpips": jnp.abs(a - b).min(1),
    }
    for signal, value in want.items():
        np.testing.assert_allclose(CoDi(signal=signal).signal_distance(n, a, b), value, rtol=1e-5)


# ---- sampling


def test_sampling_grids():
    """I20: n timesteps, strictly decreasing from the largest trained one to one above 0."""
    released = jax.jit(lambda steps: CoDi(**RELEASED).sampling_timesteps(SD, steps), static_argnums=0)
    np.testing.assert_array_equal(released(4), [980, 720, 460, 200])
    np.testing.assert_array_equal(released(2), [980, 480])
    for steps in (1, 2, 3, 4, 5, 7, 8, 10, 17, 20, 25, 33, 48, 49):
        times = np.asarray(released(steps))
        assert len(times) == steps
        assert np.all(np.diff(times) < 0)
        assert times[0] == 980
        assert times[-1] > 0
    with pytest.raises(ValueError, match="at most 49"):
        released(50)
    np.testing.assert_array_equal(CoDi().sampling_timesteps(SD, 4), [999, 749, 499, 249])


def test_one_step_sampling_returns_x_hat():
    """I19: one step returns x^(z_T, c, T); guidance doubles the NFE."""
    n, b, noise = world(linear), batch(), tiny.randn(5, 8, 3)
    got = CoDi().sample(n, noise, b, None, 1)
    want = Adapted(n.backbone_ema, n.branch_ema)(noise, 999, b["text"], b["cond"]).x0
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert CoDi().nfe(4) == 4
    assert CoDi(guidance=2.0).nfe(4) == 8


@pytest.mark.parametrize(
    "change",
    [
        dict(ode="ours"),
        dict(boundary="lcm"),
        dict(signal="l1"),
        dict(guided_ode=True),
        dict(guided_ode=True, ode="teacher", space="x0"),
        dict(guided_ode=True, guidance_range=(2.0, 14.0)),
    ],
)
def test_unknown_or_incompatible_options_are_refused(change):
    with pytest.raises(ValueError, match=f"method.{next(iter(change))}"):
        config.resolve({"method": {"name": "codi"} | change})


# ---- precision


@pytest.mark.parametrize("w", [pytest.param(1.0, marks=pytest.mark.slow), 14.0])
def test_bfloat16_losses_are_finite(w):
    """I18: networks in bfloat16, weights and losses in float32, up to the largest released guidance scale."""
    frozen = {
        "teacher": tiny.models.init(tiny.UNET, 0, tiny.teacher().schedule, "v", False, jnp.bfloat16),
        "autoencoder": Autoencoder(),
    }
    method, b = CoDi(guidance_range=(w, w + 1e-3)), tiny.make_batch()
    nets = jax.jit(method.init)(jax.random.key(0), frozen, b)
    roles = frozen | nets | {f"{k}_ema": v for k, v in nets.items()}
    loss, _ = jax.jit(lambda roles: method.loss(types.SimpleNamespace(**roles), b, jax.random.key(0)))(roles)
    assert loss.dtype == jnp.float32
    assert jnp.isfinite(loss)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nets))


def test_text_can_be_the_only_condition():
    """An image condition in the batch is ignored, and may be missing."""
    method, frozen, b = CoDi(adapter="none", grid_power=2.0), tiny.frozen(), tiny.make_batch(size=4)
    nets = method.init(jax.random.key(0), frozen, b)
    assert list(nets) == ["backbone"]

    @jax.jit
    def seen(b):
        n = types.SimpleNamespace(**frozen, **nets, backbone_ema=nets["backbone"])
        key = jax.random.key(0)
        return method.loss(n, b, key)[0], method.sample(n, b["x0"], b, None, 2)

    (loss, drawn), (without, again) = seen(b), seen({name: x for name, x in b.items() if name != "cond"})
    assert float(loss) > 0.0
    np.testing.assert_allclose(loss, without, rtol=1e-6)
    np.testing.assert_allclose(drawn, again, atol=1e-6)


def test_consistency_boundary_needs_a_ddpm_schedule():
    """c_skip and c_out are functions of DDPM's timesteps, not of a flow's t in [0, 1]."""
    teacher = models.init(tiny.UNET, 0, RectifiedFlow(), "flow")
    method = CoDi(boundary="lcm", space="x0")
    method.init(KEY, {"teacher": tiny.teacher()}, tiny.make_batch(size=2))
    with pytest.raises(ValueError, match="is defined on a DDPM schedule's timesteps, and this is RectifiedFlow"):
        method.init(KEY, {"teacher": teacher}, tiny.make_batch(size=2))
    denoise = lambda z, t: teacher(z, t, {"class_labels": np.zeros(2, "i")})
    with pytest.raises(ValueError, match="this is RectifiedFlow"):
        sampling.lcm(denoise, RectifiedFlow(), jnp.zeros((2, 8, 8, 3)), RectifiedFlow().grid(1))

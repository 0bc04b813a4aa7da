"""Schedules, parameterisations, guidance and samplers against closed forms and published numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import diffusion as d
from cddistill import losses, sampling
from cddistill.models import vae
from cddistill.net import Adapted, Autoencoder, Denoiser, Net

TIMES = {
    d.DDPM(): jnp.array([0, 1, 500, 998, 999]),
    d.DDPM(beta_schedule="linear", beta_start=1e-4, beta_end=0.02): jnp.array([0, 1, 500, 700, 800]),
    d.DDPM(beta_schedule="squaredcos_cap_v2"): jnp.array([0, 1, 300, 500, 900]),
    d.EDM(): jnp.array([0.01, 0.1, 0.5, 1.0, 2.0]),
    d.RectifiedFlow(): jnp.array([0.01, 0.25, 0.5, 0.75, 0.9]),
}


@pytest.mark.parametrize(("kind", "schedule"), list(itertools.product(["eps", "x0", "v", "flow"], TIMES)))
def test_prediction_inverts_target(kind, schedule):
    """A perfect network of any prediction type yields the true x0 and eps, and alpha x0 + sigma eps = z (I5)."""
    x0, eps = tiny.randn(0, 5, 4, 4, 3), tiny.randn(1, 5, 4, 4, 3)
    alpha, sigma = (d.like(c, x0) for c in schedule.alpha_sigma(TIMES[schedule]))
    z_t = alpha * x0 + sigma * eps
    pred = d.predict(kind, d.target(kind, x0, eps, alpha, sigma), z_t, alpha, sigma)
    # The solution divides by alpha or sigma: conditioning up to 1/0.01, times 1e-7.
    np.testing.assert_allclose(pred.x0, x0, atol=5e-5)
    np.testing.assert_allclose(pred.eps, eps, atol=5e-5)
    np.testing.assert_allclose(alpha * pred.x0 + sigma * pred.eps, z_t, atol=5e-5)


def test_all_prediction_types_agree():
    """Equivalent eps, x0, v and flow networks give the same x0 (I5)."""
    alpha, sigma = (d.like(c, jnp.zeros((3, 2))) for c in d.DDPM().alpha_sigma(jnp.array([20, 500, 900])))
    z_t, x0_hat = tiny.randn(0, 3, 2), tiny.randn(1, 3, 2)
    eps_hat = (z_t - alpha * x0_hat) / sigma
    for kind in ("eps", "x0", "v", "flow"):
        pred = d.predict(kind, d.target(kind, x0_hat, eps_hat, alpha, sigma), z_t, alpha, sigma)
        np.testing.assert_allclose(pred.x0, x0_hat, atol=2e-5)


def test_stable_diffusion_schedule_values():
    """alpha, sigma and SNR of SD's schedule (sqrt of diffusers' alphas_cumprod)."""
    t = jnp.array([0, 20, 200, 460, 500, 720, 980, 999])
    alpha, sigma = d.DDPM().alpha_sigma(t)
    golden = [0.999575, 0.990613, 0.868154, 0.576458, 0.525674, 0.266559, 0.076445, 0.068265]
    np.testing.assert_allclose(alpha, golden, atol=1e-6)
    np.testing.assert_allclose(
        sigma, [0.029155, 0.136695, 0.496294, 0.817127, 0.850686, 0.963819, 0.997074, 0.997667], atol=1e-6
    )
    np.testing.assert_allclose(((alpha / sigma) ** 2)[jnp.array([4, 7])], [0.382, 0.00468], rtol=2e-3)


def test_zero_terminal_snr():
    """Lin et al. 2023: the last alpha is 0, the first unchanged."""
    for name in ("scaled_linear", "linear", "squaredcos_cap_v2"):
        alpha, sigma = d.DDPM(beta_schedule=name, zero_snr=True).alpha_sigma(jnp.array([0, 999]))
        plain, _ = d.DDPM(beta_schedule=name).alpha_sigma(jnp.array([0, 999]))
        assert alpha[1] == 0.0
        assert sigma[1] == 1.0
        np.testing.assert_allclose(alpha[0], plain[0], rtol=1e-6)


def test_alpha_sigma_between_integer_timesteps():
    """sigma/alpha is interpolated linearly; integers give the table's entry, as float or int."""
    for schedule in (d.DDPM(), d.DDPM(zero_snr=True, last_alpha=2.0**-12)):
        whole = jnp.array([0, 1, 498, 998, 999])
        for ours, table in zip(
            schedule.alpha_sigma(whole.astype(jnp.float32)), schedule.alpha_sigma(whole), strict=True
        ):
            np.testing.assert_allclose(ours, table, rtol=1e-5)
        alpha, sigma = schedule.alpha_sigma(jnp.array([[41.25]]))
        (a, b), (c, e) = schedule.alpha_sigma(jnp.array([41, 42]))
        np.testing.assert_allclose(sigma / alpha, [[0.75 * c / a + 0.25 * e / b]], rtol=1e-5)
        np.testing.assert_allclose(alpha**2 + sigma**2, [[1.0]], rtol=1e-6)
    with pytest.raises(ValueError, match="infinite at zero SNR: use integer t, or a DDPM with last_alpha > 0"):
        d.DDPM(zero_snr=True).alpha_sigma(jnp.array([41.25]))


@pytest.mark.parametrize("schedule", TIMES)
def test_grids_decrease_in_noise_and_ddpm_preserves_variance(schedule):
    """sigma/alpha falls along every grid; variance-preserving schedules have alpha^2 + sigma^2 = 1."""
    for n in (1, 2, 4, 50, 999):
        times = schedule.grid(n)
        assert len(np.unique(times)) == n
        alpha, sigma = schedule.alpha_sigma(times)
        assert np.all(np.diff(np.asarray(sigma / jnp.maximum(alpha, 1e-9))) < 0)
        if isinstance(schedule, d.DDPM):
            np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)


def test_karras_grid_values():
    """Karras et al. 2022, eq. 5 with N - 1 = 4: sigma_i of the first and last, and the geometric-like middle."""
    s = np.asarray(d.EDM().grid(5))
    want = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    np.testing.assert_allclose(s, want, rtol=1e-4)
    np.testing.assert_allclose(s[[0, 4]], [80.0, 0.002], rtol=1e-4)


def test_unknown_beta_schedule_is_named():
    with pytest.raises(ValueError, match="sigmoid"):
        d.DDPM(beta_schedule="sigmoid").alpha_sigma(jnp.array([0]))


def test_guidance_formula_and_linearity():
    """I7: uncond + w (cond - uncond) (5.8; swapped: -4.6), and guiding v, eps or x0 is the same."""
    assert d.guide(1.0, 0.2, 7.0) == pytest.approx(5.8)
    assert d.guide(1.0, 0.2, 1.0) == 1.0
    assert d.guide(1.0, 0.2, 0.0) == pytest.approx(0.2)
    alpha, sigma = (d.like(c, jnp.zeros((2, 3))) for c in d.DDPM().alpha_sigma(jnp.array([100, 800])))
    z_t, v_c, v_u = tiny.randn(0, 2, 3), tiny.randn(1, 2, 3), tiny.randn(2, 2, 3)
    outside = d.guide(d.predict("v", v_c, z_t, alpha, sigma), d.predict("v", v_u, z_t, alpha, sigma), 4.0)
    inside = d.predict("v", d.guide(v_c, v_u, 4.0), z_t, alpha, sigma)
    np.testing.assert_allclose(outside.x0, inside.x0, atol=1e-5)
    np.testing.assert_allclose(outside.eps, inside.eps, atol=1e-5)


def vp(v):
    """A v-network with output v(z), on SD's schedule."""
    return Denoiser({}, lambda p, z, t: v(z), d.DDPM(), "v")


def test_ddim_is_a_rotation():
    """I6: with phi = atan2(sigma, alpha), DDIM is z_s = cos(phi_t - phi_s) z - sin(phi_t - phi_s) v; v = 0 shrinks
    z."""
    z, v = tiny.randn(0, 4, 3), tiny.randn(1, 4, 3)
    t, s = jnp.full(4, 700), jnp.full(4, 300)
    net = vp(lambda z: v)
    z_s = net.noise(*net(z, t), s)
    alpha, sigma = d.DDPM().alpha_sigma(jnp.array([700, 300]))
    phi = jnp.arctan2(sigma, alpha)
    np.testing.assert_allclose(z_s, jnp.cos(phi[0] - phi[1]) * z - jnp.sin(phi[0] - phi[1]) * v, atol=1e-6)
    np.testing.assert_allclose(net.noise(*net(z, t), t), z, atol=1e-6)
    still = vp(jnp.zeros_like)
    np.testing.assert_allclose(still.noise(*still(z, t), s), jnp.cos(phi[0] - phi[1]) * z, atol=1e-6)


MEAN, STD = 0.7, 0.4


def gaussian(schedule, predicts="x0"):
    """The exact denoiser of N(MEAN, STD^2)."""

    def posterior_mean(p, z, t):
        alpha, sigma = (d.like(c, z) for c in schedule.alpha_sigma(t))
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)

    return Denoiser({}, posterior_mean, schedule, predicts)


def exact(schedule, noise, times):
    """The exact probability-flow ODE of N(MEAN, STD^2) (it preserves quantiles) at the last time, denoised."""
    (alpha, last), (sigma, faint) = schedule.alpha_sigma(times[jnp.array([0, -1])])
    quantile = (jnp.maximum(sigma, 1.0) * noise - alpha * MEAN) / jnp.sqrt(alpha**2 * STD**2 + sigma**2)
    z = last * MEAN + quantile * jnp.sqrt(last**2 * STD**2 + faint**2)
    return gaussian(schedule)(z, times[-1]).x0


WORLDS = [d.DDPM(), d.EDM(sigma_max=20.0), d.DDPM(beta_schedule="squaredcos_cap_v2", zero_snr=True)]


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpm_solver_pp", 2)])
@pytest.mark.parametrize("schedule", WORLDS, ids=["sd", "edm", "zero snr"])
def test_samplers_converge_to_the_exact_ode(name, order, schedule):
    """On Gaussian data every sampler tends to the closed-form solution: 4 times the steps, 4^order less error."""
    if name == "heun" and getattr(schedule, "zero_snr", False):
        pytest.skip("Heun integrates over sigma/alpha, infinite at zero terminal SNR")
    net, noise, error = gaussian(schedule), tiny.randn(0, 64, 2), []
    for n in (20, 80):
        times = schedule.at(jnp.linspace(1.0, 0.1, n))
        x0 = jax.jit(functools.partial(sampling.SAMPLERS[name], net, schedule))(noise, times)
        error.append(float(jnp.abs(x0 - exact(schedule, noise, times)).max()))
    assert error[1] < 0.03 / order**3, error
    assert error[1] < error[0] / (4**order * 0.6), error


def test_warped_timesteps():
    """power = 1 is the schedule's own grid; a larger one is denser near the data; no timestep repeats."""
    np.testing.assert_array_equal(sampling.timesteps(d.DDPM(), 4), [999, 749, 499, 249])
    np.testing.assert_array_equal(sampling.timesteps(d.DDPM(), 4, 2.5), [999, 486, 176, 30])
    for n in (1, 2, 8, 50, 200):
        times = np.asarray(sampling.timesteps(d.DDPM(), n, 2.5))
        assert times[0] == 999
        assert np.all(np.diff(times) < 0)


def test_consistency_boundary_condition():
    """f(z, 0) = z for any network; from t = 1 on, as 10 t is large, f is the network's x0."""
    x0, z = tiny.randn(0, 3, 2), tiny.randn(1, 3, 2)
    np.testing.assert_array_equal(sampling.boundary(x0, z, jnp.zeros((3, 1))), z)
    np.testing.assert_allclose(sampling.boundary(x0, z, 1), x0, atol=0.02)
    np.testing.assert_allclose(sampling.boundary(x0, z, 0.05), x0 / 2**0.5 + z / 2, rtol=1e-6)


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_one_step_is_the_networks_x0(name):
    """I19: with a single timestep the result is x^(z_T, T)."""
    net, noise = gaussian(d.DDPM()), tiny.randn(0, 8, 2)
    x0 = sampling.SAMPLERS[name](net, d.DDPM(), noise, d.DDPM().grid(1))
    np.testing.assert_allclose(x0, net(noise, 999).x0, atol=1e-6)


def test_consistent_model_gives_the_same_result_in_one_and_many_steps():
    """I19: if x^ (or eps^) is constant, any number of steps gives the result of one."""
    schedule = d.DDPM()

    noise = tiny.randn(0, 8, 2)
    constant = Denoiser({}, lambda p, z, t: jnp.zeros_like(z) + 0.3, schedule, "x0")
    straight = Denoiser({}, lambda p, z, t: jnp.ones_like(z), schedule, "eps")
    for net in (constant, straight):
        one, eight = (sampling.ddim(net, schedule, noise, schedule.grid(n)) for n in (1, 8))
        np.testing.assert_allclose(one, eight, atol=2e-4)  # eps networks divide by alpha = 0.068


def test_guidance_scale_one_costs_one_call():
    calls = []

    def net(z, t, text):
        calls.append(text)
        return d.Prediction(z, z)

    sampling.guided(net, "text", "null", 1.0)(jnp.zeros(2), 0)
    assert calls == ["text"]
    sampling.guided(net, "text", "null", 3.0)(jnp.zeros(2), 0)
    assert calls[1:] == ["text", "null"]


def test_shapes_and_types_are_checked_in_tests():
    """Without the option in pyproject.toml the first calls broadcast and the last ones accept a wrong type."""
    x = jnp.zeros((2, 4, 4, 3))
    with pytest.raises(TypeError, match="Type-check error"):
        losses.mse(x, x[:1])
    with pytest.raises(TypeError, match="Type-check error"):
        losses.direction(x[0], x[0])
    with pytest.raises(TypeError, match="Type-check error"):
        d.predict("v", x, x, jnp.ones((2, 1, 1, 1)), jnp.ones((3, 1, 1, 1)))
    with pytest.raises(TypeError, match="Type-check error"):
        sampling.timesteps("DDPM", 4)
    with pytest.raises(TypeError, match="Type-check error"):
        d.DDPM(num_timesteps="1000")


def test_nets_are_printed_without_their_weights():
    net, branch = tiny.teacher(), Net({"w": jnp.zeros(1_230_000)}, tiny.coarse_l2)
    size = sum(x.size for x in jax.tree.leaves(net)) / 1e3
    printed = f"Denoiser(UNet2DConditionModel, {size:.1f} k weights, predicts v on DDPM)"
    seen = []
    jax.eval_shape(lambda net: seen.append(repr(net)), net)
    assert [repr(net), repr(jax.eval_shape(lambda: net)), *seen] == [printed] * 3
    assert repr(branch) == "Net(coarse_l2, 1.2 M weights)"
    assert repr(Net(None, functools.partial(tiny.coarse_l2))) == "Net(coarse_l2, 0 weights)"
    assert repr(Adapted(net, branch)) == f"Adapted({printed}, branch={branch})"
    assert repr(Adapted(net)) == f"Adapted({printed}, branch=None)"
    assert repr(Autoencoder()) == "Autoencoder(identity)"
    weights, module = jax.ShapeDtypeStruct((83_653_863,), jnp.float32), vae.AutoencoderKL()
    assert (
        repr(Autoencoder(weights, vae.Encode(module), vae.Decode(module)))
        == "Autoencoder(AutoencoderKL, 83.7 M weights)"
    )

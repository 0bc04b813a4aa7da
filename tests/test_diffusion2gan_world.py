"""Diffusion2GAN with a known teacher ODE: a mixture of two Gaussians in one dimension."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from cddistill import sampling
from cddistill.diffusion import DDPM, like
from cddistill.methods.diffusion2gan import Diffusion2GAN
from cddistill.net import Denoiser, Net
from cddistill.step import active, init_state, train_step

SCHEDULE = DDPM(1000, "squaredcos_cap_v2", zero_snr=True)
WEIGHTS, MEANS, STDS = (np.array(x) for x in ([0.4, 0.6], [-1.5, 1.0], [0.3, 0.5]))


@functools.cache
def table():
    """Noise and the ODE's solutions. In one dimension the ODE is monotone: it maps quantiles to quantiles."""
    x = np.linspace(-4, 4, 20_001)
    normal = lambda v: 0.5 * (1 + np.vectorize(math.erf)(v / 2**0.5))
    below = sum(w * normal((x - m) / s) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
    z = np.linspace(-4, 4, 4001)
    return z, np.interp(normal(z), below, x)


def ode(z):
    """The ODE solution x0 from noise z."""
    return jnp.interp(z, *map(jnp.asarray, table()))


def mixture(p, z_t, t, text=None):
    """The exact x0-network of the mixture."""
    alpha, sigma = (like(c, z_t) for c in SCHEDULE.alpha_sigma(t))
    ways = []
    for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True):
        var = (alpha * s) ** 2 + sigma**2
        log = jnp.log(w) - 0.5 * jnp.log(var) - 0.5 * (z_t - alpha * m) ** 2 / var
        ways.append((log, m + alpha * s**2 / var * (z_t - alpha * m)))
    share = jax.nn.softmax(jnp.stack([log for log, _ in ways]), 0)
    return (share * jnp.stack([x for _, x in ways])).sum(0)


def mlp(p, *inputs):
    """A perceptron of two hidden layers on the last axis."""
    h = jnp.concatenate(inputs, -1)
    for w, b in p[:-1]:
        h = jnp.tanh(h @ w + b[None])
    return h @ p[-1][0] + p[-1][1][None]


def weights(seed, *widths):
    rng = np.random.default_rng(seed)
    pairs = zip(widths, widths[1:], strict=False)
    return [(jnp.asarray(rng.normal(size=(i, o)) / i**0.5, jnp.float32), jnp.zeros(o)) for i, o in pairs]


def trained(method, steps, size=256):
    """RMS error of the trained student on fresh noise; the targets have standard deviation 1.3."""
    teacher = Denoiser({}, mixture, SCHEDULE, "x0")
    student = Denoiser(weights(0, 1, 64, 64, 1), lambda p, z, t, text: mlp(p, z), SCHEDULE, "x0")
    disc = Net(weights(1, 2, 64, 64, 1), lambda p, x, t, text, z: (mlp(p, x, z),))
    nets = {"student": student} | ({"disc": disc} if method.gan_weight else {})
    turns = method.turns()
    optimizers = {name: optax.adam(optax.cosine_decay_schedule(3e-3, steps)) for name in turns}

    def step(state, play):
        z = jax.random.normal(jax.random.fold_in(jax.random.key(1), state.step), (size, 1))
        pairs = {"noise": z, "x0": ode(z), "text": jnp.zeros(size)}
        others = jax.tree.map(lambda a: jnp.roll(a, 1, 0), pairs)
        batch = {"pairs": pairs, "others": others, "index": jnp.arange(size)}
        return train_step(
            state, {"teacher": teacher}, batch, play, turns=turns, optimizers=optimizers, ema=method.ema()
        )[0], None

    def group(state, _):
        state, _ = step(state, active(turns, 0))
        return jax.lax.scan(lambda s, _: step(s, active(turns, 1)), state, None, method.r1_every - 1)

    state = init_state(nets, turns, optimizers, method.ema())
    state, _ = tiny.fast(lambda s: jax.lax.scan(group, s, None, steps // method.r1_every))(state)
    n = types.SimpleNamespace(teacher=teacher, **state.nets, **{f"{k}_ema": v for k, v in state.ema.items()})
    z = jax.random.normal(jax.random.key(2), (4096, 1))
    drawn = jax.jit(lambda z: method.sample(n, z, {"text": jnp.zeros(len(z))}, None, 1))(z)
    return float(jnp.sqrt(((drawn - ode(z)) ** 2).mean()))


def test_ddim_solves_the_known_ode():
    """500 steps give the quantile map, as --mode=pairs would store it."""
    z = jnp.linspace(-2.5, 2.5, 101).reshape(-1, 1)
    denoise = lambda z, t: Denoiser({}, mixture, SCHEDULE, "x0")(z, t)
    x = tiny.fast(lambda z: sampling.ddim(denoise, SCHEDULE, z, sampling.timesteps(SCHEDULE, 500)))(z)
    np.testing.assert_allclose(x, ode(z), atol=0.03)


@pytest.mark.parametrize("gan_weight", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_student_learns_the_ode(gan_weight):
    """With regression only, and with the discriminator added."""
    method = Diffusion2GAN(
        regression="l2", augment="none", gan_weight=gan_weight, r1_weight=0.1, r1_stride=8, ema_decay=0.99
    )
    assert trained(method, 2000) < 0.05


@pytest.mark.slow
def test_gan_with_mismatched_pairs_learns_the_ode():
    """Without regression: conditioned on the noise, the discriminator alone teaches the pairing."""
    method = Diffusion2GAN(
        regression_weight=0.0, regression="l2", gan_weight=1.0, mix_share=0.5, r1_weight=0.1, r1_stride=8,
        ema_decay=0.99,
    )  # fmt: skip
    assert trained(method, 4000) < 0.06

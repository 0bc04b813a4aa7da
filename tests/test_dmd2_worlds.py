"""DMD2 on problems with known solutions: a Gaussian with linear networks, a 2-D mixture with exact scores."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from cddistill.diffusion import DDPM, like
from cddistill.methods.dmd2 import DMD2
from cddistill.net import Denoiser
from cddistill.step import active, init_state, train_step

T = 8  # timesteps: few, so that small networks learn each of them sooner
SCHEDULE = DDPM(T, "squaredcos_cap_v2", zero_snr=True)
MEAN, STD = 1.5, 0.5


def train(method, frozen, nets, real, steps, rates, seed=0, size=256, dim=1):
    """Nets after `steps` steps, and the samples' mean during training; lax.scan over groups of `ratio` steps."""
    turns = method.turns()
    optimizers = {name: optax.adam(rates[name]) for name in turns}
    play = functools.partial(train_step, turns=turns, optimizers=optimizers, ema=method.ema(), seed=seed)

    def batch(step):
        zeros = jnp.zeros(size, jnp.int32)
        x0 = real(jax.random.fold_in(jax.random.key(seed + 100), step), (size, dim))
        return {"x0": x0, "text": zeros, "null": zeros, "index": jnp.arange(size)}

    def step(state, names):
        return play(state, frozen, batch(state.step), names)

    def group(state, _):
        state, metrics = step(state, active(turns, 0))
        state, _ = jax.lax.scan(lambda s, _: (step(s, active(turns, 1))[0], None), state, None, method.ratio - 1)
        return state, metrics["critic/sample_mean"]

    start = init_state(nets, turns, optimizers, method.ema())
    state, means = tiny.fast(lambda s: jax.lax.scan(group, s, None, steps // method.ratio))(start)
    return types.SimpleNamespace(**frozen, **state.nets, **{f"{k}_ema": v for k, v in state.ema.items()}), means


def falling(method, steps, student, critic):
    """Cosine learning rates that end at 0, each over its own number of updates."""
    cosine = optax.cosine_decay_schedule
    return {"student": cosine(student, steps // method.ratio), "critic": cosine(critic, steps)}


def drawn(method, n, size=20_000, dim=1):
    noise, zeros = jax.random.normal(jax.random.key(7), (size, dim)), jnp.zeros(size, jnp.int32)
    batch = {"text": zeros, "null": zeros, "index": jnp.arange(size)}
    return np.asarray(
        jax.jit(lambda z: method.sample(n, z, batch, tiny.step_noise(z, 8), len(method.student_timesteps)))(noise)
    )


# ---- a Gaussian


def linear(p, z, t, text=None):
    """v^ = a_t z + b_t."""
    return like(p["a"][t], z) * z + like(p["b"][t], z)


def gaussian(mean, std):
    """The exact v-network of N(mean, std^2)."""
    alpha, sigma = SCHEDULE.alpha_sigma(jnp.arange(T))
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # x^ = mean + gain (z - alpha mean)
    return Denoiser({"a": (alpha - gain) / sigma, "b": -(1 - gain * alpha) * mean / sigma}, linear, SCHEDULE, "v")


def steady(p, z, t, text=None):
    """x^ with the same mean and standard deviation at every timestep, if z is noised x^."""
    alpha, sigma = (like(c, z) for c in SCHEDULE.alpha_sigma(t))
    return p["mean"] + p["std"] * (z - alpha * p["mean"]) / jnp.sqrt((alpha * p["std"]) ** 2 + sigma**2)


def in_the_gaussian_world(steps=8000, seed=0, student=2e-2, critic=5e-3, **options):
    """Mean and standard deviation of samples of a student that starts at N(0, 1).

    The critic is trained on the samples of all timesteps together, so DMD2 determines their mixture, not each
    timestep's output. With separate weights, two timesteps reach means of 1.35 and 1.66 (another seed: 1.63 and 1.35),
    and 1.5 only together. Real networks share weights between timesteps, and so does this student.

    The critic's learning rate is the lower one, because its noise hides small differences of scores: at 2e-2, with
    1e-2 for the student, one of three seeds of the two-step student reached only (1.34, 1.03).
    """
    method = DMD2(gan_weight=0.0, **options)
    shared = Denoiser({"mean": jnp.zeros(()), "std": jnp.ones(())}, steady, SCHEDULE, "x0")
    nets = {"student": shared if len(method.student_timesteps) > 1 else gaussian(0.0, 1.0), "fake": gaussian(0.0, 1.0)}
    normal = lambda key, shape: MEAN + STD * jax.random.normal(key, shape)
    rates = falling(method, steps, student, critic)
    n, _ = train(method, {"teacher": gaussian(MEAN, STD)}, nets, normal, steps, rates, seed)
    x = drawn(method, n)
    return x.mean(), x.std()


OTHERS = [{"student_timesteps": (999, 499)}, {"weighting": "dmd1"}, {"weighting": "none"}]  # weightings only rescale g


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS)],
)
def test_student_matches_the_teachers_gaussian(options):
    mean, std = in_the_gaussian_world(**options)
    assert mean == pytest.approx(MEAN, abs=0.05)
    assert std == pytest.approx(STD, abs=0.05)


@pytest.mark.slow  # shows that the tests above can fail
def test_wrong_gradient_sign_diverges(monkeypatch):
    """A flipped sign passes every contract test (test_methods.py)."""
    right = DMD2.matching
    monkeypatch.setattr(DMD2, "matching", lambda self, *args: (-right(self, *args)[0], right(self, *args)[1]))
    mean, _ = in_the_gaussian_world(steps=1000)
    assert abs(mean - MEAN) > 1.0


def restlessness(ratio, steps=6000, student=0.05, critic=0.01, seed=0):
    """Standard deviation of the samples' mean over the second half of a training with constant learning rates."""
    method = DMD2(gan_weight=0.0, ratio=ratio)
    nets = {"student": gaussian(MEAN, STD), "fake": gaussian(MEAN, STD)}
    normal = lambda key, shape: MEAN + STD * jax.random.normal(key, shape)
    rates = {"student": student, "critic": critic}
    _, means = train(method, {"teacher": gaussian(MEAN, STD)}, nets, normal, steps, rates, seed)
    return means[len(means) // 2 :].std()


@pytest.mark.slow
def test_five_critic_updates_per_student_update_reduce_oscillation():
    """T33: after equally many critic updates, a ratio of 1 oscillates and one of 5 does not (sec. 4.2)."""
    assert restlessness(ratio=1) > 1.5 * restlessness(ratio=5)


# ---- a 2-D mixture

CENTRES = jnp.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
WIDTH = 0.35


def mixture(key, shape):
    """Fresh exact samples [n, 2]."""
    k_c, k_x = jax.random.split(key)
    centre = CENTRES[jax.random.randint(k_c, shape[:1], 0, len(CENTRES))]
    return centre + WIDTH * jax.random.normal(k_x, shape)


def exact(p, z, t, text=None):
    """E[x | z_t] of the mixture in closed form."""
    alpha, sigma = (c[:, None] for c in SCHEDULE.alpha_sigma(t))
    var = (alpha * WIDTH) ** 2 + sigma**2
    distance = ((z[:, None] - alpha[..., None] * CENTRES[None]) ** 2).sum(-1)
    mean = jax.nn.softmax(-distance / (2 * var), -1) @ CENTRES
    return mean + alpha * WIDTH**2 / var * (z - alpha * mean)


def perceptron(p, z, t, text=None):
    """v^ of an MLP with the timestep as one-hot input."""
    h = jnp.concatenate([z, jax.nn.one_hot(t, T)], -1)
    for w, b in p[:-1]:
        h = jax.nn.relu(h @ w + b[None])
    return h @ p[-1][0] + p[-1][1][None]


def random_perceptron(seed, widths=(2 + T, 64, 64, 2)):
    rng = np.random.default_rng(seed)
    layers = zip(widths, widths[1:], strict=False)
    return [(jnp.asarray(rng.normal(size=(i, o)) / np.sqrt(i), jnp.float32), jnp.zeros(o)) for i, o in layers]


def pretrained(seed=0, steps=2000):
    """An MLP denoiser of the mixture, from which student and critic start, as from a teacher's copy."""
    net = Denoiser(random_perceptron(seed), perceptron, SCHEDULE, "v")
    opt = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def step(carry, i):
        net, state = carry
        k_x, k_t, k_e = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3)
        x0, t = mixture(k_x, (512, 2)), jax.random.randint(k_t, (512,), 0, T)
        eps = jax.random.normal(k_e, x0.shape)
        grads = jax.grad(lambda n: n.dsm_loss(n.noise(x0, eps, t), t, x0, eps, None))(net)
        updates, state = opt.update(grads, state)
        return (optax.apply_updates(net, updates), state), None

    return tiny.fast(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))((net, opt.init(net)))[0][0]


def in_the_plane(steps=7500, seed=0, ratio=3, student=1e-2, critic=1e-2, size=512, **options):
    """One-step samples of an MLP student distilled from the exact teacher, [200_000, 2]."""
    method = DMD2(gan_weight=0.0, ema_decay=0.999, ratio=ratio, **options)
    start = pretrained(seed)
    nets = {"student": start, "fake": jax.tree.map(jnp.copy, start)}
    teacher, rates = Denoiser({}, exact, SCHEDULE, "x0"), falling(method, steps, student, critic)
    n, _ = train(method, {"teacher": teacher}, nets, mixture, steps, rates, seed, size, dim=2)
    return drawn(method, n, size=200_000, dim=2)


def sliced_wasserstein(a, b, projections=16):
    """Mean over directions of the 1-D Wasserstein distance of sets of n points in the plane, [sets, n, 2]."""
    angle = np.arange(projections) / projections * np.pi
    direction = np.stack([np.cos(angle), np.sin(angle)]).astype(a.dtype)
    return np.abs(np.sort(a @ direction, 1) - np.sort(b @ direction, 1)).mean((1, 2))


def ratio_to_exact(x, points):
    """Distance of x from exact samples relative to that of other exact samples, and its standard error, in sets of
    `points` points."""
    truth, fresh = (np.asarray(mixture(jax.random.key(seed), x.shape)) for seed in (11, 12))
    x, truth, fresh = (a.reshape(-1, points, 2) for a in (x, truth, fresh))
    student, exact_samples = sliced_wasserstein(x, truth), sliced_wasserstein(fresh, truth)
    ratio = student.mean() / exact_samples.mean()
    return ratio, (student - ratio * exact_samples).std() / exact_samples.mean() / np.sqrt(len(x))


@pytest.mark.slow
def test_one_step_student_matches_the_mixture():
    """At most 1.1 times the sliced Wasserstein distance of fresh exact samples.

    Exact sets of n points differ by O(n^-1/2) by chance: 0.05 for 1000, a seventh of a mode's width. Smaller sets
    would hide errors of that size. 200 sets bring the ratio's standard error below 0.03.
    """
    ratio, error = ratio_to_exact(in_the_plane(), points=1000)
    assert error < 0.03
    assert ratio <= 1.1

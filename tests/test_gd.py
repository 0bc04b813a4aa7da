"""Guided progressive distillation against closed forms: linear networks represent every stage on Gaussian data."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from cddistill import build, sampling
from cddistill.config import resolve
from cddistill.diffusion import DDPM, EDM, guide, like
from cddistill.method import normal, uniform
from cddistill.methods import METHODS
from cddistill.methods.gd import two_steps
from cddistill.models import adapter
from cddistill.net import Adapted, Denoiser
from cddistill.optim import OptimConfig, optimizer
from cddistill.step import init_state, train_step

GD = METHODS["gd"]
KEY = jax.random.key(3)
STD, T = 0.5, 16
SCHEDULE = DDPM(T, "squaredcos_cap_v2")
ALPHA, SIGMA = map(np.float64, SCHEDULE.alpha_sigma(jnp.arange(T)))
EXACT = ALPHA * STD**2 / (ALPHA**2 * STD**2 + SIGMA**2)  # E[x | z_t] = EXACT z for x ~ N(0, STD^2)
UNGUIDED = {"guidance_range": (1.0, 1.0), "embedding_width": 0}


def linear(gains):
    """x^ = gains[t] z."""
    apply = lambda p, z, t, text: like(p["gain"][t], z) * z
    return Denoiser({"gain": jnp.asarray(gains, jnp.float32)}, apply, SCHEDULE, "x0")


def step_gain(gains, t, alpha_s, sigma_s):
    """z_s / z_t of a DDIM step."""
    return alpha_s * gains[t] + sigma_s * (1 - ALPHA[t] * gains[t]) / SIGMA[t]


def halved(gains, steps):
    """The gains of a student of so many steps whose every step ends where two of its teacher do (algorithm 2)."""
    out, stride = np.zeros(T), T // steps
    for t in range(stride - 1, T, stride):
        middle, end = t - stride // 2, t - stride
        alpha, sigma = (ALPHA[end], SIGMA[end]) if end >= 0 else (1.0, 0.0)
        both = step_gain(gains, t, ALPHA[middle], SIGMA[middle]) * step_gain(gains, middle, alpha, sigma)
        out[t] = (both - sigma / SIGMA[t]) / (alpha - sigma * ALPHA[t] / SIGMA[t])
    return out


def batch_of(key=KEY, size=64):
    zero = jnp.zeros(size, jnp.int32)
    x0 = STD * jax.random.normal(key, (size, 1))
    return {"x0": x0, "text": zero, "null": zero, "index": jnp.arange(size)}


def namespace(step, student, previous):
    return SimpleNamespace(step=step, teacher=linear(EXACT), student=linear(student), student_ema=linear(previous))


# ---- the target


@pytest.mark.parametrize("schedule", [DDPM(), DDPM(zero_snr=True), EDM()], ids=["ddpm", "zero snr", "edm"])
def test_one_step_with_the_target_ends_where_two_steps_of_the_teacher_end(schedule):
    denoise = Denoiser({}, lambda p, z, t: jnp.tanh(z), schedule, "v")
    total, z = 8, tiny.randn(0, 8, 5)
    i = jnp.arange(1.0, 9.0)  # one sample for every step of the student
    found = two_steps(denoise, schedule, z, i, total)
    for k in range(8):
        u = [(k + 1) / total, (k + 0.5) / total, k / total]
        t, middle, end = (schedule.at(jnp.float32(x)) for x in u)
        alpha, sigma = schedule.alpha_sigma(end) if k else (1.0, 0.0)
        levels = schedule.alpha_sigma(middle)[0], alpha, schedule.alpha_sigma(middle)[1], sigma
        pair = tuple(jnp.stack(levels[j : j + 2]) for j in (0, 2))
        start = z[k : k + 1] / jnp.maximum(schedule.alpha_sigma(t)[1], 1.0)  # which ddim multiplies again
        two = sampling.ddim(denoise, schedule, start, jnp.stack([t, middle]), pair)
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        one = alpha * found[k] + sigma * (z[k] - alpha_t * found[k]) / sigma_t
        np.testing.assert_allclose(one, two[0], atol=1e-6 * np.abs(two).max(), rtol=1e-6)


def test_every_stage_has_the_exact_student_of_the_stage_before_as_its_minimum():
    """The loss is 0 there, and only there; at last one step does what 16 steps of the teacher did."""
    method, previous = GD(first_steps=16, halvings=4, halve_every=10, **UNGUIDED), EXACT
    at = jax.jit(lambda *n: method.loss(namespace(*n), batch_of(), KEY))
    for stage, steps in enumerate((8, 4, 2, 1)):
        student = halved(previous, steps)
        for step in (10 * stage, 10 * stage + 9):
            loss, metrics = at(step, student, previous)
            assert loss < 1e-9
            assert metrics == {"steps": steps}
        assert at(10 * stage, previous, previous)[0] > 1e-6
        previous = student
    noise = tiny.randn(0, 100, 1)
    one = method.sample(namespace(0, EXACT, previous), noise, batch_of(size=100), None, 1)
    many = method.sample(namespace(0, previous, EXACT), noise, batch_of(size=100), None, 16)
    np.testing.assert_allclose(one, many, atol=1e-5)
    assert 0.3 < float(one.std()) < STD  # of DDIM in 16 steps


def test_errors_at_little_noise_weigh_more():
    """The weight is the SNR, but at least 1."""
    method = GD(first_steps=16, halvings=1, **UNGUIDED)
    student, batch = halved(EXACT, 8), batch_of(size=4096)
    i = np.floor(np.asarray(uniform(jax.random.split(KEY, 3)[0], batch["index"])) * 8).astype(int)
    for k in range(8):
        t, off = 2 * k + 1, student.copy()
        off[t] += 0.1
        z = ALPHA[t] * batch["x0"] + SIGMA[t] * normal(jax.random.split(KEY, 3)[1], batch["index"], (1,))
        expected = max((ALPHA[t] / SIGMA[t]) ** 2, 1) * np.mean((i == k) * (0.1 * z[:, 0]) ** 2)
        np.testing.assert_allclose(method.loss(namespace(0, off, EXACT), batch, KEY)[0], expected, rtol=1e-3)


# ---- guidance


def test_the_first_stage_matches_the_guided_teacher():
    method, batch = GD(embedding_width=4, halve_every=5), tiny.make_batch()
    state = tiny.jitter(init_state(method.init(KEY, tiny.frozen(), batch), {}, {}, method.ema()))
    n = SimpleNamespace(**tiny.frozen(), **state.nets, student_ema=state.ema["student"])
    k_t, k_eps, k_w = jax.random.split(KEY, 3)
    t = np.floor(np.asarray(uniform(k_t, batch["index"])) * 1000).astype(int)
    scales = np.asarray(3 + 12 * uniform(k_w, batch["index"]))
    alpha, sigma = (np.asarray(x)[:, None, None, None] for x in n.teacher.schedule.alpha_sigma(t))
    z_t = alpha * batch["x0"] + sigma * normal(k_eps, batch["index"], batch["x0"].shape[1:])
    view = jax.jit(lambda z, text: n.teacher(z, t, text).x0)
    target = guide(*(view(z_t, batch[x]) for x in ("text", "null")), jnp.array(scales)[:, None, None, None])
    angles = 1000 * (scales[:, None] - 1) * np.array([[1, 1e-4]])
    text = batch["text"] | {"timestep_cond": np.float32(np.concatenate([np.sin(angles), np.cos(angles)], 1))}
    found = jax.jit(lambda text: n.student(z_t, t, text).x0)(text)
    expected = (np.maximum((alpha / sigma) ** 2, 1) * (found - target) ** 2).mean()
    at = jax.jit(lambda step: method.loss(SimpleNamespace(**(vars(n) | {"step": step})), batch, KEY))
    np.testing.assert_allclose(at(4)[0], expected, rtol=2e-4)  # sinusoids of thousands in float32
    assert [at(step)[1]["steps"] for step in (4, 5, 10, 24)] == [1000, 32, 16, 4]


# ---- stages


@functools.cache
def trained():
    """The states after every step of three stages."""
    method = GD(first_steps=8, halvings=3, halve_every=300, **UNGUIDED)
    frozen, optimizers = {"teacher": linear(EXACT)}, {"student": optax.adam(optax.cosine_decay_schedule(2e-2, 900))}
    step = functools.partial(train_step, turns=method.turns(), optimizers=optimizers, ema=method.ema())

    def one(state, i):
        state, _ = step(state, frozen, batch_of(jax.random.fold_in(KEY, i), 256), ("student",))
        return state, (state.nets["student"].params["gain"], state.ema["student"].params["gain"])

    state = init_state({"student": linear(EXACT)}, method.turns(), optimizers, method.ema())
    return tiny.fast(lambda state: jax.lax.scan(one, state, jnp.arange(900))[1])(state)


def test_the_teacher_of_a_stage_is_the_student_of_the_one_before():
    students, teachers = map(np.asarray, trained())
    np.testing.assert_array_equal(teachers[:299], np.broadcast_to(np.float32(EXACT), (299, T)))
    for end in (299, 599, 899):
        stage = teachers[end : end + 300]
        np.testing.assert_array_equal(stage, np.broadcast_to(students[end], stage.shape))
    assert (students[299] != students[298]).any()


def test_training_finds_the_exact_students():
    """One step of the last does what 8 steps of the teacher do."""
    expected = functools.reduce(halved, (4, 2, 1), EXACT)[T - 1]
    assert abs(EXACT[T - 1] - expected) > 0.1
    np.testing.assert_allclose(trained()[1][-1][T - 1], expected, atol=0.01)


def test_the_learning_rate_may_start_anew_in_each_stage():
    """Plain Adam with zero gradients but weight decay shows the rate: w changes by -lr w."""
    config = OptimConfig(lr=0.1, weight_decay=1.0, decay="linear", warmup=1, cycles=2)
    opt, w, rates = optimizer(config, 8), jnp.ones(()), []
    state = opt.init(w)
    for _ in range(8):
        update, state = opt.update(jnp.zeros(()), state, w)
        rates.append(-float(update))
    np.testing.assert_allclose(rates, 2 * [0, 0.1, 0.2 / 3, 0.1 / 3], atol=1e-6)


# ---- conditional teachers


def test_a_conditional_teacher_is_halved_with_its_condition():
    """GD-II: at step 0 the target is two steps of the teacher with its ControlNet."""
    method, batch = GD(first_steps=4, halvings=1, adapter="controlnet", **UNGUIDED), tiny.make_batch()
    branch = tiny.disturbed(adapter.make_branch(tiny.teacher(), KEY))
    frozen = tiny.frozen() | {"controlnet": branch}
    nets = method.init(KEY, frozen, batch)
    assert method.exports() == {"unet": "student", "controlnet": "student_branch"}
    assert method.turns()["student"].moves == ("student", "student_branch") == (*nets,)
    n = SimpleNamespace(step=0, **frozen, **nets, **{f"{name}_ema": net for name, net in nets.items()})
    noise, teacher = tiny.randn(0, 16, 8, 8, 3), Adapted(tiny.teacher(), branch)

    @jax.jit
    def both(noise, batch):
        schedule, denoise = n.teacher.schedule, lambda z, t: teacher(z, t, batch["text"], batch["cond"])
        expected = sampling.ddim(denoise, schedule, noise, schedule.grid(2))
        return method.sample(n, noise, batch, None, 2), expected, method.loss(n, batch, KEY)[0]

    drawn, expected, loss = both(noise, batch)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert abs(loss - both(noise, batch | {"cond": batch["cond"][::-1]})[2]) > 1e-6


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"first_steps": 12, "halvings": 3}, "first_steps=12 cannot be halved method.halvings=3 times"),
        ({"guidance_range": (1.0, 1.0)}, "need method.embedding_width=0"),
        ({"adapter": "concat"}, "need method.embedding_width=0"),
        ({"adapter": "lora"}, "method.adapter='lora' must be one of none, controlnet"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        resolve({"method": {"name": "gd"} | options})


def test_numbers_of_steps_that_do_not_fit_are_refused(teacher):
    with pytest.raises(ValueError, match="students of this method take 64, 32, 16, 8, 4 steps, .* not 2: set sample_"):
        GD().sampling(tiny.teacher().schedule, 2)
    with pytest.raises(ValueError, match="the teacher has fewer timesteps than method.first_steps=64"):
        GD(**UNGUIDED).init(KEY, {"teacher": linear(EXACT)}, {})
    settings = {"method": {"name": "gd", "halve_every": 10}, "teacher": str(teacher), "steps": 25}
    with pytest.raises(ValueError, match="steps=25 is no number of whole stages: .* multiple of .*=10 up to 50"):
        build.build(resolve(settings))

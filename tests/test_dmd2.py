"""DMD2's equations one by one, against numbers of the released code; labels T1 ... T34 are those of docs/dmd2.md."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import build, config, losses, models
from cddistill.diffusion import DDPM, EDM
from cddistill.method import normal
from cddistill.methods import dmd2
from cddistill.methods.dmd2 import DMD2
from cddistill.models import discriminator, lora
from cddistill.net import Denoiser, Net
from cddistill.optim import OptimConfig, optimizer
from cddistill.sampling import level_to_time
from cddistill.step import active, init_state, train_step

SD = DDPM()
# Inputs A: two samples of 2 x 2 pixels, with what teacher and critic predict for them.
X = jnp.array([[[[1.0], [2.0]], [[3.0], [4.0]]], [[[0.0], [0.5]], [[-0.5], [1.0]]]])
REAL = jnp.array([[[[0.5], [2.5]], [[2.0], [4.0]]], [[[0.25], [0.25]], [[-0.75], [0.5]]]])
FAKE = jnp.array([[[[1.0], [2.0]], [[2.5], [3.0]]], [[[0.0], [0.25]], [[-0.5], [1.5]]]])
G = np.array([1, -1, 1, -2, -0.8, 0, 0.8, 3.2])


def says(x0, schedule=SD, predicts="x0", features=None):
    """A network with constant output x0; its params only carry gradients."""

    def apply(p, z, t, text=None, features=False):
        out = x0 + 0.0 * p["w"] + 0.0 * z
        return (out, p["w"] * z) if features else out

    return Denoiser({"w": jnp.ones(())}, apply, schedule, predicts)


def world(method, x=X, real=REAL, fake=FAKE, schedule=SD):
    """Roles n, batch and key: the student generates x, teacher and critic predict real and fake."""
    n = types.SimpleNamespace(teacher=says(real, schedule), fake=says(fake, schedule), student=says(x, schedule))
    n.disc = Net({"w": jnp.ones(())}, lambda p, h: p["w"] * h.mean((1, 2, 3)))
    zeros = jnp.zeros(len(x), jnp.int32)
    return n, {"x0": x, "text": zeros, "null": zeros, "index": jnp.arange(len(x))}, jax.random.key(0)


def test_dm_gradient_equals_the_released_code():
    """T1, T2: g, the loss 1.1575 and its gradient g / 8 at the sample."""
    method = DMD2(gan_weight=0.0)
    n, batch, key = world(method)
    np.testing.assert_allclose(method.matching(n, X, batch, key)[0].ravel(), G, atol=1e-6)
    loss, logs = method.student_loss(n, batch, key)
    np.testing.assert_allclose(loss, 1.1575, rtol=1e-6)
    np.testing.assert_allclose(logs["dm"], 0.5 * (G**2).mean(), rtol=1e-6)

    def of_sample(x):
        return method.student_loss(types.SimpleNamespace(**(vars(n) | {"student": says(x)})), batch, key)[0]

    np.testing.assert_allclose(jax.grad(of_sample)(X).ravel(), G / 8, atol=1e-7)


def test_dm_gradient_is_per_sample_and_scale_invariant():
    """T3, T4: g depends neither on other samples of the batch nor on a factor of 7 in everything."""
    method = DMD2(gan_weight=0.0)
    n, batch, key = world(method)
    alone, one, _ = world(method, X[1:], REAL[1:], FAKE[1:])
    np.testing.assert_allclose(method.matching(alone, X[1:], one, key)[0].ravel(), G[4:], atol=1e-6)
    scaled, _, _ = world(method, 7 * X, 7 * REAL, 7 * FAKE)
    np.testing.assert_allclose(method.matching(scaled, 7 * X, batch, key)[0].ravel(), G, atol=1e-6)


def test_descent_moves_samples_towards_the_teacher():
    """T5, T6: descending g moves from the critic's x0 to the teacher's; equal scores have loss 0."""
    method = DMD2(gan_weight=0.0)
    n, batch, key = world(method)
    moved = X - 0.1 * method.matching(n, X, batch, key)[0]
    assert ((moved - X) * (REAL - FAKE)).sum() > 0
    same, _, _ = world(method, fake=REAL)
    assert method.student_loss(same, batch, key)[0] == 0


def test_dm_gradient_is_finite_where_the_teacher_agrees():
    """T30: |x - real| = 0, where the released code gives infinity."""
    method = DMD2(gan_weight=0.0)
    n, batch, key = world(method, real=X)
    assert jnp.isfinite(method.matching(n, X, batch, key)[0]).all()


def test_weightings():
    """dmd1 has a further factor alpha_t (DMD, eq. 8); none is the bare difference of the x0s."""
    n, batch, key = world(DMD2())
    np.testing.assert_allclose(DMD2(weighting="none").matching(n, X, batch, key)[0], FAKE - REAL, atol=1e-6)
    one_time = functools.partial(DMD2, dm_range=(500, 500))
    first = [one_time(weighting=w).matching(n, X, batch, key)[0].ravel()[0] for w in ("dmd1", "dmd")]
    np.testing.assert_allclose(first[0] / first[1], SD.alpha_sigma(500)[0], rtol=1e-5)


def test_guidance_applies_to_the_teacher_only():
    """T23: real = null + w (text - null); the critic is never guided."""
    method = DMD2(real_guidance=3.0, gan_weight=0.0)
    n, batch, key = world(method)
    told = Denoiser({}, lambda p, z, t, text: REAL * text.reshape(-1, 1, 1, 1), SD, "x0")
    n.teacher, n.fake = told, says(FAKE)
    batch |= {"text": jnp.ones(2), "null": 0.5 * jnp.ones(2)}
    real = 0.5 * REAL + 3.0 * (REAL - 0.5 * REAL)
    expected = (FAKE - real) / np.abs(X - real).mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(method.matching(n, X, batch, key)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_networks_are_told_their_noise_level_and_text(features):
    """Each loss has its own range of levels. Only the teacher's score has a null text, for guidance."""
    method = DMD2(
        dm_range=(100, 100), fake_range=(300, 300), gan_range=(500, 500), real_guidance=2.0, gan_features=features
    )
    calls, (n, batch, key) = [], world(DMD2())
    for name, x0 in (("student", 300.0), ("fake", 0.0), ("teacher", 0.0)):
        setattr(n, name, tiny.noting(calls, name, x0=x0))
    batch |= {"x0": 0.0 * X + 2000.0, "text": jnp.full(2, 7), "null": jnp.full(2, 3)}
    drawn, real = 1000.0, 2000.0  # the student's samples are 300 + 100 text

    def noised(role, level, text, x0):
        return role, level, text, pytest.approx(float(SD.alpha_sigma(level)[0]) * x0, abs=3.0)

    tiny.run_noting(lambda: method.critic_loss(n, batch, key))
    start, judged = noised("student", 999, 7, 0.0), noised(f"{features} features", 500, 7, drawn)
    assert calls == [start, noised("fake", 300, 7, drawn), judged, noised(f"{features} features", 500, 7, real)]
    calls.clear()
    tiny.run_noting(lambda: method.student_loss(n, batch, key))
    teacher = [noised("teacher", 100, text, drawn) for text in (7, 3)]
    assert calls == [start, *teacher, noised("fake", 100, 7, drawn), judged]


@pytest.mark.parametrize(("decay", "role"), [(0.9, "average"), (0.0, "student")])
def test_samples_are_drawn_with_the_average_and_the_text(decay, role):
    calls, (n, batch, _) = [], world(DMD2())
    n.student, n.student_ema = tiny.noting(calls, "student"), tiny.noting(calls, "average")
    batch |= {"text": jnp.full(2, 7), "null": jnp.full(2, 3)}
    method = DMD2(student_timesteps=(999, 499), ema_decay=decay)
    tiny.run_noting(jax.jit(lambda: method.sample(n, X, batch, lambda i: X, 2)))
    assert [call[:3] for call in calls] == [(role, 999, 7), (role, 499, 7)]


class Scale(nn.Module):
    """w z, in the type of its layers."""

    dtype: object = jnp.bfloat16

    @nn.compact
    def __call__(self, z_t, t, encoder_hidden_states=None):
        w = self.param("w", nn.initializers.ones, ())
        return (w.astype(self.dtype) * z_t.astype(self.dtype)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A function with another one in a field, as that of a network with its branch has."""

    inner: models.convert.Apply

    def __call__(self, *args):
        return self.inner(*args)


@pytest.mark.parametrize(("nets", "exact"), [("none", ()), ("fake", ("fake",)), ("both", ("fake", "teacher"))])
def test_scores_of_distribution_matching_may_compute_in_float32(nets, exact):
    """x0 = (z - sigma w z) / alpha, in which a bfloat16 product has 8 bits."""
    method = DMD2(dm_range=(900, 900), weighting="none", dm_float32=nets)
    n, batch, key = world(method)
    n.fake = Denoiser({"w": jnp.float32(0.3)}, models.convert.Apply(Scale()), SD, "eps")
    n.teacher = Denoiser({"w": jnp.float32(0.7)}, Wrapped(models.convert.Apply(Scale())), SD, "eps")
    z_t = n.teacher.noise(X, normal(jax.random.split(key)[1], batch["index"], X.shape[1:]), 900)
    alpha, sigma = SD.alpha_sigma(900)

    def x0(name, w):
        kind = jnp.float32 if name in exact else jnp.bfloat16
        return (z_t - sigma * (kind(w) * z_t.astype(kind)).astype(jnp.float32)) / alpha

    expected = x0("fake", 0.3) - x0("teacher", 0.7)
    np.testing.assert_allclose(method.matching(n, X, batch, key)[0], expected, rtol=1e-5, atol=1e-5)


def test_noise_levels_equal_the_released_code():
    """T8, T22: EDM's Karras grid, least noisy first, and Stable Diffusion's alphas."""
    sigma = np.asarray(level_to_time(EDM(), range(1000)))
    want = {0: 0.002, 1: 0.0020502, 20: 0.00323159, 500: 2.5265076, 980: 72.0538712, 998: 79.5637894, 999: 79.9999847}
    np.testing.assert_allclose(sigma[[*want]], [*want.values()], rtol=2e-5)
    np.testing.assert_array_equal(level_to_time(SD, range(1000)), np.arange(1000))
    bar = SD.alpha_sigma(level_to_time(SD, range(1000)))[0] ** 2
    want = {20: 0.98131, 249: 0.67543, 399: 0.42609, 499: 0.27767, 749: 0.056623, 980: 0.0058438, 999: 0.0046601}
    np.testing.assert_allclose(np.asarray(bar)[[*want]], [*want.values()], rtol=1e-4)


@pytest.mark.parametrize("levels", [(20, 980), (0, 999), (7, 7)])
def test_random_timesteps_cover_their_range(levels):
    """T9: uniformly, both ends included."""
    n, batch, key = world(DMD2())
    t = DMD2().random_timesteps(n, key, {"index": jnp.arange(100_000)}, levels)
    assert (int(t.min()), int(t.max())) == levels
    np.testing.assert_allclose(t.mean(), np.mean(levels), atol=4.0)


@pytest.mark.parametrize(("levels", "golden"), [((0, 999), 39063.293), ((500, 20), 3741.2891)])
def test_edm_critic_loss_is_weighted(levels, golden):
    """T11, T12: mean of (sigma^-2 + 4) (critic - x)^2 with the two samples at these levels."""
    t = level_to_time(EDM(), levels)
    loss, _ = losses.denoising(says(FAKE, EDM()), X, jnp.zeros_like(X), t, jnp.zeros(2))
    np.testing.assert_allclose(loss, golden, rtol=1e-5)


def test_eps_and_v_critics_use_plain_mse():
    """E13: plain mean squared error in eps or in v."""
    eps, t = tiny.randn(1, *X.shape), jnp.array([100, 800])
    alpha, sigma = (c.reshape(2, 1, 1, 1) for c in SD.alpha_sigma(t))
    got, _ = losses.denoising(says(FAKE, predicts="eps"), X, eps, t, jnp.zeros(2))
    np.testing.assert_allclose(got, ((FAKE - eps) ** 2).mean(), rtol=1e-6)
    got, _ = losses.denoising(says(FAKE, predicts="v"), X, eps, t, jnp.zeros(2))
    np.testing.assert_allclose(got, ((FAKE - (alpha * eps - sigma * X)) ** 2).mean(), rtol=1e-6)


def test_gan_losses(monkeypatch):
    """T13, T14: logits [2, -1] for real and [0.5, -3] for generated images."""
    method = DMD2(dm_weight=0.0, gan_weight=1.0, critic_gan_weight=1.0)
    n, batch, key = world(method)
    batch["x0"] = X + 100.0
    real, drawn = jnp.array([2.0, -1.0]), jnp.array([0.5, -3.0])

    def logits(self, n, x, batch, key):
        return jnp.where(x.mean() > 50, real, drawn) + 0 * x.sum()

    monkeypatch.setattr(DMD2, "logits", logits)
    np.testing.assert_allclose(method.student_loss(n, batch, key)[0], 1.76133215, rtol=1e-6)
    loss, logs = method.critic_loss(n, batch, key)
    np.testing.assert_allclose(logs["gan"], 1.23142695, rtol=1e-6)
    np.testing.assert_allclose(loss - logs["denoising"], 1.23142695, rtol=1e-5)
    assert (logs["real_accuracy"], logs["generated_accuracy"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("channels", "size", "count"), [(768, 8, 18_879_745), (1280, 8, None), (1280, 32, None), (8, 5, None)]
)
def test_discriminator_head_sizes(channels, size, count):
    """T15: one logit per sample; EDM's head has the released code's number of weights."""
    shape = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    head = jax.eval_shape(lambda: discriminator.make_head(shape, jax.random.key(0)))
    if count:
        assert sum(x.size for x in jax.tree.leaves(head)) == count
    convs = [name for name in head.params if name.startswith("conv_") and name != "conv_out"]
    assert len(convs) == {8: 2, 32: 4, 5: 1}[size]
    assert jax.eval_shape(lambda h, x: h(x), head, shape).shape == (2,)


def test_discriminator_head_refuses_a_small_bottleneck():
    with pytest.raises(ValueError, match="bottleneck is 2 x 2"):
        jax.eval_shape(lambda: discriminator.make_head(jnp.zeros((1, 2, 2, 8)), jax.random.key(0)))


def affine(p, z, t, text):
    """A student whose output depends on its input and timestep."""
    return p["w"] * z + 0.001 * t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("step", range(4))
def test_backward_simulation(step, monkeypatch):
    """T24: the student first takes `step` steps without a gradient, each followed by new noise; with step 0 its input
    is the noise itself."""
    method = DMD2(student_timesteps=(999, 749, 499, 249), gan_weight=0.0)
    student = Denoiser({"w": jnp.float32(0.7)}, affine, SD, "x0")
    n, batch, key = world(method)
    monkeypatch.setattr(jax.random, "randint", lambda *a, **k: jnp.int32(step))

    @jax.jit
    def made(params):
        return method.generate(
            types.SimpleNamespace(**vars(n) | {"student": student.replace(params=params)}), batch, key
        )

    _, k_noise, k_anew = jax.random.split(key, 3)
    noise = functools.partial(dmd2.normal, index=batch["index"], shape=X.shape[1:])
    z = noise(k_noise)
    for i in range(step):
        x0 = student(z, method.student_timesteps[i], None).x0
        z = student.noise(x0, noise(jax.random.fold_in(k_anew, i)), method.student_timesteps[i + 1])
    np.testing.assert_allclose(made(student.params), student(z, method.student_timesteps[step], None).x0, rtol=1e-5)
    grad = jax.jacfwd(made)(student.params)["w"]  # through one call only: d(w z + t) / dw = z
    np.testing.assert_allclose(grad, z, rtol=1e-5)


def test_every_student_timestep_is_trained():
    """The timestep is the same for the whole batch, and uniform over the student's timesteps."""
    method = DMD2(student_timesteps=(999, 749, 499, 249), gan_weight=0.0)
    n, batch, _ = world(method)
    n.student = Denoiser({}, lambda p, z, t, text: 0 * z + t.reshape(-1, 1, 1, 1), SD, "x0")
    drawn = np.asarray(
        jax.jit(jax.vmap(lambda k: method.generate(n, batch, k)))(jax.random.split(jax.random.key(0), 400))
    )
    assert (drawn == drawn[:, :1, :1, :1]).all()
    times, counts = np.unique(np.round(drawn[:, 0, 0, 0, 0]), return_counts=True)
    assert list(times) == [249, 499, 749, 999]
    assert counts.min() > 70


def test_without_backward_simulation_inputs_are_noised_data():
    """The ablation: t per sample, data noised to t as input, pure noise at the first timestep."""
    method = DMD2(student_timesteps=(999, 499), gan_weight=0.0, backward_simulation=False)
    n, batch, key = world(method)
    batch = {"x0": jnp.full((1000, 1, 1, 1), 50.0), "text": jnp.zeros(1000), "index": jnp.arange(1000)}
    n.student = Denoiser({}, lambda p, z, t, text: z + 1000 * t.reshape(-1, 1, 1, 1), SD, "x0")
    seen = np.asarray(method.generate(n, batch, key)).ravel()
    late = seen > 998_000
    assert 400 < late.sum() < 600
    assert abs(np.mean(seen[late] - 999_000)) < 0.2
    np.testing.assert_allclose(np.mean(seen[~late] - 499_000), 50 * SD.alpha_sigma(499)[0], rtol=0.02)


def test_one_step_student_at_an_earlier_timestep():
    """T25: with t = 399 the input is pure noise all the same, and x = (z - 0.757571 eps^) / 0.652753."""
    method = DMD2(student_timesteps=(399,), gan_weight=0.0)
    n, batch, _ = world(method)
    n.student = says(FAKE, predicts="eps")
    z = tiny.randn(3, *X.shape)
    got = method.sample(n, z, batch, tiny.step_noise(z, 0), 1)
    np.testing.assert_allclose(got, (z - 0.757571 * FAKE) / 0.652753, rtol=1e-5)


def test_edm_student_starts_at_sigma_80():
    """E4: x = D(80 z; 80)."""
    n, _, _ = world(DMD2(), schedule=EDM())
    z = tiny.randn(3, *X.shape)
    np.testing.assert_allclose(DMD2().start(n, z), 80.0 * z, rtol=1e-5)


def test_four_step_student_also_samples_in_one_or_two_steps():
    method = DMD2(student_timesteps=(999, 749, 499, 249))
    assert method.sampling_levels(2) == (999, 499)
    assert method.sampling_levels(1) == (999,)
    with pytest.raises(ValueError, match="cannot be sampled in 3 steps"):
        method.sampling_levels(3)


@functools.cache
def played(**options):
    """{turn: its loss's gradients for every network}, at randomly perturbed weights."""
    method = DMD2(**options)
    frozen = tiny.frozen()
    batch = tiny.make_batch(size=4)
    nets = jax.jit(lambda: method.init(jax.random.key(0), frozen, batch))()
    rng = np.random.default_rng(0)
    nets = jax.tree.map(lambda x: x + 0.05 * jnp.asarray(rng.normal(size=x.shape), jnp.float32), nets)

    def loss(everything, turn):
        return method.turns()[turn].loss(types.SimpleNamespace(**everything), batch, jax.random.key(1))[0]

    everything = frozen | nets
    return {t: jax.jit(jax.grad(loss), static_argnums=1)(everything, t) for t in method.turns()}


def moved(net):
    """Top-level modules of a network that receive a gradient."""
    return {name for name, tree in net.params.items() if any(np.abs(x).max() > 0 for x in jax.tree.leaves(tree))}


def test_student_loss_gradient_reaches_only_the_student():
    """T7, T17: even without the step's restriction, although g and the logits come from other networks."""
    grads = played(gan_weight=0.1, real_guidance=2.0)["student"]
    assert moved(grads["student"])
    for name in ("teacher", "fake", "disc"):
        assert not moved(grads[name]), name


def test_critic_loss_gradient_reaches_only_critic_and_head():
    """T16, T18."""
    grads = played(gan_weight=0.1, real_guidance=2.0)["critic"]
    assert moved(grads["fake"])
    assert moved(grads["disc"])
    for name in ("teacher", "student"):
        assert not moved(grads[name]), name


def test_gan_gradient_reaches_only_the_critics_encoder():
    """T16: features are taken before the decoder."""
    n = models.init(tiny.UNET | {"layers_per_block": 1}, zero_out=False)
    batch = tiny.make_batch(size=4)
    grad = jax.jit(jax.grad(lambda n: (n.features(batch["x0"], 500, batch["text"]) ** 2).sum()))(n)
    assert {name.split("_")[0] for name in moved(grad)} == {"conv", "time", "class", "down", "mid"}
    assert "conv_out" not in moved(grad)


def test_two_time_scale_updates():
    """T19: in 11 steps of ratio 5 the student is updated at 0, 5 and 10, the critic always."""
    turns = DMD2(ratio=5).turns()
    played_at = [active(turns, i) for i in range(11)]
    assert [i for i, names in enumerate(played_at) if "student" in names] == [0, 5, 10]
    assert all("critic" in names for names in played_at)


def test_critic_is_updated_before_the_student():
    """T20: on a student's step too, the critic sees samples from before the student's update."""
    assert [*DMD2().turns()] == ["critic", "student"]


def test_lora_student_and_critic_share_the_teachers_weights():
    """Only low-rank factors are trained, and the initial student equals the teacher."""
    method = DMD2(student_lora="blocks", fake_lora="attention", lora_rank=2, gan_weight=0.0)
    teacher = models.init(tiny.UNET | {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"],
                                       "attention_head_dim": 4}, 0, zero_out=False)  # fmt: skip
    nets = method.init(jax.random.key(0), {"teacher": teacher}, tiny.make_batch(size=2))
    assert isinstance(nets["student"].apply, lora.Update)
    n = types.SimpleNamespace(teacher=teacher, **nets)
    jax.tree.map(np.testing.assert_array_equal, method.student(n).params, teacher.params)
    size = sum(x.size for x in jax.tree.leaves((nets["student"], nets["fake"])))
    assert size < 0.5 * sum(x.size for x in jax.tree.leaves(teacher))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dm_weight": 0.0, "gan_weight": 0.0}, "the student has no loss"),
        ({"gan_features": "vgg"}, "must be one of fake, teacher"),
        ({"dm_float32": "teacher"}, "must be one of none, fake, both"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        config.resolve({"method": {"name": "dmd2"} | options})


def test_guidance_needs_a_conditional_teacher(tmp_path):
    net = models.init(tiny.UNET | {"num_class_embeds": None}, 0)
    models.save(tmp_path, "unet", net.params, net.module.to_config())
    c = config.defaults("dmd2")
    c.update(teacher=str(tmp_path), batch_size=8, sample_steps=(1,))
    c.data.size = 8
    c.method.real_guidance = 2.0
    with pytest.raises(ValueError, match="needs a teacher with classes or text"):
        build.build(config.resolve(c))


def test_too_large_lora_rank_is_refused():
    with pytest.raises(ValueError, match="rank 64 is not between 1 and the full rank"):
        DMD2(student_lora="blocks").init(jax.random.key(0), {"teacher": tiny.teacher()}, tiny.make_batch(size=2))


@pytest.mark.slow
def test_edm_networks_work_as_teachers():
    """T16: with sigma as time, E12's weighting, and features from before the decoder."""
    config = {"_class_name": "DhariwalUNet", "img_resolution": 8, "label_dim": 4, "model_channels": 8, "num_blocks": 1,
              "channel_mult": [1, 2], "attn_resolutions": [], "channels_per_head": 8}  # fmt: skip
    teacher, method = models.init(config, 0, zero_out=False), DMD2(gan_weight=0.1, real_guidance=1.5)
    batch = tiny.make_batch(size=4) | {"null": {"class_labels": np.full(4, 4, "i")}}
    nets = jax.jit(lambda: method.init(jax.random.key(0), {"teacher": teacher}, batch))()
    n = {"teacher": teacher, **nets}
    for name, turn in method.turns().items():

        def loss(moving, turn=turn):
            return turn.loss(types.SimpleNamespace(**n | moving), batch, jax.random.key(1))

        (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))({k: n[k] for k in turn.moves})
        assert jnp.isfinite(value), name
        assert all(moved(grads[k]) for k in turn.moves), name
    look = jax.jit(jax.grad(lambda net: (net.features(batch["x0"], jnp.float32(3.0), batch["text"]) ** 2).sum()))
    assert not {name for name in moved(look(teacher)) if name.startswith(("dec", "out"))}


def test_warm_up_counts_the_updates_of_its_own_turn():
    """With ratio 3 the student's 4 updates take 12 steps. Adam moves by its rate, because the gradient is constant."""
    turns = {
        name: turn._replace(moves=(name,), loss=lambda n, batch, key, name=name: (getattr(n, name), {}))
        for name, turn in DMD2(ratio=3).turns().items()
    }
    optimizers = {name: optimizer(OptimConfig(lr=1.0, warmup=4), 100) for name in turns}
    state = init_state({name: jnp.zeros(()) for name in turns}, turns, optimizers, {})
    step = jax.jit(functools.partial(train_step, turns=turns, optimizers=optimizers, ema={}), static_argnums=3)
    seen = [state.nets]
    for i in range(16):
        state, _ = step(state, {}, {}, active(turns, i))
        seen.append(state.nets)
    rates = {name: -np.diff([float(nets[name]) for nets in seen]) for name in turns}
    np.testing.assert_allclose(rates["critic"], [0.0, 0.25, 0.5, 0.75] + 12 * [1.0], atol=1e-4)
    np.testing.assert_allclose(rates["student"][::3], [0.0, 0.25, 0.5, 0.75, 1.0, 1.0], atol=1e-4)


def test_optimiser_equals_pytorchs_adamw():
    """T27, T28: one step on a gradient of norm 20, clipped to 10, against AdamW's formulas (decoupled decay)."""
    config = OptimConfig(lr=1e-2, weight_decay=1e-2, clip=10.0)
    w, g = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.0, 12.0, 16.0])
    opt = optimizer(config, 10)
    update, _ = opt.update(g, opt.init(w), w)
    clipped = g * 0.5
    m, v = 0.1 * clipped / (1 - 0.9), 0.001 * clipped**2 / (1 - 0.999)
    np.testing.assert_allclose(w + update, w * (1 - 1e-4) - 1e-2 * m / (jnp.sqrt(v) + 1e-8), atol=1e-7)
    eps = dataclasses.replace(config, eps=1.0)  # so that the update depends on the size of the gradient
    small, large = (optimizer(eps, 10).update(x, optimizer(eps, 10).init(w), w)[0] for x in (g / 4, g))
    np.testing.assert_allclose(large[1:] + 1e-4 * w[1:], -1e-2 * clipped[1:] / (clipped[1:] + 1.0), rtol=1e-5)
    np.testing.assert_allclose(small[1:] + 1e-4 * w[1:], -1e-2 * (g / 4)[1:] / ((g / 4)[1:] + 1.0), rtol=1e-5)

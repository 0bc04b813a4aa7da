"""Diffusion2GAN's losses against closed forms; labels D1 ... are those of docs/diffusion2gan.md."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import config, losses
from cddistill.diffusion import DDPM, EDM
from cddistill.methods.diffusion2gan import Diffusion2GAN
from cddistill.net import Denoiser, Net
from cddistill.perceptual import ensemble
from cddistill.step import active

SD, KEY = DDPM(), jax.random.key(0)
B = 64


def method(**options):
    return Diffusion2GAN(**{"regression": "l2", "augment": "none", "mix_share": 0.0, "r1": "none"} | options)


def linear(p, z, t, text=None):
    """out = a z + b."""
    return p["a"] * z + p["b"]


def judge(p, x, t, text, z):
    """A discriminator with two maps of logits, linear in x, text and z."""
    seen = p["x"] * x + p["text"] * text.reshape(-1, 1, 1, 1) + p["z"] * z
    return seen, 3.0 * seen[:, :1, :1]


def world(schedule=SD, predicts="x0", seed=0):
    """Roles n and a toy batch: images [b, 2, 2, 1], texts [b]."""
    n = types.SimpleNamespace(step=jnp.zeros((), jnp.int32), play=("critic", "student"))
    n.teacher = n.student = Denoiser({"a": jnp.float32(0.5), "b": jnp.float32(0.1)}, linear, schedule, predicts)
    n.disc = Net({"x": jnp.float32(0.7), "text": jnp.float32(0.3), "z": jnp.float32(-0.2)}, judge)
    pairs = {"noise": tiny.randn(seed, B, 2, 2, 1), "x0": tiny.randn(seed + 1, B, 2, 2, 1), "text": jnp.arange(B) / B}
    others = jax.tree.map(lambda x: jnp.roll(x, -1, 0), pairs)
    return n, {"pairs": pairs, "others": others, "index": jnp.arange(B)}


def softplus(x):
    return np.log1p(np.exp(np.float64(x)))


@pytest.mark.parametrize(("time", "alpha", "sigma"), [(999, 0.06826, 0.99767), (399, 0.65275, 0.75757)])
def test_initial_student_is_one_step_of_the_teacher(time, alpha, sigma):
    """D3: (z - sigma eps^) / alpha on pure noise, at any timestep."""
    n, batch = world(predicts="eps")
    z = batch["pairs"]["noise"]
    drawn = method(time=time).generate(n.student, z, batch["pairs"]["text"])
    np.testing.assert_allclose(drawn, (z - sigma * (0.5 * z + 0.1)) / alpha, rtol=2e-3, atol=1e-3)


def test_edm_student_input_is_noise_scaled_by_sigma_max():
    n, batch = world(EDM())
    z = batch["pairs"]["noise"]
    drawn = method().generate(n.student, z, batch["pairs"]["text"])
    np.testing.assert_allclose(drawn, 0.5 * 80.0 * z + 0.1, rtol=1e-4)


def test_student_loss_is_regression_plus_gan():
    """D2, D6, D7."""
    n, batch = world()
    loss, logs = method(gan_weight=0.25, regression_weight=2.0).student_loss(n, batch, KEY)
    z, x, text = (np.float64(a) for a in (batch["pairs"][k] for k in ("noise", "x0", "text")))
    drawn = 0.5 * z + 0.1
    logits = 0.7 * drawn + 0.3 * text.reshape(-1, 1, 1, 1) - 0.2 * z
    gan = 0.5 * (softplus(-logits).mean() + softplus(-3.0 * logits[:, :1, :1]).mean())
    np.testing.assert_allclose(logs["gan"], gan, rtol=1e-5)
    np.testing.assert_allclose(logs["regression"], ((drawn - x) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, 2.0 * ((drawn - x) ** 2).mean() + 0.25 * gan, rtol=1e-5)


def test_discriminator_loss():
    """D8: real images are from the pairs, generated ones from the student."""
    n, batch = world()
    loss, logs = method().critic_loss(n, batch, KEY)
    z, x, text = (np.float64(a) for a in (batch["pairs"][k] for k in ("noise", "x0", "text")))
    given = 0.3 * text.reshape(-1, 1, 1, 1) - 0.2 * z
    real, drawn = 0.7 * x + given, 0.7 * (0.5 * z + 0.1) + given
    want = softplus(-real).mean() + softplus(-3 * real[:, :1, :1]).mean()
    want += softplus(drawn).mean() + softplus(3 * drawn[:, :1, :1]).mean()
    np.testing.assert_allclose(loss, 0.5 * want, rtol=1e-5)
    share = 0.5 * ((real > 0).mean() + (real[:, :1, :1] > 0).mean())
    np.testing.assert_allclose(logs["real_accuracy"], share, rtol=1e-6)


def test_networks_are_told_their_timestep_text_and_noise():
    """And samples are drawn with the average."""
    calls, m = [], method(regression="teacher", time=399, disc_time=20, ema_decay=0.9)
    n = types.SimpleNamespace(play=("critic", "student"))
    for name, x0 in (("student", 300.0), ("student_ema", 0.0), ("teacher", 0.0)):
        setattr(n, name, tiny.noting(calls, name, x0=x0))
    judging = tiny.noting(calls, "disc").apply
    n.disc = Net({}, lambda p, x, t, text, z: (judging(p, x, t, text, z),))
    like = lambda value: jnp.full((2, 2, 2, 1), value)
    pairs = {"noise": like(1.5), "x0": like(50.0), "text": jnp.full(2, 7), "null": jnp.full(2, 3)}
    batch = {"pairs": pairs, "others": pairs, "index": jnp.arange(2)}
    student, generated, real = ("student", 399, 7, 1.5), ("disc", 20, 7, 1000.0, 1.5), ("disc", 20, 7, 50.0, 1.5)
    tiny.run_noting(jax.jit(lambda: m.critic_loss(n, batch, KEY)))
    assert calls == [student, real, generated]
    calls.clear()
    tiny.run_noting(jax.jit(lambda: m.student_loss(n, batch, KEY)))
    features = [("teacher features", 20, 7, 1000.0), ("teacher features", 20, 7, 50.0)]
    assert calls == [student, *features, generated]
    calls.clear()
    tiny.run_noting(jax.jit(lambda: m.sample(n, like(1.5), pairs, None, 1)))
    assert calls == [("student_ema", 399, 7, 1.5)]


def test_mixed_negatives_are_images_of_other_pairs():
    """mix="image": another pair's image with this pair's noise and text; the others stay generated."""
    n, batch = world()
    drawn = 0.0 * batch["pairs"]["x0"]
    x, z, text = method(mix_share=0.25).mixed(batch, drawn, KEY)
    np.testing.assert_array_equal(z, batch["pairs"]["noise"])
    np.testing.assert_array_equal(text, batch["pairs"]["text"])
    mixed = np.asarray((x != 0.0).any((1, 2, 3)))
    assert 5 <= mixed.sum() <= 30  # of 64, 16 on average
    np.testing.assert_array_equal(x[mixed], batch["others"]["x0"][mixed])


def test_mix_each_swaps_exactly_one_part_of_a_pair():
    n, batch = world()
    ours, others = batch["pairs"], batch["others"]
    x, z, text = method(mix_share=1.0, mix="each").mixed(batch, 0.0 * ours["x0"], KEY)
    swapped = np.stack(
        [
            [np.array_equal(a, b) for a, b in zip(x, others["x0"], strict=True)],
            [np.array_equal(a, b) for a, b in zip(text, others["text"], strict=True)],
            [np.array_equal(a, b) for a, b in zip(z, others["noise"], strict=True)],
        ]
    )
    assert (swapped.sum(0) == 1).all()  # exactly one part
    assert (swapped.sum(1) > 10).all()
    assert all(np.array_equal(a, b) for a, b, s in zip(x, ours["x0"], swapped[0], strict=True) if not s)
    assert all(np.array_equal(a, b) for a, b, s in zip(z, ours["noise"], swapped[2], strict=True) if not s)


def test_r1_runs_every_16th_step_on_every_r1_stride_th_image():
    """D9: the loss has 16 gamma R1, R1 = |gradient|^2 / 2 of the summed map means, of one image in r1_stride."""
    n, batch = world()
    plain, _ = method().critic_loss(n, batch, KEY)
    lazy = method(r1="exact", r1_weight=0.5, r1_stride=B)
    assert ["critic/lazy" in active(lazy.turns(), step) for step in (0, 1, 15, 16, 17)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert "critic/lazy" not in active(method().turns(), 0)
    n.play = active(lazy.turns(), 0)
    loss, logs = lazy.critic_loss(n, batch, KEY)
    slope = 0.7 / 4 + np.array([3 * 0.7, 0, 0, 0])  # mean over a map of 4 pixels, and over one of 1
    np.testing.assert_allclose(logs["r1"], 0.5 * (slope**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(loss - plain, 16 * 0.5 * logs["r1"], rtol=1e-4)


def test_r1_gradient_reaches_only_the_penalised_images():
    n, batch = world()
    curved = lambda p, x, t, text, z: (p["x"] * x**2,)
    n.disc = n.disc.replace(apply=curved)
    lazy = method(r1="exact", r1_stride=B // 2)
    n.play = active(lazy.turns(), 0)

    def r1(x0):
        return lazy.critic_loss(n, batch | {"pairs": batch["pairs"] | {"x0": x0}}, KEY)[1]["r1"]

    x = batch["pairs"]["x0"]
    seen = jax.grad(r1)(x)
    assert sorted(set(np.nonzero(np.asarray(seen))[0])) == [0, B // 2]
    np.testing.assert_allclose(r1(x), 0.5 * ((2 * 0.7 * x[:: B // 2] / 4) ** 2).sum((1, 2, 3)).mean(), rtol=1e-5)


def test_approximate_r1_is_the_squared_change_under_noise():
    """D10: |D(x + sigma e) - D(x)|^2."""
    n, batch = world()
    lazy = method(r1="approximate", r1_weight=100.0, r1_noise=0.01, r1_stride=1)
    n.play = active(lazy.turns(), 0)
    _, logs = lazy.critic_loss(n, batch, KEY)
    expected = 0.5 * ((0.7 * 0.01) ** 2 + (3 * 0.7 * 0.01) ** 2)
    np.testing.assert_allclose(logs["r1"], expected, rtol=0.3)  # 64 noise samples


def test_regression_depends_on_the_pairing_of_noise_and_image():
    """Swapping the noise of pairs raises the loss of a perfect student."""
    n, batch = world()
    pairs = batch["pairs"] | {"x0": 0.5 * batch["pairs"]["noise"] + 0.1}
    right, _ = method(gan_weight=0.0).student_loss(n, batch | {"pairs": pairs}, KEY)
    wrong, _ = method(gan_weight=0.0).student_loss(
        n, batch | {"pairs": pairs | {"noise": batch["others"]["noise"]}}, KEY
    )
    assert float(right) < 1e-12
    assert float(wrong) > 0.1


@pytest.mark.parametrize("regression", ["l2", "pseudo_huber", "teacher"])
@pytest.mark.parametrize("policy", ["none", "bgo"])
def test_equal_images_have_zero_distance_and_gradient(regression, policy):
    """D4, D5."""
    m, n, b = method(regression=regression, augment=policy), tiny.namespace("d2g"), tiny.make_batch(size=2)
    x, text = b["x0"], b["text"]
    keys = jax.random.split(KEY, 2)

    @jax.jit
    def distance(drawn):
        return m.distance(n, drawn, x, text, keys)

    np.testing.assert_allclose(distance(x), 0.0, atol=1e-10)  # not exactly 0: XLA folds the constant x
    slope = jax.jit(jax.grad(lambda drawn: distance(drawn).sum()))(x)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    assert (np.asarray(distance(x + 0.1 * b["cond"])) > 0).all()


def test_both_images_get_the_same_random_transform():
    n, batch = world()
    x = batch["pairs"]["x0"]
    m = method(augment="bg", l1_weight=0.5)
    keys = jax.random.split(KEY, B)
    found = m.distance(n, x + 1.0, x, None, keys)
    params = ensemble.sample_transforms(keys, ensemble.POLICIES["bg"])
    want = losses.mse(ensemble.apply(params, x + 1.0), ensemble.apply(params, x)) + 0.5
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_warm_up_trains_the_student_without_the_gan():
    m = method(warmup=3)
    assert [active(m.turns(), step) for step in (0, 2, 3)] == [("student",), ("student",), ("critic", "student")]
    n, batch = world()
    n.play = ("student",)
    loss, logs = m.student_loss(n, batch, KEY)
    assert "gan" not in logs
    np.testing.assert_allclose(loss, logs["regression"])
    assert tuple(method(gan_weight=0.0).turns()) == ("student",)


def test_student_samples_in_one_step_only():
    n, batch = world()
    m = method(ema_decay=0.0)
    given = {"text": batch["pairs"]["text"]}
    drawn = m.sample(n, batch["pairs"]["noise"], given, None, 1)
    np.testing.assert_array_equal(drawn, m.generate(n.student, batch["pairs"]["noise"], given["text"]))
    assert m.sampling(SD, 1).timesteps == (999,)
    with pytest.raises(ValueError, match="one step, not 4"):
        m.sample(n, batch["pairs"]["noise"], given, None, 4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"regression": "dreamsim"}, "must be one of latent_lpips"),
        ({"augment": "xyz"}, "must be one of none, b, g"),
        ({"gan_weight": 0.0, "regression_weight": 0.0}, "the student has no loss"),
    ],
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.resolve({"method": {"name": "diffusion2gan"} | options})


def test_pairs_and_a_batch_of_two_are_required():
    assert tiny.VARIANTS["d2g"].requires().pairs
    with pytest.raises(ValueError, match="raise batch_size"):
        tiny.VARIANTS["d2g"].init(KEY, tiny.frozen(), tiny.make_batch(size=1))

"""The random transform T: as published, shared by both images, linear, independent of the rest of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import elatentlpips as golden
from test_evals import random_lpips
from tiny import randn

from cddistill import losses
from cddistill.net import Net
from cddistill.perceptual import ensemble, lpips

apply = jax.jit(ensemble.apply)
sample_transforms = jax.jit(ensemble.sample_transforms, static_argnums=1)
averaged = jax.jit(ensemble.ensemble, static_argnums=(0, 4, 5))
POLICIES = ensemble.POLICIES


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def still(n, **changes):
    """Parameters of the identity transform, apart from the given ones."""
    zeros, ones = jnp.zeros(n), jnp.ones(n)
    values = {"scale": ones, "rotation": zeros, "stretch": ones, "pre_rotation": zeros, "offset": jnp.zeros((n, 2))}
    values |= {"flip": zeros, "quarter_turns": zeros, "shift": jnp.zeros((n, 2))} | changes
    parts = {"blit": ensemble.Blit, "geometric": ensemble.Geometric}
    return {name: part(*(values[field] for field in part._fields)) for name, part in parts.items()}


def smooth(n=2, h=16, w=16):
    y, x = np.meshgrid(np.linspace(0, 3, h), np.linspace(0, 2, w), indexing="ij")
    waves = np.stack([np.sin(x + 2 * y), np.cos(2 * x - y), x * y / 4], -1)
    return (waves[None] + np.arange(n).reshape(n, 1, 1, 1)).astype("f")


@pytest.mark.parametrize("policy", golden.AUGMENTED)
def test_transforms_equal_the_recorded_ones(policy):
    want = golden.RECORDED[f"aug_{policy}"]
    a, b = (np.asarray(apply(golden.draws(policy), x), np.float64) for x in golden.images(4, 32))
    np.testing.assert_allclose(a[0, 5, :4, 0], want["x_head"], atol=5e-5)
    np.testing.assert_allclose(b[1, 20, :4, 3], want["y_head"], atol=5e-5)
    np.testing.assert_allclose(np.abs(a).sum(), want["x_abs"], rtol=2e-6)
    np.testing.assert_allclose(a.sum(), want["x_sum"], atol=2e-3)  # of 8192 pixels


@pytest.mark.parametrize("shape", [(16, 16), (8, 12), (7, 5)])
def test_identity_transform_returns_the_image(shape):
    x = randn(0, 2, *shape, 3)
    np.testing.assert_allclose(apply(still(2), x), x, atol=4e-6)


def test_integer_shifts_use_mirror_padding():
    x = randn(0, 1, 16, 16, 2)
    right, down = 3, -2
    got = apply(still(1, shift=jnp.array([[right / 16, down / 16]])), x)
    mirrored = np.pad(x, ((0, 0), (15, 15), (15, 15), (0, 0)), "reflect")
    np.testing.assert_allclose(got, mirrored[:, 15 - down : 31 - down, 15 - right : 31 - right], atol=6e-6)


def test_rotations_and_flips_have_the_right_direction():
    """Approximately: sym6 is not symmetric."""
    x = smooth(4)
    got = apply(still(4, quarter_turns=jnp.arange(4.0)), x)
    for k in range(4):
        np.testing.assert_allclose(got[k], np.rot90(x[k], k), atol=0.1)
    np.testing.assert_allclose(apply(still(2, flip=jnp.array([0.0, 1.0])), x[:2])[1], x[1, :, ::-1], atol=0.1)
    turned = apply(still(4, rotation=jnp.pi / 2 * jnp.arange(4)), x)
    np.testing.assert_allclose(turned, got, atol=1e-4)


def test_random_parameters_follow_the_policy():
    policy = ensemble.Policy(True, True, True, True, scale=0.1, offset=0.05, brightness=0.25, hole=0.3)
    parts = sample_transforms(keys(4000), policy)
    blit, geometric, colour, cutout = (parts[name] for name in ("blit", "geometric", "colour", "cutout"))
    assert {*np.asarray(blit.flip)} == {0, 1}
    assert {*np.asarray(blit.quarter_turns)} == {0, 1, 2, 3}
    for values, low, high in (
        (blit.shift, -0.125, 0.125), (geometric.rotation, -np.pi, np.pi), (geometric.pre_rotation, -np.pi, np.pi),
        (colour.brightness, -0.25, 0.25), (colour.contrast, 0.5, 1.5), (colour.saturation, 0, 2), (cutout.centre, 0, 1),
    ):  # fmt: skip
        np.testing.assert_allclose([values.min(), values.max()], [low, high], atol=0.01 * (high - low))
        np.testing.assert_allclose(values.std(), (high - low) / 12**0.5, rtol=0.05)
    for values, std in ((jnp.log2(geometric.scale), 0.1), (jnp.log2(geometric.stretch), 0.2), (geometric.offset, 0.05)):
        np.testing.assert_allclose(values.std(), std, rtol=0.05)
        assert abs(values.mean()) < 0.1 * std
    assert (cutout.side == np.float32(0.3)).all()
    parts["cutout"] = cutout.centre
    flat = np.concatenate([np.reshape(x, (4000, -1)) for x in jax.tree.leaves(parts)], 1)
    assert np.abs(np.corrcoef(flat.T) - np.eye(flat.shape[1])).max() < 0.08  # no random number is used twice


def test_policy_names_list_their_transforms():
    on = {
        name: {*jax.eval_shape(lambda k, p=policy: ensemble.sample_transforms(k, p), keys(1))}
        for name, policy in POLICIES.items()
    }
    letters = {"b": "blit", "g": "geometric", "c": "colour", "o": "cutout"}
    assert on.pop("none") == set()
    assert on == {name: {letters[letter] for letter in name} for name in on}
    x = randn(0, 1, 4, 4, 2)
    assert (ensemble.apply({}, x) == x).all()


@pytest.mark.parametrize("policy", ["bg", "bgo"])
def test_transforms_are_linear(policy):
    x, y, parts = randn(0, 2, 8, 8, 3), randn(1, 2, 8, 8, 3), sample_transforms(keys(2), POLICIES[policy])
    got, want = apply(parts, 2 * x - 3 * y), 2 * apply(parts, x) - 3 * apply(parts, y)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(want).max() > 1


def test_transform_depends_only_on_its_key():
    x, k = randn(0, 3, 8, 8, 2), keys(3)
    whole = apply(sample_transforms(k, POLICIES["bgco"]), x)
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(apply(sample_transforms(k[order], POLICIES["bgco"]), x[order]), whole[order])
    other = apply(sample_transforms(k, POLICIES["bgco"]), x.at[1].set(1e6))
    np.testing.assert_array_equal(other[np.array([0, 2])], whole[np.array([0, 2])])


def test_both_images_get_the_same_transform():
    x, k = randn(0, 4, 8, 8, 2), keys(4)
    assert (jax.jit(lambda x: ensemble.ensemble(losses.mse, x, x, k, POLICIES["bgco"], 1.0))(x) == 0).all()
    assert (averaged(losses.mse, x, jnp.array(x), k, POLICIES["bg"], 0.0) < 1e-12).all()  # two inputs: up to rounding
    same = averaged(losses.mse, x, x + 1, k, POLICIES["bg"], 0.0)  # T(x + 1) - T(x) = T(1), about 1
    np.testing.assert_allclose(same, 1, atol=1e-3)


def test_l1_term_compares_the_untransformed_images():
    a, b, k = randn(0, 2, 8, 8, 2), randn(1, 2, 8, 8, 2), keys(2)
    plain, more = (averaged(losses.mse, a, b, k, POLICIES["o"], l1) for l1 in (0.0, 0.5))
    np.testing.assert_allclose(more - plain, 0.5 * np.abs(a - b).mean((1, 2, 3)), rtol=1e-5)
    low = averaged(losses.mse, a.astype(jnp.bfloat16), b, k, POLICIES["o"], 0.5)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, more, rtol=0.02)


def test_pixel_e_lpips_has_finite_gradients():
    """E-LPIPS, for distilling without an autoencoder; its gradient is finite where T leaves zeros and where a = b."""
    net = Net(random_lpips("alex"), lpips.alex)
    a, b, k = jnp.tanh(randn(0, 2, 32, 32, 3)), jnp.tanh(randn(1, 2, 32, 32, 3)), keys(2)

    @jax.jit
    def value_and_gradient(net, a, b):
        loss = lambda a: ensemble.ensemble(net, a, b, k, POLICIES["bgo"])
        distance, back = jax.vjp(loss, a)
        return distance, back(jnp.ones(2))[0]

    distance, gradient = value_and_gradient(net, a, b)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
    distance, gradient = value_and_gradient(net, a, jnp.array(a))
    assert (distance < 1e-10).all()  # nothing but rounding
    assert np.abs(gradient).max() < 1e-7

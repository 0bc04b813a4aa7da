"""LatentLPIPS: equal to the published one on recorded values, a distance, strict about the files that it loads."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden import elatentlpips as golden
from test_convert import write_torch
from tiny import randn

from cddistill.net import Net
from cddistill.perceptual import ensemble, latent_lpips
from cddistill.perceptual.latent_lpips import FAMILIES, LatentLPIPS

HEADS = [f"lin{k}.model.1.weight" for k in range(5)]
KEYS = jax.random.split(jax.random.key(0), 3)
measure = jax.jit(lambda net, a, b: net(a, b))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Nets of the published size, loaded from files in the published format."""

    def load(family):
        file = tmp_path_factory.mktemp(family) / f"{family}_latest_vgg16_tuned.pth"
        write_torch(file, golden.state_dict(family))
        return latent_lpips.load(file)

    return {family: load(family) for family in ("sd15", "sd3")}


@jax.jit
def compare(net, a, b):
    """(distances, distances per layer, gradient with respect to b)."""

    def distances(b):
        features = net.apply.features(net.params, a), net.apply.features(net.params, b)
        return net(a, b), [
            ((fa - fb) ** 2).mean((1, 2)) @ w for fa, fb, w in zip(*features, net.params["heads"], strict=True)
        ]

    value, back, layers = jax.vjp(distances, b, has_aux=True)
    return value, layers, back(jnp.ones_like(value))[0]


@jax.jit
def pull_back(parts, x, gradient):
    """The gradient with respect to x from that with respect to T(x)."""
    return jax.vjp(lambda x: ensemble.apply(parts, x), x)[1](gradient)[0]


def l1(a, b):
    """elatentlpips' L1 term and its gradient with respect to b."""
    return np.abs(a - b).mean((1, 2, 3)), np.sign(b - a) / b[0].size


@pytest.mark.parametrize(
    ("family", "size"),
    [("sd15", 16), ("sd3", 16), *(pytest.param(name, 32, marks=pytest.mark.slow) for name in ("sd15", "sd3"))],
)
def test_distances_and_gradients_equal_recorded_ones(published, family, size):
    want, net = golden.RECORDED[f"{family}_{size}"], published[family]
    a, b = golden.images(FAMILIES[family], size)
    value, layers, gradient = compare(net, a, b)
    gradient = gradient + l1(a, b)[1]
    np.testing.assert_allclose(layers, want["per_layer"], rtol=1e-5)
    np.testing.assert_allclose(value + l1(a, b)[0], want["value"], rtol=1e-5)
    np.testing.assert_allclose(np.sqrt((gradient**2).sum((1, 2, 3))), want["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose(gradient[0, 0, :4, 0], want["grad_head"], rtol=1e-3)


@pytest.mark.parametrize(
    "policy", [pytest.param(x, marks=() if x == "bgco" else pytest.mark.slow) for x in golden.AUGMENTED]
)
def test_distances_of_transformed_latents_equal_recorded_ones(published, policy):
    want, parts, (a, b) = golden.RECORDED[f"aug_{policy}"], golden.draws(policy), golden.images(4, 32)
    transform = jax.jit(functools.partial(ensemble.apply, parts))
    value, _, gradient = compare(published["sd15"], transform(a), transform(b))
    gradient = pull_back(parts, b, gradient) + l1(a, b)[1]
    np.testing.assert_allclose(value + l1(a, b)[0], want["value"], rtol=1e-5)
    np.testing.assert_allclose(np.sqrt((gradient**2).sum((1, 2, 3))), want["grad_norm"], rtol=1e-3)


def narrow(seed=0, channels=4, width=8):
    """Weights of a narrow trunk with all 13 layers."""
    r, inputs, convs = np.random.default_rng(seed), channels, []
    for _ in range(13):
        kernel = r.standard_normal((3, 3, inputs, width)) * (2 / (9 * inputs)) ** 0.5
        convs.append((kernel.astype("f"), 0.1 * r.standard_normal(width).astype("f")))
        inputs = width
    return {"convs": convs, "heads": [r.random(width).astype("f") for _ in range(5)]}


NET = Net(narrow(), LatentLPIPS("sd15"))


def gradient(net, a, b):
    return jax.jit(jax.grad(lambda a, b: net(a, b).sum()))(a, b)


def test_it_is_a_symmetric_distance_per_sample_and_linear_in_its_heads():
    a, b = randn(0, 3, 8, 8, 4), randn(1, 3, 8, 8, 4)
    d = measure(NET, a, b)
    assert d.dtype == jnp.float32
    assert (d > 1e-3).all()
    np.testing.assert_array_equal(measure(NET, b, a), d)
    assert (measure(NET, a, jnp.array(a)) == 0).all()
    # Not 0: features are rounded in 13 layers, differently on each processor.
    assert np.abs(gradient(NET, a, jnp.array(a))).max() < 1e-5 * np.abs(gradient(NET, a, b)).max()
    assert (jax.jit(lambda a: jax.grad(lambda x: NET(x, x).sum())(a))(a) == 0).all()
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(measure(NET, a[order], b[order]), d[order], rtol=1e-6)
    twice = NET.replace(params=NET.params | {"heads": [2 * w for w in NET.params["heads"]]})
    np.testing.assert_allclose(measure(twice, a, b), 2 * d, rtol=1e-6)


def test_gradient_is_finite_where_features_are_zero():
    convs = [(kernel, bias - 1e3) for kernel, bias in NET.params["convs"]]
    dead = NET.replace(params=NET.params | {"convs": convs})
    assert (gradient(dead, randn(0, 1, 8, 8, 4), randn(1, 1, 8, 8, 4)) == 0).all()
    assert np.isfinite(gradient(NET, jnp.zeros((1, 8, 8, 4)), randn(1, 1, 8, 8, 4))).all()


def test_the_ensemble_is_zero_for_equal_latents_and_differs_from_one_distance():
    a, b, policy = randn(0, 3, 8, 8, 4), randn(1, 3, 8, 8, 4), ensemble.POLICIES["bgo"]
    averaged = jax.jit(lambda net, a, b: ensemble.ensemble(net, a, b, KEYS, policy))
    assert (jax.jit(lambda a: ensemble.ensemble(NET, a, a, KEYS, policy))(a) == 0).all()
    assert (averaged(NET, a, jnp.array(a)) < 1e-10).all()
    assert (averaged(NET, a, b) > 1e-3).all()
    assert np.abs(averaged(NET, a, b) - measure(NET, a, b)).min() > 1e-4


def test_only_convolutions_run_in_half_precision():
    low = NET.replace(apply=LatentLPIPS("sd15", dtype=jnp.bfloat16))
    a, b = randn(0, 2, 8, 8, 4), randn(1, 2, 8, 8, 4)
    d = measure(low, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    assert d.dtype == jnp.float32
    np.testing.assert_allclose(d, measure(NET, a, b), rtol=0.02)
    for tap in jax.jit(low.apply.features)(low.params, a):
        assert tap.dtype == jnp.float32
        assert np.median(np.abs((tap**2).sum(-1) - 1)) < 1e-6
    assert low.apply == LatentLPIPS("sd15", dtype=jnp.bfloat16)  # equal options give one pytree structure


def test_other_pools_and_group_norms():
    """Max-pools after stages 3 and 4, features before them, group norms."""
    params = narrow(width=32)
    params["convs"] = [(kernel, bias, np.full(32, 1.5, "f"), bias) for kernel, bias in params["convs"]]
    other = LatentLPIPS("sd15", pools=(3, 4), pooled=False)
    x = randn(0, 1, 8, 8, 4)
    features = jax.jit(other.features)
    taps = features(params, x)
    assert [t.shape[1] for t in taps] == [8, 8, 8, 4, 2]
    assert [t.shape[1] for t in NET.apply.features(NET.params, x)] == [8, 8, 8, 4, 2]
    params["convs"] = [(5 * kernel, 5 * bias, *norm) for kernel, bias, *norm in params["convs"]]
    for got, want in zip(features(params, x), taps, strict=True):  # group norms undo it
        np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 8, 8, 16), (1, 8, 8, 3), (1, 8, 3, 4)])
def test_inputs_that_do_not_fit_the_family_are_refused(shape):
    with pytest.raises(ValueError, match=r"family sd15 takes latents \[n, h, w, 4\] of at least 4 x 4, not"):
        NET(jnp.zeros(shape), jnp.zeros(shape))


@pytest.mark.parametrize(("family", "count"), [("sdxl", 14_733_632), ("flux", 14_740_544)])
def test_parameter_counts_equal_the_published_ones(family, count):
    assert sum(math.prod(shape) for shape in golden.shapes(family).values()) == count


@pytest.fixture
def small(monkeypatch, tmp_path):
    """(narrow state dict in the published format, function that changes and loads it)."""
    monkeypatch.setattr(latent_lpips, "VGG", ((2, 2), (2, 2), (3, 3, 3), (4, 4, 4), (4, 4, 4)))
    state = golden.state_dict("sd15")

    def load(change=lambda state: None, name="sd15_latest_vgg16_tuned.pth", **kwargs):
        changed = dict(state)
        change(changed)
        write_torch(tmp_path / name, changed)
        return latent_lpips.load(tmp_path / name, **kwargs)

    return state, load


def test_a_published_state_dict_loads_and_round_trips(small, tmp_path):
    state, load = small
    assert len(state) == 101
    net, a, b = load(), randn(0, 1, 8, 8, 4), randn(1, 1, 8, 8, 4)
    kernel, bias = net.params["convs"][3]
    factor = state["net.slice2.11.weight"] / np.sqrt(state["net.slice2.11.running_var"] + 1e-5)
    np.testing.assert_allclose(kernel, state["net.slice2.10.weight"].transpose(2, 3, 1, 0) * factor, rtol=1e-6)
    file = latent_lpips.save(net, tmp_path / "mine.safetensors")
    back = latent_lpips.load(file)
    assert jax.tree.structure(back) == jax.tree.structure(net)
    jax.tree.map(np.testing.assert_array_equal, back, net)
    assert measure(back, a, b) == measure(net, a, b) > 0
    assert latent_lpips.load(file, dtype=jnp.bfloat16).apply == LatentLPIPS("sd15", dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="is LatentLPIPS of the family sd15, not sdxl"):
        latent_lpips.load(file, "sdxl")
    safetensors.numpy.save_file(state, tmp_path / "sd15_mine.safetensors")  # batch norms not folded, no metadata
    jax.tree.map(np.testing.assert_array_equal, latent_lpips.load(tmp_path / "sd15_mine.safetensors"), net)


def test_a_pipeline_may_have_its_own(small, tmp_path, monkeypatch):
    """By its folder, and by the name of an embedded one."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine/latent_lpips.safetensors is missing"):
        latent_lpips.load(tmp_path / "mine")
    net = small[1]()
    latent_lpips.save(net, tmp_path / "mine" / latent_lpips.FILE)
    jax.tree.map(np.testing.assert_array_equal, latent_lpips.load(tmp_path / "mine"), net)
    monkeypatch.setattr("cddistill.models.folders.ASSETS", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, latent_lpips.load("mine"), net)


def test_a_trunk_to_train_has_the_published_size():
    """Without running statistics of batch norms and heads."""
    convs = jax.eval_shape(lambda key: latent_lpips.init_convs(key, 4, [64, 128, 256, 512, 512]), KEYS[0])
    channels = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
    assert sum(x.size for x in jax.tree.leaves(convs)) == 14_733_632 - 2 * channels - (64 + 128 + 256 + 512 + 512)


def test_group_norms_widths_and_layout_round_trip(tmp_path):
    """As methods.latent_lpips trains them, for an autoencoder not in FAMILIES."""
    convs = jax.jit(lambda key: latent_lpips.init_convs(key, 3, [4, 8, 16, 8, 4]))(jax.random.key(0))
    heads = [np.random.default_rng(0).random(n).astype("f") for n in (4, 8, 16, 8, 4)]
    net = Net({"convs": convs, "heads": heads}, LatentLPIPS("mine", pools=(1, 2), pooled=False, groups=2))
    back = latent_lpips.load(latent_lpips.save(net, tmp_path / "sd15_mine.safetensors"))  # metadata wins over its name
    assert back.apply == net.apply
    assert jax.tree.structure(back) == jax.tree.structure(net)
    jax.tree.map(np.testing.assert_array_equal, back, net)
    tensors = safetensors.numpy.load_file(tmp_path / "sd15_mine.safetensors")
    assert len(tensors) == 13 * 4 + 5
    for change, match in (
        ({"channels": 4}, r"shape for the family mine: net.slice1.0.weight \(4, 3, 3, 3\), not \(4, 4, 3, 3\)"),
        ({"depth": 16}, "a layout that cannot be read .*depth"),
    ):
        layout = latent_lpips.Layout(3, (4, 8, 16, 8, 4))._asdict() | change
        said = {"family": "mine", "layout": json.dumps(layout)}
        safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors", said)
        with pytest.raises(ValueError, match=match):
            latent_lpips.load(tmp_path / "other.safetensors")


def drop(name):
    return lambda state: state.pop(name)


def put(name, x):
    return lambda state: state.update({name: np.asarray(x, np.float32)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("net.slice5.40.bias"), r"tuned.pth lacks net.slice5.40.bias: it is not a LatentLPIPS"),
        (drop("net.slice5.41.running_mean"), "lacks net.slice5.41.running_mean"),
        (lambda state: state.clear(), "lacks .* and 28 more"),
        (put("net.slice6.0.weight", [1.0]), "has net.slice6.0.weight, for which"),
        (put("net.slice1.0.bias", [1.0]), r"shape for the family sd15: net.slice1.0.bias \(1,\), not \(2,\)"),
        (put(HEADS[2], np.full((1, 3, 1, 1), -1e-8)), "negative weights in lin2.model.1.weight"),
        (put(HEADS[2], np.full((1, 3, 1, 1), np.nan)), "negative weights in lin2.model.1.weight"),
        (put("lins.4.model.1.weight", np.ones((1, 4, 1, 1))), "two versions of one weight"),
    ],
)
def test_broken_state_dicts_are_refused(small, change, match):
    with pytest.raises(ValueError, match=match):
        small[1](change)


def test_the_family_must_match_the_file(small, tmp_path):
    _, load = small
    assert load(name="weights.pth", family="sdxl").apply.family == "sdxl"
    for name, family, match in (
        ("weights.pth", "", "does not begin with the family of its autoencoder: pass family, one of sd15, sd21, sdxl"),
        ("sd15_latest_vgg16_tuned.pth", "sdxl", "is LatentLPIPS of the family sd15, not sdxl"),
        ("weights.pth", "sd3", r"net.slice1.0.weight \(2, 4, 3, 3\), not \(2, 16, 3, 3\)"),
        ("weights.pth", "sd2", "the family 'sd2' is not one of"),
    ):
        with pytest.raises(ValueError, match=match):
            load(name=name, family=family)


def test_missing_and_truncated_files_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="is missing: download sdxl_latest_vgg16_tuned.pth"):
        latent_lpips.load(tmp_path / "sdxl.pth", "sdxl")
    with pytest.raises(ValueError, match="is missing: make one for the family mine with configs/latent_lpips.py"):
        latent_lpips.load(tmp_path / "mine.safetensors", "mine")
    file = latent_lpips.save(small[1](), tmp_path / "mine.safetensors")
    for broken in (file, tmp_path / "sd15_latest_vgg16_tuned.pth"):
        broken.write_bytes(broken.read_bytes()[:-100])
        with pytest.raises(ValueError, match="truncated"):
            latent_lpips.load(broken)

"""EDM's pixel networks: parity with an independent implementation, published sizes, errors for bad input."""

import functools
import json
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_edm as golden

from cddistill import models
from cddistill.diffusion import DDPM, EDM
from cddistill.models import convert, edm, edm_blocks
from cddistill.models.init import weight_shapes
from cddistill.models.unet import Apply
from cddistill.net import Denoiser
from cddistill.pipeline import Pipeline
from cddistill.sampling import heun

RECORDED = np.load(Path(golden.__file__).parent / "edm.npz")
SMALL = golden.CONFIGS["adm"] | {"channel_mult": [1, 1]}
LABELS = {"class_labels": np.array([1, 5])}


def build(config, **ours):
    return getattr(edm, config["_class_name"]).from_config(config, **ours)


@functools.cache
def flat_shapes(module):
    return flax.traverse_util.flatten_dict(weight_shapes(module))


def torch_shapes(module):
    """{PyTorch name: shape} of a module's weights."""
    shapes = flat_shapes(module)
    return {convert.torch_name(p): convert.to_torch(p, np.empty(s.shape)).shape for p, s in shapes.items()}


def random_params(module):
    """The weights that make_edm.py generates."""
    arrays = {name: golden.weight(name, shape) for name, shape in torch_shapes(module).items()}
    return convert.unflatten(
        convert.match(arrays, flat_shapes(module), convert.torch_name, convert.from_torch, "golden")
    )


def nhwc(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.parametrize(  # the others are made of the same blocks: slow
    "name",
    [pytest.param(x, marks=() if x == "adm" else pytest.mark.slow) for x in sorted(golden.CONFIGS)],
)
def test_output_features_and_every_gradient_equal_the_independent_implementation(name, parity):
    module, network = build(golden.CONFIGS[name]), f"{golden.CONFIGS[name]['_class_name']}, {name}"
    recorded = json.loads(str(RECORDED[f"{name}/shapes"]))
    assert torch_shapes(module) == {k: tuple(v) for k, v in recorded.items()}
    labels, params = golden.inputs(golden.CONFIGS[name]), random_params(module)
    x, sigma, of = nhwc(labels.pop("x")), labels.pop("sigma"), nhwc(labels.pop("of"))

    def loss(params, x):
        out, features, levels = Apply(module)(params, x, sigma, labels, features=True)
        return (out * of).sum(), (out, features, levels)

    (weights, image), (out, features, levels) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    parity(network, "output", out, nhwc(RECORDED[f"{name}/out"]))
    parity(network, "output", features, nhwc(RECORDED[f"{name}/features"]))
    parity(network, "input gradient", image, nhwc(RECORDED[f"{name}/grad"]))
    parity.weights(network, weights, RECORDED[f"{name}/grad_norm"])
    np.testing.assert_array_equal(levels[0].skip, features)  # the decoder's first skip connection
    for level, seen in zip(module.levels()[::-1], levels, strict=True):
        assert seen.after.shape == (2, level.size, level.size, level.width)
        assert seen.before.shape[:3] == seen.skip.shape[:3] == seen.after.shape[:3]


@pytest.mark.parametrize(
    ("name", "count"),
    [  # ADM: as counted in the published network. The others: 55.7 and 56.4 million in papers that distil them
        ("edm-imagenet-64x64-cond-adm", 295_899_267),
        ("edm-cifar10-32x32-cond-vp", 55_735_299),
        ("edm-cifar10-32x32-cond-ve", 56_400_771),
    ],
)
def test_weight_counts_of_the_published_models(name, count, parity):
    shapes = flat_shapes(build(edm.PRESETS[name]))
    parity.size(name, shapes, count)
    if name.endswith("adm"):  # the part that DMD2's discriminator runs and trains
        sizes = {path: np.prod(x.shape) for path, x in shapes.items()}
        assert sum(n for path, n in sizes.items() if path[0] == "enc" or path[0].startswith("map")) == 91_805_376


def test_tensor_names_of_the_published_models():
    names = torch_shapes(build(edm.PRESETS["edm-imagenet-64x64-cond-adm"]))
    assert names["enc.64x64_conv.weight"] == (192, 3, 3, 3)
    assert names["enc.32x32_block0.skip.weight"] == (384, 192, 1, 1)
    assert names["enc.8x8_block2.qkv.weight"] == (3 * 768, 768, 1, 1)
    assert names["dec.8x8_in0.affine.weight"] == (2 * 768, 768)
    assert names["map_label.weight"] == (768, 1000)
    assert names["out_conv.bias"] == (3,)
    names = torch_shapes(build(edm.PRESETS["edm-cifar10-32x32-cond-ve"]))
    assert names["map_noise.freqs"] == (128,)
    assert names["map_augment.weight"] == (256, 9)
    assert names["map_label.bias"] == (256,)
    assert names["enc.16x16_aux_residual.weight"] == (256, 3, 3, 3)
    assert names["dec.32x32_aux_norm.weight"] == (256,)


@pytest.mark.parametrize(
    ("kind", "sigma", "expected"),
    [  # c_skip, c_out, c_in, c_noise of table 1 by hand
        ("edm", 0.002, (0.999984, 0.00199998, 1.999984, -1.553652)),
        ("edm", 0.5, (0.5, 0.353553, 1.414214, -0.173287)),
        ("edm", 80.0, (3.90610e-5, 0.4999902, 0.01249976, 1.0955067)),
        ("vp", 0.002, (1.0, -0.002, 0.999998, 0.0398021)),
        ("vp", 80.0, (1.0, -80.0, 0.01249902, 932.5776)),
        ("ve", 0.02, (1.0, 0.02, 1.0, -4.605170)),
        ("ve", 80.0, (1.0, 80.0, 1.0, 3.688879)),
    ],
)
def test_preconditioning(kind, sigma, expected):
    np.testing.assert_allclose(edm.PRECONDITIONING[kind](jnp.float32(sigma), 0.5), expected, rtol=2e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_is_centred_and_upsampling_is_the_transpose(taps):
    x = np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype("f")
    resample = jax.jit(edm_blocks.resample, static_argnums=(1, 2))
    inside = (slice(None), slice(1, -1), slice(1, -1)) if len(taps) == 4 else ()
    for up, shape in ((True, (2, 12, 16, 3)), (False, (2, 3, 4, 3))):
        y = resample(x, taps, up)
        assert y.shape == shape
        assert resample(x.astype(jnp.bfloat16), taps, up).dtype == jnp.bfloat16
        np.testing.assert_allclose(resample(np.full_like(x, 0.7), taps, up)[inside], 0.7, rtol=1e-6)
        np.testing.assert_allclose(y[:, ::-1, ::-1], resample(x[:, ::-1, ::-1], taps, up), atol=1e-6)  # no shift
    adjoint = jax.linear_transpose(lambda x: resample(x, taps, False), x)  # up is the transpose of down, times 4
    np.testing.assert_allclose(resample(y, taps, True), 4 * jax.jit(adjoint)(y)[0], atol=1e-5)


def test_two_tap_filter_is_mean_pooling_and_nearest_upsampling():
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 2)).astype("f")
    resample = jax.jit(edm_blocks.resample, static_argnums=(1, 2))
    np.testing.assert_allclose(resample(x, (1, 1), False), x.reshape(1, 2, 2, 2, 2, 2).mean((2, 4)), atol=1e-6)
    np.testing.assert_array_equal(resample(x, (1, 1), True), x.repeat(2, 1).repeat(2, 2))


@functools.cache
def small():
    """(net, x, sigma) of a small ADM with five classes."""
    module = build(SMALL)
    x = nhwc(golden.inputs(SMALL)["x"])
    return Denoiser(random_params(module), Apply(module), EDM(), "x0"), x, np.array([0.03, 4.0], np.float32)


@functools.cache
def apply():
    return jax.jit(small()[0].apply)


def test_output_approaches_the_input_at_low_noise():
    net, x, _ = small()
    for sigma in (1e-3, 1e-5):
        moved = np.abs(apply()(net.params, x, np.full(2, sigma, "f"), LABELS) - x)
        assert moved.max() < 10 * sigma  # c_out is sigma, F of order one


def test_output_depends_on_the_class_and_the_null_label_adds_nothing():
    net, x, sigma = small()
    out = apply()(net.params, x, sigma, LABELS)
    for change in ({"class_labels": np.array([2, 5])}, {"class_labels": np.array([1, 0])}):
        other = apply()(net.params, x, sigma, change)
        assert (np.abs(other - out).max((1, 2, 3)) > 1e-3).tolist() == (change["class_labels"] != [1, 5]).tolist()
    silent = net.params | {"map_label": {"kernel": 0.0 * net.params["map_label"]["kernel"]}}
    zero = apply()(silent, x, sigma, LABELS)
    np.testing.assert_allclose(zero[1], out[1], atol=1e-6)
    assert np.abs(zero[0] - out[0]).max() > 1e-3


def test_missing_augment_labels_equal_zeros():
    module = build(golden.CONFIGS["ddpmpp"] | {"channel_mult": [1]})
    params, x = random_params(module), golden.inputs(golden.CONFIGS["ddpmpp"])
    labels = {"class_labels": x["class_labels"]}
    run = jax.jit(lambda augment: Apply(module)(params, nhwc(x["x"]), x["sigma"], labels | {"augment_labels": augment}))
    np.testing.assert_allclose(run(None), run(np.zeros((2, 4), "f")), atol=1e-5)
    assert np.abs(run(None) - run(x["augment_labels"])).max() > 1e-3


@functools.cache
def flat():
    """(net, x, sigma) with a single level, for functions that compile slowly."""
    module = build(SMALL | {"channel_mult": [1], "attn_resolutions": []})
    _, x, sigma = small()
    return Denoiser(random_params(module), Apply(module), EDM(), "x0"), x[:, :8, :8], sigma


def test_feature_gradients_reach_only_encoder_and_embedding():
    net, x, sigma = flat()
    grads = jax.jit(jax.grad(lambda p: (net.apply(p, x, sigma, LABELS, features=True)[1] ** 2).mean()))(net.params)
    moving = {p for p, g in flax.traverse_util.flatten_dict(grads).items() if np.any(np.asarray(g) != 0)}
    assert moving == {p for p in flax.traverse_util.flatten_dict(grads) if p[0] == "enc" or p[0].startswith("map")}


def test_features_alone_skip_the_decoder():
    net, x, sigma = flat()

    def flops(part):
        run = jax.jit(lambda p: net.apply(p, x, sigma, LABELS, features=True)[part])
        return run.lower(net.params).compile().cost_analysis()["flops"]

    assert flops(1) < 0.4 * flops(0)


def test_bfloat16_with_remat_is_close_to_float32():
    net, x, sigma = flat()
    other = type(net.apply.module).from_config(net.apply.module.to_config(), dtype=jnp.bfloat16, remat=True)
    assert jax.tree.structure(weight_shapes(other)) == jax.tree.structure(net.params)
    run = jax.jit(lambda module, p: Apply(module)(p, x, sigma, LABELS, features=True), static_argnums=0)
    jaxpr = str(jax.make_jaxpr(run, static_argnums=0)(other, net.params))
    assert {*re.findall(r"(\w+)\[[\d,]*\] = conv_general_dilated", jaxpr)} == {"bf16"}
    outputs = (jax.tree.leaves(run(module, net.params)) for module in (net.apply.module, other))
    for whole, half in zip(*outputs, strict=True):
        assert whole.dtype == half.dtype == jnp.float32
        assert 1e-4 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()  # bfloat16 has 8 bits


def test_remat_stores_less_for_the_backward_pass():
    net, *x = flat()

    def stored(**ours):
        run = Apply(type(net.apply.module).from_config(net.apply.module.to_config(), **ours))
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: run(p, *x, LABELS), p), net.params)
        return sum(np.prod(x.shape) for x in jax.tree.leaves(backward))

    assert stored(remat=True) < 0.5 * stored()


@pytest.mark.parametrize(
    ("config", "last"),
    [
        (SMALL, [("out_conv",)]),
        pytest.param(golden.CONFIGS["ddpmpp"], [("dec", "16x16_aux_conv")], marks=pytest.mark.slow),
        (golden.CONFIGS["progressive"], [("dec", "16x16_aux_conv"), ("dec", "8x8_aux_conv")]),
    ],
)
def test_new_networks_use_the_edm_schedule_and_start_as_c_skip_x(config, last):
    """Only the layers whose sum is F are initialised to 0."""
    net, drawn = models.init(config), models.init(config, zero_out=False)
    assert (net.schedule, net.predicts) == (EDM(), "x0")
    flat, whole = (flax.traverse_util.flatten_dict(n.params) for n in (net, drawn))
    assert {path for path in flat if np.any(flat[path] != whole[path])} == {
        (*layer, leaf) for layer in last for leaf in ("kernel", "bias")
    }
    x = golden.inputs(config)
    x0, sigma, labels = nhwc(x["x"]), x["sigma"], {k: x[k] for k in x if k.endswith("labels")}
    c_skip = edm.PRECONDITIONING[net.apply.module.precond](sigma, 0.5)[0][:, None, None, None]
    np.testing.assert_array_equal(jax.jit(net.apply)(net.params, x0, sigma, labels), c_skip * x0)


def test_new_networks_refuse_other_schedules(tmp_path):
    with pytest.raises(ValueError, match=r"DhariwalUNet predicts x0 on the schedule EDM\(\), not eps on DDPM"):
        models.init(SMALL, 0, DDPM(), "eps")
    with pytest.raises(ValueError, match=r"not v on EDM"):
        models.init(SMALL, 0, EDM(sigma_max=50.0), "v")
    assert models.init(SMALL, 0, EDM(sigma_max=50.0)).schedule.sigma_max == 50.0
    with pytest.raises(ValueError, match="AutoencoderKL does not denoise: models.init takes .* DhariwalUNet, SongUNet"):
        models.init({"_class_name": "AutoencoderKL"})
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(SMALL))
    assert Pipeline(str(tmp_path), random_seed=0).denoiser.schedule == EDM()


def test_heun_samples_are_finite_and_depend_on_the_class():
    net, x, _ = flat()

    @jax.jit
    def sample(net, labels):
        return heun(lambda z, t: net(z, t, {"class_labels": labels}), net.schedule, x, net.schedule.grid(3))

    x0 = sample(net, np.array([1, 5]))
    assert x0.shape == x.shape
    assert np.all(np.isfinite(x0))
    assert np.abs(sample(net, np.array([2, 5])) - x0)[0].max() > 1e-3


def test_configs_round_trip_and_give_equal_tree_structures():
    for config in golden.CONFIGS.values():
        module = build(config)
        assert build(json.loads(json.dumps(module.to_config()))) == module
        assert module.to_config()["_class_name"] == config["_class_name"]
    net = small()[0]
    assert jax.tree.structure(net) == jax.tree.structure(net.replace(apply=Apply(build(SMALL))))


@pytest.mark.parametrize("name", ["adm", "ncsnpp", "progressive"])
def test_published_state_dicts_are_read(name):
    module = build(golden.CONFIGS[name])
    weights = {k: golden.weight(k, s) for k, s in torch_shapes(module).items()}
    taps = np.array(golden.CONFIGS[name].get("resample_filter", [1, 1]), "f")
    kernel = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    part = {"ncsnpp": "enc.8x8_aux_residual", "progressive": "dec.16x16_aux_up"}.get(name, "dec.16x16_up.skip")
    filters = {f"{k}.resample_filter": kernel for k in ("enc.8x8_down.conv0", "enc.8x8_down.skip", part)}
    file = {f"model.{k}": x for k, x in (weights | filters).items()}
    assert {*filters} <= {*module.resample_filters()}
    read = module.published(file, "file.pt")
    assert {*read} == {*weights}
    assert all(read[k] is weights[k] for k in weights)
    with pytest.raises(ValueError, match=rf"file.pt: {part}.resample_filter is not the filter"):
        module.published(file | {f"model.{part}.resample_filter": kernel[..., :1]}, "file.pt")


@pytest.mark.parametrize(
    ("config", "shape", "text", "sentence"),
    [
        (SMALL, (2, 15, 16, 3), LABELS, "height 15 and width 16 must be divisible by 2"),
        (SMALL, (2, 16, 16, 4), LABELS, "img_channels = 3 but x has 4"),
        (SMALL, (2, 16, 16, 3), None, "class-conditional: pass class_labels .b., 5 for none"),
        (SMALL, (2, 16, 16, 3), {"class_labels": np.zeros((2, 5))}, r"integers \[b\], not an array of shape \(2, 5\)"),
        (golden.CONFIGS["ncsnpp"], (2, 16, 16, 3), LABELS, "without classes"),
        (SMALL, (2, 16, 16, 3), LABELS | {"augment_labels": np.zeros((2, 9))}, r"\(2, 9\), this network .* \[b, 0\]"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named(config, shape, text, sentence):
    module = build(config)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(Apply(module), weight_shapes(module), np.zeros(shape, "f"), np.ones(2, "f"), text)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"new_option": 1, "precond": "iddpm"}, "DhariwalUNet does not support new_option = 1, precond = 'iddpm'"),
        ({"num_blocks": None}, "num_blocks = None"),
        ({"encoder_type": "skip"}, "DhariwalUNet does not support encoder_type = 'skip'"),
        ({"_class_name": "SongUNet", "channels_per_head": 8}, "SongUNet does not support channels_per_head"),
        ({"img_resolution": 17, "attn_resolutions": []}, "img_resolution 17 cannot be halved 1 times"),
        ({"attn_resolutions": [8, 12]}, r"attn_resolutions has \[12\], but the levels of this network are \[16, 8\]"),
        ({"channels_per_head": 5}, "16 channels cannot be split into attention heads of channels_per_head = 5"),
    ],
)
def test_unsupported_options_are_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        weight_shapes(build(SMALL | change))


def test_asymmetric_filters_are_refused():
    for taps in ([1, 2, 1], [1, 2]):
        with pytest.raises(ValueError, match="is not symmetric with an even number of taps"):
            build(golden.CONFIGS["ncsnpp"] | {"resample_filter": taps})


def test_options_for_training_from_scratch_are_ignored():
    assert build(SMALL | {"dropout": 0.1, "label_dropout": 0.1, "_note": 1}) == build(SMALL)

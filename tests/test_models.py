"""UNets and branches: equal to PyTorch diffusers, no effect of new branches, bad input refused."""

import functools
import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_models as golden

from cddistill import models
from cddistill.diffusion import DDPM
from cddistill.models import configured, convert
from cddistill.models.adapter import ControlNetModel, MuBlendModel
from cddistill.models.blocks import GroupNorm, Upsample2D, conv
from cddistill.models.init import weight_shapes
from cddistill.models.unet import Apply, Residuals, UNet2DConditionModel, adjust, conditioning
from cddistill.net import Denoiser

RECORDED = np.load(Path(golden.__file__).parent / "models.npz")
SD1 = {"cross_attention_dim": 768}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SSD1B = SDXL | {
    "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}  # fmt: skip
SMALL = golden.PIXEL | {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
LABELS = {"class_labels": np.array([1, 2])}
SLOW = pytest.mark.slow


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def recorded_weights(module):
    """The weights that make_models.py gave to diffusers."""
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    theirs = {convert.torch_name(p): convert.to_torch(p, np.empty(s.shape)).shape for p, s in shapes.items()}
    arrays = golden.weights(theirs)
    return convert.unflatten(convert.match(arrays, shapes, convert.torch_name, convert.from_torch, "golden"))


@functools.cache
def recorded_net(name):
    """(net, z_t, t, text) of a recorded configuration."""
    module = UNet2DConditionModel.from_config(golden.UNETS[name])
    x = golden.inputs(golden.UNETS[name])
    return Denoiser(recorded_weights(module), Apply(module), DDPM(), "eps"), nhwc(x.pop("sample")), x.pop("timestep"), x


# One of every structure: cross-attention, deeper transformers with added conditions, a class-conditional pixel model
# with self-attention, numbers of transformer blocks per layer. Extra input channels are tested
# below, block options in test_modules.
USUAL = ("sd15", "sdxl", "pixel")


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in USUAL else SLOW) for x in golden.UNETS])
def test_unet_and_every_gradient_equal_diffusers(name, parity):
    """Editing and inpainting models take z_t and a concatenated condition."""
    (net, sample, t, text), network = recorded_net(name), f"UNet2DConditionModel, {name}"

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, sample):
        concat = {"concat": sample[..., 4:]} if sample.shape[-1] > 4 else {}
        out = net.apply(params, sample[..., :4], t, text | concat)
        return (out**2).mean(), out

    (_, out), (weights, image) = jax.jit(loss)(net.params, sample)
    parity(network, "output", out, nhwc(RECORDED[f"{name}/out"]))
    parity(network, "input gradient", image, nhwc(RECORDED[f"{name}/grad"]))
    parity.weights(network, weights, RECORDED[f"{name}/grad_norm"])


@pytest.mark.parametrize("name", ["sd15", pytest.param("pixel", marks=SLOW)])  # same blocks as its UNet
def test_controlnet_and_every_gradient_equal_diffusers(name, parity):
    (net, z_t, t, text), network = recorded_net(name), f"ControlNetModel, {name}"
    config = golden.controlnet_config(name)
    module = ControlNetModel.from_config(config)
    x = golden.inputs(config | {"sample_size": golden.UNETS[name]["sample_size"]}, seed=1)
    z_c, cond, t_c = nhwc(x.pop("sample")), nhwc(x.pop("controlnet_cond")), x.pop("timestep")

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(branch, cond):
        residuals = Apply(module)(branch, z_c, t_c, x, cond, conditioning_scale=0.7)
        out = net.apply(net.params, z_t, t, text, residuals)
        return (out**2).mean(), (out, residuals.mid)

    (_, outputs), (weights, image) = jax.jit(loss)(recorded_weights(module), cond)
    for ours, recorded in zip(outputs, ("controlled", "mid"), strict=True):
        parity(network, "output", ours, nhwc(RECORDED[f"{name}/{recorded}"]))
    parity(network, "input gradient", image, nhwc(RECORDED[f"{name}/controlled_grad"]))
    parity.weights(network, weights, RECORDED[f"{name}/controlled_grad_norm"])


@pytest.mark.parametrize(
    ("name", "config", "unet", "controlnet"),
    [
        ("Stable Diffusion 1.5", SD1, 859_520_964, 361_279_120),  # the others are variants of it: slow
        pytest.param("Stable Diffusion 2.1", SD2, 865_910_724, 364_228_240, marks=SLOW),
        pytest.param("SDXL", SDXL, 2_567_463_684, None, marks=SLOW),
        pytest.param("SSD-1B", SSD1B, 1_331_334_404, None, marks=SLOW),
        pytest.param("InstructPix2Pix", SD1 | {"in_channels": 8}, 859_532_484, None, marks=SLOW),
        pytest.param("LCM of Stable Diffusion 1.5", SD1 | {"time_cond_proj_dim": 256}, 859_602_884, None, marks=SLOW),
        pytest.param("Stable Diffusion 1.5 inpainting", SD1 | {"in_channels": 9}, 859_535_364, None, marks=SLOW),
    ],
)
def test_parameter_counts_equal_the_published_models(name, config, unet, controlnet, parity):
    module, shapes = models.abstract(config)
    parity.size(f"UNet of {name}", shapes, unet)
    if controlnet:
        make = functools.partial(models.make_branch, embedding_channels=(16, 32, 96, 256))
        branch = jax.eval_shape(make, Denoiser(shapes, Apply(module), DDPM(), "eps"), jax.random.key(0))
        parity.size(f"ControlNet of {name}", branch.params, controlnet)
        assert sum(k.startswith("controlnet_") for k in branch.params) == 1 + 13


@functools.cache
def small(seed=0):
    """(teacher, z_t, t, text) with two levels, the second with attention; small, since many tests compile it."""
    module = UNet2DConditionModel.from_config(SMALL)
    rng = np.random.default_rng(seed)
    z_t, t = rng.normal(size=(2, 8, 8, 3)).astype(np.float32), np.array([20, 900])
    return Denoiser(recorded_weights(module), Apply(module), DDPM(), "eps"), z_t, t, LABELS


@functools.cache
def small_branch(kind):
    """(branch, student(params, cond, conditioning_scale), cond) for the small teacher."""
    teacher, z_t, t, text = small()
    branch = models.make_branch(teacher, jax.random.key(1), kind, embedding_channels=(8,))

    @jax.jit
    def run(params, unet, cond, scale):
        return teacher.apply(unet, z_t, t, text, branch.apply(params, z_t, t, text, cond, conditioning_scale=scale))

    cond = np.random.default_rng(0).uniform(size=z_t.shape).astype(np.float32)
    return branch, lambda params, cond, scale=1.0: run(params, teacher.params, cond, scale), cond


@functools.cache
def small_outputs():
    net, *x = small()
    return jax.jit(net.apply)(net.params, *x)


@pytest.mark.parametrize("kind", ["controlnet", pytest.param("mu_blend", marks=SLOW)])
def test_a_branch_has_no_effect_until_its_weights_change(kind):
    branch, student, cond = small_branch(kind)
    _, *x = small()
    residuals = jax.jit(branch.apply)(branch.params, *x, cond)
    features = jax.tree.map(lambda r: jax.random.normal(jax.random.key(0), r.shape), (residuals.down, residuals.mid))
    adjusted = adjust(residuals, *features)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, adjusted, features)))  # bit for bit
    for c in (cond, None):  # whole programs are fused differently, so equal up to rounding
        np.testing.assert_allclose(student(branch.params, c), small_outputs(), atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.1, branch.params)
    assert jnp.abs(student(moved, cond) - small_outputs()).max() > 1e-2
    assert jnp.abs(student(moved, cond) - student(moved, None)).max() > 1e-3  # cond has an effect
    np.testing.assert_allclose(student(moved, cond, 0.0), small_outputs(), atol=1e-5)  # conditioning_scale


def moving(grads):
    """The parts of a branch with a non-zero gradient."""
    return {name for name, part in grads.items() if any(jnp.any(g != 0) for g in jax.tree.leaves(part))}


def test_gradients_reach_a_controlnet_from_its_zero_convolutions_backwards():
    branch, student, cond = small_branch("controlnet")
    grad = jax.jit(jax.grad(lambda params: (student(params, cond) ** 2).mean()))
    params, seen = branch.params, []
    for _ in range(3):
        g = grad(params)
        seen.append(moving(g) | {f"E/{name}" for name in moving(g["controlnet_cond_embedding"])})
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, g)
    zero_convs = {name for name in branch.params if name.startswith(("controlnet_down_blocks", "controlnet_mid"))}
    assert seen[0] == zero_convs
    encoder = {name for name in branch.params if not name.startswith("controlnet_")}
    assert seen[1] == zero_convs | encoder | {"controlnet_cond_embedding", "E/conv_out"}
    assert seen[2] == seen[1] | {"E/conv_in"}


def test_a_blend_is_the_papers_equation_and_only_mu_has_a_gradient_at_first():
    branch, student, cond = small_branch("mu_blend")
    _, *x = small()
    apply = jax.jit(branch.apply)
    quarter, whole = (apply(branch.params | {"mu": jnp.float32(mu)}, *x, cond) for mu in (0.25, 1.0))
    assert (quarter.keep, whole.keep) == (0.75, 0.0)
    blended, mid = adjust(quarter, tuple(jnp.ones_like(h) for h in whole.down), 2 * jnp.ones_like(whole.mid))
    np.testing.assert_allclose(blended[3], 0.75 + 0.25 * whole.down[3], rtol=1e-5)
    np.testing.assert_allclose(mid, 1.5 + 0.25 * whole.mid, rtol=1e-5)
    assert "conv_in" not in branch.params  # its input is E(c), not z_t
    noise = apply(branch.params | {"mu": jnp.float32(1.0)}, x[0] + 1.0, *x[1:], cond)
    assert jnp.array_equal(noise.mid, whole.mid)
    grads = jax.jit(jax.grad(lambda params: (student(params, cond) ** 2).mean()))(branch.params)
    assert moving(grads) == {"mu"}


def test_branch_copies_share_no_buffer_with_the_teacher():
    branch, teacher = small_branch("controlnet")[0], small()[0]
    for name in ("conv_in", "time_embedding", "class_embedding", "down_blocks_0", "down_blocks_1", "mid_block"):
        ours, theirs = jax.tree.leaves(branch.params[name]), jax.tree.leaves(teacher.params[name])
        assert all(jnp.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in zip(ours, theirs, strict=True))


def test_remat_and_bfloat16_change_only_rounding():
    net, *x = small()
    other = UNet2DConditionModel.from_config(SMALL, dtype=jnp.bfloat16, remat=True)
    assert jax.tree.structure(weight_shapes(other)) == jax.tree.structure(net.params)
    half = jax.jit(Apply(other))(net.params, *x)
    assert half.dtype == small_outputs().dtype == jnp.float32
    np.testing.assert_allclose(half, small_outputs(), atol=0.1)  # bfloat16 has 8 bits
    assert jnp.abs(half - small_outputs()).max() > 1e-4


def test_features_are_the_input_skip_and_output_of_each_level():
    """Distinct constants for skips and middle identify them; the next layers, applied to `after`, check the rest."""
    net, z_t, t, text = small()
    shapes = [(2, 8, 8, 8), (2, 8, 8, 8), (2, 4, 4, 8), (2, 4, 4, 16), (2, 4, 4, 16)]
    *down, mid = (jnp.full(shape, float(i)) for i, shape in enumerate(shapes))
    seen = jax.jit(lambda: net.apply(net.params, z_t, t, text, Residuals(tuple(down), mid, 0.0), features=True))
    out, middle, (coarse, fine) = seen()
    assert jnp.unique(middle) == jnp.unique(coarse.before) == 4
    assert (jnp.unique(coarse.skip), jnp.unique(fine.skip)) == (3, 1)

    def layer(module, params, h):
        return module.apply({"params": params}, h)

    doubled = layer(Upsample2D(16), net.params["up_blocks_0"]["upsamplers_0"], coarse.after)
    np.testing.assert_allclose(doubled, fine.before, atol=1e-5)
    h = jax.nn.silu(layer(GroupNorm(8, 1e-5), net.params["conv_norm_out"], fine.after))
    np.testing.assert_allclose(layer(conv(3, 3, None, None), net.params["conv_out"], h), out, atol=1e-5)


def test_remat_stores_less_for_the_backward_pass():
    net, *x = small()

    def stored(**kwargs):
        module = UNet2DConditionModel.from_config(SMALL, **kwargs)
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: Apply(module)(p, *x), p), net.params)
        return sum(np.prod(x.shape) for x in jax.tree.leaves(backward))

    assert stored(remat=True) < 0.5 * stored()


def test_concat_is_further_channels_and_time_may_be_a_float():
    net, z_t, t, text = small()
    split = jax.jit(net.apply)(net.params, z_t[..., :1], t.astype(np.float32), text | {"concat": z_t[..., 1:]})
    np.testing.assert_allclose(split, small_outputs(), atol=1e-6)


def test_text_may_be_an_array_a_dict_or_none():
    tokens = np.zeros((2, 5, 12))
    assert conditioning(tokens) == {"encoder_hidden_states": tokens}
    assert conditioning(LABELS) == LABELS
    assert conditioning(None) == {}


def test_equal_configs_give_one_pytree_structure():
    a, b = models.init(SMALL, seed=0), models.init(SMALL, seed=1)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert hash(a.apply) == hash(b.apply)
    assert jax.tree.structure(a) != jax.tree.structure(models.init(SMALL, dtype=jnp.bfloat16))


def test_branch_class_is_preserved_by_its_config():
    for kind, cls in (("controlnet", ControlNetModel), ("mu_blend", MuBlendModel)):
        module = small_branch(kind)[0].apply.module
        assert isinstance(module, cls)
        assert convert.build(module.to_config()) == module


@pytest.mark.parametrize(
    ("name", "shape", "text", "sentence"),
    [
        ("pixel", (2, 18, 16, 3), LABELS, "height 18 and width 16 must be divisible by 4"),
        ("pixel", (2, 16, 16, 4), LABELS, "in_channels = 3 but z_t .* has 4"),
        ("pixel", (2, 16, 16, 3), None, "class-conditional: pass class_labels"),
        ("sd15", (2, 8, 8, 4), None, "cross-attention: pass text embeddings"),
        ("sd15", (2, 8, 8, 4), np.zeros((2, 5, 7), np.float32), "have width 7, cross_attention_dim is 12"),
        ("sd15", (2, 8, 8, 4), {"encoder_hidden_states": np.zeros((2, 5, 12))} | LABELS, "without classes"),
        ("sdxl", (2, 8, 8, 4), np.zeros((2, 5, 12), np.float32), "added_cond_kwargs with text_embeds"),
    ],
)
def test_bad_inputs_are_refused(name, shape, text, sentence):
    net, _, t, _ = recorded_net(name)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(net.apply, net.params, np.zeros(shape, np.float32), t, text)


def test_bad_conditions_are_refused():
    teacher, z_t, t, text = small()
    branch = models.make_branch(teacher, jax.random.key(0), embedding_channels=(8, 8))
    with pytest.raises(ValueError, match=r"needs \(2, 16, 16, 3\): 3 channels and 2 times the size of z_t"):
        jax.eval_shape(branch.apply, branch.params, z_t, t, text, np.zeros((2, 8, 8, 3)))
    r = jax.eval_shape(branch.apply, branch.params, z_t, t, text, np.zeros((2, 16, 16, 3)))
    with pytest.raises(ValueError, match="4 skips but the branch gives 3"):
        jax.eval_shape(teacher.apply, teacher.params, z_t, t, text, r._replace(down=r.down[1:]))
    with pytest.raises(ValueError, match="a residual of shape"):
        jax.eval_shape(teacher.apply, teacher.params, z_t, t, text, Residuals(r.down[::-1], r.mid))


def test_unsupported_branches_are_refused():
    teacher = small()[0]
    with pytest.raises(ValueError, match="'control' is not one of controlnet, mu_blend"):
        models.make_branch(teacher, jax.random.key(0), "control")
    with pytest.raises(ValueError, match="only a UNet2DConditionModel"):
        models.make_branch(teacher.replace(apply=lambda *_: 0.0), jax.random.key(0))
    with pytest.raises(ValueError, match="center_input_sample = True"):
        models.make_branch(recorded_net("odd")[0], jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"encoder_hid_dim": 4}, "does not support encoder_hid_dim = 4"),
        ({"act_fn": "gelu", "dropout": 0.1}, "act_fn = 'gelu', dropout = 0.1"),
        ({"new_option": None}, "new_option = None"),
        ({"norm_num_groups": None}, "norm_num_groups = None"),
        ({"layers_per_block": "2", "norm_eps": [1]}, r"layers_per_block = '2', norm_eps = \[1\]; .*models\.unet lists"),
        ({"block_out_channels": [16, "32", 32]}, r"block_out_channels = \[16, '32', 32\]"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "UNetMidBlock2DSimpleCrossAttn"),
        ({"down_block_types": ["KDownBlock2D"] * 3}, "block types KDownBlock2D are not supported"),
        ({"layers_per_block": [1, 2]}, "layers_per_block has 2 entries but block_out_channels has 3"),
        ({"norm_num_groups": 7}, "= 16 cannot be split into norm_num_groups = 7"),
        ({"attention_head_dim": 5}, "32 channels cannot be split into heads of width attention_head_dim = 5"),
    ],
)
def test_unsupported_options_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.abstract(golden.PIXEL | change)


LAYERS = golden.SSD | {"layers_per_block": 1}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"reverse_transformer_layers_per_block": None},
            "numbers per layer: give the decoder's, coarsest first, in",
        ),
        ({"reverse_transformer_layers_per_block": [1, 2]}, "has 2 entries but block_out_channels has 3"),
        ({"reverse_transformer_layers_per_block": [[1], 2, 1]}, r"per_block\[0\] = \[1\] has 1 entries for 2 layers"),
        (
            {"transformer_layers_per_block": [1, [], 2]},
            r"^transformer_layers_per_block\[1\] = \[\] has 0 entries",
        ),
        ({"transformer_layers_per_block": [1, [1, "2"], 2]}, "does not support transformer_layers_per_block = "),
        ({"layers_per_block": True}, "layers_per_block = True"),
    ],
)
def test_numbers_of_transformer_blocks_must_fit_the_layers(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.abstract(LAYERS | change)


def test_numbers_of_transformer_blocks_per_layer_survive_config_json():
    module = UNet2DConditionModel.from_config(golden.SSD)
    assert UNet2DConditionModel.from_config(json.loads(json.dumps(module.to_config()))) == module
    assert module.up_depths() == ((1, 2, 3), (2, 1, 1), 1)
    branch = jax.eval_shape(models.make_branch, Denoiser(weight_shapes(module), Apply(module), DDPM(), "eps"),
                            jax.random.key(0))  # fmt: skip
    assert branch.module.depths() == module.depths()
    assert "reverse_transformer_layers_per_block" not in branch.module.to_config()  # a ControlNet has no decoder


# What diffusers' EMAModel writes into the config.json of unet_ema/, and what other libraries note in any config.
EMA = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 2 / 3,
       "update_after_step": 0, "use_ema_warmup": False}  # fmt: skip
NOTES = {"_name_or_path": "x/y", "_diffusers_version": "0.21.0", "_use_default_values": ["act_fn"], "_commit_hash": "0",
         "transformers_version": "4.30.0", "torch_dtype": "float16", "dtype": "bfloat16"}  # fmt: skip
QUANTIZED = {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}
SMALLEST = {
    "UNet2DConditionModel": golden.ONE,
    "ControlNetModel": {k: v for k, v in golden.ONE.items() if k not in golden.UNET_KEYS},
    "AutoencoderKL": {"block_out_channels": [8], "norm_num_groups": 4},
    "AutoencoderTiny": {},
    "CLIPTextModel": {},
}


@pytest.mark.parametrize("name", SMALLEST)
def test_notes_of_trainers_and_libraries_are_ignored_and_changes_of_the_network_refused(name):
    config = SMALLEST[name] | {"_class_name": name}
    assert convert.build(config | EMA | NOTES) == convert.build(config)
    with pytest.raises(ValueError, match=f"{name} does not support quantization_config = "):
        convert.build(config | QUANTIZED)
    with pytest.raises(ValueError, match=f"{name} does not support decay_rate = 0.9; cddistill.models"):
        convert.build(config | {"decay_rate": 0.9})


def test_harmless_options_are_ignored():
    harmless = {"_diffusers_version": "0.6.0", "dropout": 0.0, "upcast_attention": True, "encoder_hid_dim": None}
    assert models.abstract(golden.PIXEL | harmless)[0] == models.abstract(golden.PIXEL)[0]


DEFAULTS = json.loads((Path(golden.__file__).parent / "defaults.json").read_text())["networks"]


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_config_leaves_out_is_as_in_pytorchs_class(name):
    """Every option of the class is a field with its default, or supported at its default, or without effect."""
    theirs = {k: v for k, v in DEFAULTS[name].items() if not k.startswith("_")}
    module = convert.build({"_class_name": name})
    assert convert.build(theirs | {"_class_name": name}) == module
    ours = {k: v for k, v in json.loads(json.dumps(module.options())).items() if k in theirs}
    assert ours == {k: theirs[k] for k in ours}
    assert not {*theirs} - {*ours, *module.supported, *module.no_effect, *configured.NOTES}

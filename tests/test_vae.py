"""Autoencoders: equal to PyTorch diffusers; latents scaled for the diffusion model."""

import dataclasses
import functools
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_vae as golden
from golden.make_models import weights

from cddistill.method import per_sample
from cddistill.models import convert
from cddistill.models.init import weight_shapes
from cddistill.models.tiny_vae import AutoencoderTiny
from cddistill.models.vae import AutoencoderKL, Decode, Encode
from cddistill.net import Autoencoder

RECORDED = np.load(Path(golden.__file__).parent / "vae.npz")
SD = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
}  # fmt: skip
SLOW = pytest.mark.slow
SD3 = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def build(name, **ours):
    cls = AutoencoderTiny if name == "tiny" else AutoencoderKL
    return cls.from_config(golden.CONFIGS[name], **ours)


def torch_weights(module):
    """The weights that make_vae.py gave to diffusers, by PyTorch's names and in its layout."""
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    return weights({convert.torch_name(p): convert.to_torch(p, np.empty(s.shape)).shape for p, s in shapes.items()})


def read(module, arrays):
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    return convert.unflatten(convert.match(arrays, shapes, convert.torch_name, convert.from_torch, "golden"))


@functools.cache
def recorded(name):
    """(autoencoder, images, unscaled latents) of a recorded configuration."""
    module = build(name)
    x, z = map(nhwc, golden.inputs(golden.CONFIGS[name]))
    return Autoencoder(read(module, torch_weights(module)), Encode(module), Decode(module)), x, z


@functools.cache
def jitted(function):
    return jax.jit(function)


def encode(autoencoder, x, key=None):
    return jitted(Autoencoder.encode)(autoencoder, x, key)


def decode(autoencoder, z):
    return jitted(Autoencoder.decode)(autoencoder, z)


def assert_close(ours, theirs):
    """1e-5 of the largest value: sums in another order give 1e-6."""
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


# sd3 and odd are sd with other channels and scales: slow. So is the scaling of sd, which the posterior's test covers.
@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in ("sd", "tiny") else SLOW) for x in golden.CONFIGS])
def test_outputs_and_every_gradient_equal_diffusers(name, parity):
    autoencoder, x, z = recorded(name)
    module, theirs = autoencoder.encoder.module, {k: RECORDED[f"{name}/{k}"] for k in ("encoded", "decoded")}
    a, b = (nhwc(golden.normal(seed, *y.shape)) for seed, y in zip((2, 3), theirs.values(), strict=True))

    def loss(params, x, z):
        encoded = module.apply({"params": params}, x, method="encode")
        decoded = module.apply({"params": params}, z, method="decode")
        return (a * encoded).sum() + (b * decoded).sum(), (encoded, decoded)

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(autoencoder.params, x, z)
    network = f"{type(module).__name__}, {name}"
    for mine, recording in zip(ours, theirs.values(), strict=True):
        parity(network, "output", mine, nhwc(recording))
    for mine, recording in zip(grads[1:], ("grad_x", "grad_z"), strict=True):
        parity(network, "input gradient", mine, nhwc(RECORDED[f"{name}/{recording}"]))
    parity.weights(network, grads[0], RECORDED[f"{name}/grad_norm"])


@pytest.mark.parametrize("name", [pytest.param("sd", marks=SLOW), "sd3", "odd", "tiny"])
def test_latents_are_scaled_for_the_diffusion_model(name):
    """Pipelines compute vae.decode(z / scaling_factor + shift_factor), or z * std / scaling_factor + mean."""
    (autoencoder, x, z), config = recorded(name), golden.CONFIGS[name]
    scale = np.array(config.get("scaling_factor", 1.0 if name == "tiny" else 0.18215))
    std, mean = np.array(config.get("latents_std", 1.0)), np.array(config.get("latents_mean", 0.0609 * (name == "sd3")))
    unscaled = nhwc(RECORDED[f"{name}/encoded"])[..., : z.shape[-1]]
    assert_close(encode(autoencoder, x), (unscaled - mean) * scale / std)
    assert_close(decode(autoencoder, np.float32((z - mean) * scale / std)), nhwc(RECORDED[f"{name}/decoded"]))


def test_encoding_with_a_key_samples_the_posterior():
    autoencoder, x, _ = recorded("sd")
    to_latent, moments = autoencoder.encoder.module.to_latent, nhwc(RECORDED["sd/encoded"])
    mean, logvar = np.split(moments, 2, -1)
    keys = per_sample(jax.random.key(5), jnp.array([7, 3]))  # one key per image
    noise = np.stack([jax.random.normal(k, mean.shape[1:]) for k in keys])
    assert_close(encode(autoencoder, x, keys), 0.18215 * (mean + np.exp(0.5 * logvar) * noise))
    noise = (to_latent(moments, jax.random.key(5)) / 0.18215 - mean) / np.exp(0.5 * logvar)
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.5  # also with a single key, images have different noise
    extreme = jnp.broadcast_to(jnp.array([0.0] * 4 + [-1e9, 0.0, 2.0, 1e9]).reshape(1, 1, 1, 8), (4, 32, 32, 8))
    std = np.exp([-15.0, 0.0, 1.0, 10.0])  # log variances are clipped to [-30, 20]
    np.testing.assert_allclose(to_latent(extreme, jax.random.key(0)).std((0, 1, 2)), 0.18215 * std, rtol=0.05)
    tiny, x, _ = recorded("tiny")
    assert jnp.array_equal(encode(tiny, x, keys), encode(tiny, x))  # it has no posterior


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_bfloat16_and_remat_change_only_rounding(name):
    autoencoder, _, z = recorded(name)
    other = build(name, dtype=jnp.bfloat16, remat=True)
    assert jax.tree.structure(weight_shapes(other)) == jax.tree.structure(autoencoder.params)
    half, whole = decode(autoencoder.replace(decoder=Decode(other)), z), decode(autoencoder, z)
    assert half.dtype == whole.dtype == jnp.float32
    np.testing.assert_allclose(half, whole, atol=0.03 * jnp.abs(whole).max())  # bfloat16 has 8 bits
    assert jnp.abs(half - whole).max() > 1e-4 * jnp.abs(whole).max()


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_remat_stores_less_for_the_backward_pass(name):
    autoencoder, _, z = recorded(name)

    def stored(remat):
        decode = Decode(build(name, remat=remat))
        _, backward = jax.eval_shape(lambda z: jax.vjp(lambda z: decode(autoencoder.params, z), z), z)
        return sum(np.prod(x.shape) for x in jax.tree.leaves(backward))

    kernels = sum(x.size for x in jax.tree.leaves(autoencoder.params["decoder"]) if x.ndim > 1)
    assert stored(True) - kernels < 0.5 * (stored(False) - kernels)


@pytest.mark.parametrize(
    ("name", "cls", "config", "published"),
    [
        ("Autoencoder of Stable Diffusion 1, 2 and XL", AutoencoderKL, SD, 83_653_863),
        ("Autoencoder of Stable Diffusion 3 and Flux", AutoencoderKL, SD | SD3, 83_819_683),
        ("TAESD", AutoencoderTiny, {}, 2_445_063),
        ("TAESD3", AutoencoderTiny, {"latent_channels": 16}, 2_458_899),
    ],
)
def test_parameter_counts_equal_the_published_models(name, cls, config, published, parity):
    module = cls.from_config(config)
    parity.size(name, weight_shapes(module), published)
    assert module.factor == 8


def test_older_names_are_read():
    """Those of older folders, where attention layers may be 1x1 convolutions, and of the former Flax classes."""
    module, today = build("sd"), torch_weights(build("sd"))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(name):
        return functools.reduce(lambda name, new: name.replace(f".{new}.", f".{names[new]}."), names, name)

    old = {older(k): x[..., None, None] if x.ndim == 2 else x for k, x in today.items()}
    assert old["decoder.mid_block.attentions.0.proj_attn.weight"].shape == (16, 16, 1, 1)
    assert len({*old} - {*today}) == 2 * 2 * 4
    back, params = read(module, module.published(old, "golden")), recorded("sd")[0].params
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(params)))
    assert all(x is today[name] for name, x in module.published(today, "golden").items())


@pytest.mark.parametrize("name", sorted(golden.CONFIGS))
def test_configs_round_trip(name):
    module = build(name)
    config = module.to_config()
    assert config["_class_name"] == type(module).__name__
    assert golden.CONFIGS[name].keys() <= config.keys()
    assert type(module).from_config(config) == module
    harmless = {"_diffusers_version": "0.6.0", "act_fn": "relu" if name == "tiny" else "silu", "force_upcast": True}
    harmless |= {"block_out_channels": [8] * 3} if name == "tiny" else {"latents_mean": config["latents_mean"]}
    changed = type(module).from_config(golden.CONFIGS[name] | harmless)
    assert dataclasses.replace(changed, force_upcast=module.force_upcast) == module


def test_equal_configs_give_one_pytree_structure():
    a, b = (Autoencoder({}, Encode(build("sd")), Decode(build("sd"))) for _ in range(2))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.structure(a) != jax.tree.structure(a.replace(decoder=Decode(build("sd", remat=True))))
    assert Encode(build("sd")) != Decode(build("sd"))


def test_pixel_models_have_an_identity_autoencoder():
    x = jnp.ones((1, 2, 2, 3))
    assert Autoencoder().decode(Autoencoder().encode(x)) is x
    assert Autoencoder().encode(x, jax.random.key(0)) is x


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "sd",
            {"act_fn": "relu", "norm_type": "spatial"},
            "AutoencoderKL .* act_fn = 'relu', norm_type = 'spatial';",
        ),
        ("sd", {"norm_num_groups": None}, "norm_num_groups = None"),
        ("sd", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types must be 2 times UpDecoderBlock2D"),
        ("sd", {"down_block_types": ["DownBlock2D"] * 2}, "down_block_types must be 2 times DownEncoderBlock2D"),
        ("sd", {"latents_mean": [0, 0, 0, 0]}, "latents_mean and latents_std must both have 4 entries"),
        ("sd", {"latents_mean": [0], "latents_std": [1]}, "latents_mean and latents_std must both have 4 entries"),
        ("odd", {"shift_factor": 0.5}, "shift_factor = 0.5 are alternatives"),
        ("tiny", {"act_fn": "silu", "upsampling_scaling_factor": 4}, "act_fn = 'silu', upsampling_scaling_factor = 4"),
        ("tiny", {"encoder_block_out_channels": [8, 16, 8]}, "encoder_block_out_channels must be one width"),
        ("tiny", {"num_decoder_blocks": [1, 1]}, "decoder_block_out_channels must be one width, once per num_decoder"),
        ("tiny", {"num_decoder_blocks": [1], "decoder_block_out_channels": [8]}, "same number of entries"),
    ],
)
def test_unsupported_options_are_refused(name, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        type(build(name)).from_config(golden.CONFIGS[name] | change)


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_bad_inputs_are_refused(name):
    autoencoder, x, z = recorded(name)
    with pytest.raises(ValueError, match=r"height 7 and width \d+ must be divisible by [24]"):
        jax.eval_shape(Autoencoder.encode, autoencoder, x[:, :7])
    with pytest.raises(ValueError, match="in_channels = 3, but x has 2"):
        jax.eval_shape(Autoencoder.encode, autoencoder, x[..., :2])
    with pytest.raises(ValueError, match=r"latent_channels = [45], but z has 3"):
        jax.eval_shape(Autoencoder.decode, autoencoder, z[..., :3])

"""Text encoders: parity with PyTorch transformers, weight files of every release, errors for bad input."""

import functools
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_clip as golden

from cddistill.models import convert
from cddistill.models.clip import Apply, CLIPTextModel, CLIPTextModelWithProjection, end_of_text
from cddistill.models.init import weight_shapes
from cddistill.net import Net

RECORDED = np.load(Path(golden.__file__).parent / "clip.npz")
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
OPENCLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
    "hidden_act": "gelu",
}  # fmt: skip
OPENCLIP_BIGG = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip


def torch_names(shapes) -> dict:
    """{published name: our path} of every weight."""
    return {convert.torch_name(path): path for path in flax.traverse_util.flatten_dict(shapes)}


@functools.cache
def recorded_net(name: str) -> Net:
    """The encoder of a recorded configuration, with the weights that make_clip.py gave to transformers."""
    projects = "Projection" in golden.ENCODERS[name]["architectures"][0]
    module = (CLIPTextModelWithProjection if projects else CLIPTextModel).from_config(golden.ENCODERS[name])
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    theirs = {
        k: convert.to_torch(p, np.empty(shapes[p].shape)).shape for k, p in torch_names(weight_shapes(module)).items()
    }
    arrays = golden.weights(theirs)
    params = convert.match(arrays, shapes, convert.torch_name, convert.from_torch, "golden")
    return Net(convert.unflatten(params), Apply(module))


@functools.cache
def outputs_and_gradients(name: str, **ours):
    """(features, gradients of the recorded scalar) of a recorded encoder."""
    net, config = recorded_net(name), golden.ENCODERS[name]
    apply = Apply(net.apply.module.clone(**ours))

    def loss(params):
        features = apply(params, golden.token_ids(config))
        return sum((getattr(features, k) * x).sum() for k, x in golden.cotangents(config).items()), features

    grads, features = jax.jit(jax.grad(loss, has_aux=True))(net.params)
    return features, grads


@pytest.mark.parametrize("name", sorted(golden.ENCODERS))
def test_features_and_every_gradient_equal_transformers(name, parity):
    """The input gradient is that of the token embedding."""
    (features, grads), network = outputs_and_gradients(name), f"{golden.ENCODERS[name]['architectures'][0]}, {name}"
    for part, ours in features._asdict().items():
        assert ours.dtype == jnp.float32
        parity(network, "output", ours, RECORDED[f"{name}/{part}"])
    tokens = grads["text_model"]["embeddings"]["token_embedding"]["embedding"]
    parity(network, "input gradient", tokens, RECORDED[f"{name}/token_grad"])
    parity.weights(network, grads, RECORDED[f"{name}/grad_norm"])


def test_end_token_position_in_old_and_new_configs():
    """Old configs (end token 2): the largest id; new ones: the first end token."""
    ids = np.array([[7, 9, 2, 9], [2, 5, 8, 5]], np.int32)
    assert end_of_text(ids, 2).tolist() == [1, 2]
    assert end_of_text(ids, 5).tolist() == [0, 1]  # no end token: the first position, as in transformers
    assert end_of_text(ids, 9).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "cls", "config", "published"),
    [
        ("Text encoder of Stable Diffusion 1 (CLIP-L)", CLIPTextModel, CLIP_L, 123_060_480),
        ("Text encoder of Stable Diffusion 2 (OpenCLIP-H)", CLIPTextModel, OPENCLIP_H, 340_387_840),
        ("Second text encoder of SDXL (OpenCLIP-bigG)", CLIPTextModelWithProjection, OPENCLIP_BIGG, 694_659_840),
    ],
)
def test_weight_counts_of_the_published_models(name, cls, config, published, parity):
    shapes = weight_shapes(cls.from_config(config))
    parity.size(name, shapes, published)
    assert ("text_projection" in shapes) == (cls is CLIPTextModelWithProjection)


def test_weight_names_of_every_release_are_read():
    net = recorded_net("clip_l")
    weights = {name: name for name in torch_names(net.params)}
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in weights
    read = functools.partial(net.apply.module.published, where="test")
    assert read(weights) == weights
    assert read(weights | {"text_model.embeddings.position_ids": ""}) == weights  # early releases
    assert read({name.removeprefix("text_model."): x for name, x in weights.items()}) == weights
    former_flax = "text_model/encoder/layers/1/self_attn/q_proj/kernel"  # ours has layers_1
    assert convert.torch_name(tuple(former_flax.split("/"))) in weights
    projecting = torch_names(recorded_net("openclip_bigg").params)
    assert "text_projection.weight" in projecting
    assert recorded_net("openclip_bigg").apply.module.published(projecting, "test") == projecting


def test_remat_equals_plain_and_bfloat16_is_close():
    name = "clip_l"
    (features, grads), (again, regrads) = outputs_and_gradients(name), outputs_and_gradients(name, remat=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), (features, grads), (again, regrads))
    half, _ = outputs_and_gradients(name, dtype=jnp.bfloat16)
    for a, b in zip(half, features, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.1)  # bfloat16 has 8 bits
        assert jnp.abs(a - b).max() > 1e-4


def test_configs_are_read_and_written_as_by_transformers():
    assert CLIPTextModel.from_config({}) == CLIPTextModel()
    module = CLIPTextModelWithProjection.from_config(golden.G, dtype=jnp.bfloat16, remat=True)
    assert module.to_config().items() <= golden.G.items()
    assert CLIPTextModelWithProjection.from_config(module.to_config(), dtype=jnp.bfloat16, remat=True) == module
    old = golden.L | {
        "_name_or_path": "x",
        "is_decoder": False,
        "pruned_heads": {},
        "num_beams": 1,
        "torch_dtype": None,
    }
    nested = {"model_type": "clip", "projection_dim": 3, "text_config": old, "vision_config": {}}
    assert CLIPTextModel.from_config(nested) == CLIPTextModel.from_config(golden.L)
    assert hash(Apply(CLIPTextModel.from_config(nested))) == hash(recorded_net("clip_l").apply)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_act": "gelu_new", "new": None}, "CLIPTextModel does not support hidden_act = 'gelu_new', new = None"),
        ({"model_type": "t5"}, "model_type = 't5'"),
        ({"use_attention_mask": True}, "use_attention_mask = True"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id = \[1, 2\]"),
        ({"num_attention_heads": 5}, "hidden_size = 24 cannot be split into 5 attention heads"),
    ],
)
def test_unsupported_options_are_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        CLIPTextModel.from_config(golden.L | change)


@pytest.mark.parametrize("ids", [np.zeros((2, 13), np.int32), np.zeros((2, 12), np.float32), np.zeros(12, np.int32)])
def test_bad_token_ids_are_named(ids):
    net = recorded_net("clip_l")
    with pytest.raises(ValueError, match=r"must be integers \[b, l\] with 1 to 12 tokens, not (int|float)32 \("):
        jax.eval_shape(net.apply, net.params, ids)

"""PEFT's adapters: W + scale * B @ A with the scale of their options; options of anything else are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_lora import arrays, net_of, tree, written
from torch_file import write_torch

from cddistill.models import lora

PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "use_dora": False, "use_rslora": False,
    "fan_in_fan_out": True, "target_modules": ["to_q", "conv1"], "lora_dropout": 0.1, "modules_to_save": None,
    "init_lora_weights": "gaussian", "megatron_core": "megatron.core", "task_type": None, "inference_mode": True,
    "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None, "peft_version": "0.17.0",
}  # fmt: skip


def peft_layers(ranks):
    """{layer: (lora_A, lora_B)} in PyTorch's layout: of a linear layer [r, in], [out, r]."""
    rng, shapes = np.random.default_rng(1), {"block.to_q": ((4,), (6,)), "block.conv1": ((4, 3, 3), (6, 1, 1))}
    draw = lambda *shape: rng.normal(size=shape).astype("f")
    return {k: (draw(r, *shapes[k][0]), draw(shapes[k][1][0], r, *shapes[k][1][1:])) for k, r in ranks.items()}


def peft_folder(folder, options, ranks=None, name="adapter_model.safetensors", prefix="", adapter=""):
    """PEFT's folder for a tree's two layers; returns their factors."""
    layers = peft_layers(ranks or {"block.to_q": 2, "block.conv1": 2})
    keys = {
        f"base_model.model.{prefix}{k}.lora_{'AB'[i]}{adapter}.weight": layers[k][i] for k in layers for i in (0, 1)
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(options))
    write = safetensors.numpy.save_file if name.endswith(".safetensors") else lambda x, file: write_torch(file, x)
    write(keys, folder / name)
    return layers


def assert_updated(params, base, layers, scales):
    """Closed form: W + scale * B @ A, for a convolution at each of its taps."""
    for name, (a, b) in layers.items():
        layer = name.split(".")[1]
        update = np.einsum("or,ri...->oi...", b.reshape(b.shape[:2]), a) * scales[name]
        expected = base["block"][layer]["kernel"] + (update.T if a.ndim == 2 else update.transpose(2, 3, 1, 0))
        np.testing.assert_allclose(params["block"][layer]["kernel"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "ranks", "scales"),
    [
        ({}, (2, 2), (3.0, 3.0)),
        ({"use_rslora": True}, (2, 2), (6 / 2**0.5, 6 / 2**0.5)),
        ({"rank_pattern": {"conv1": 3}}, (2, 3), (3.0, 2.0)),
        ({"alpha_pattern": {"block.to_q": 1, "to_k": 9}}, (2, 2), (0.5, 3.0)),
        ({"rank_pattern": {r"block\.to_.": 1}, "alpha_pattern": {"^block.to_q": 5}}, (1, 2), (5.0, 3.0)),
        ({"rank_pattern": {"conv1": 4}, "use_rslora": True, "lora_alpha": 8}, (2, 4), (8 / 2**0.5, 4.0)),
    ],
)
def test_pefts_adapters_equal_their_closed_form(options, ranks, scales, tmp_path):
    names, base = ("block.to_q", "block.conv1"), tree()
    layers = peft_folder(tmp_path / "x", PEFT | options, dict(zip(names, ranks, strict=True)))
    for path in (tmp_path / "x", tmp_path / "x" / "adapter_model.safetensors"):
        merged = lora.merge(path, {"unet": net_of(base)})["unet"].params
        assert_updated(merged, base, layers, dict(zip(names, scales, strict=True)))


@pytest.mark.parametrize(
    ("folder", "written_as"),
    [
        (".", {"name": "adapter_model.bin"}),
        (".", {"adapter": ".default"}),
        (".", {"prefix": "_orig_mod."}),
        ("unet", {}),
    ],
)
def test_pefts_adapters_are_read_from_every_layout(folder, written_as, tmp_path):
    layers, base = peft_folder(tmp_path / folder, PEFT, **written_as), tree()
    merged = lora.read_lora(tmp_path, {"unet": base})["unet"](base)
    assert_updated(merged, base, layers, {"block.to_q": 3.0, "block.conv1": 3.0})


def test_pefts_adapters_of_text_encoders_belong_to_them(tmp_path):
    base = {"text_model": {"encoder": {"layers_0": {"to_q": {"kernel": jnp.ones((4, 6))}}}}}
    for folder, prefix in (("a/text_encoder_2", "text_model."), ("b", "text_model."), ("c", "")):
        (tmp_path / folder).mkdir(parents=True)
        name = f"base_model.model.{prefix}encoder.layers.0.to_q"
        keys = {f"{name}.lora_A.weight": np.ones((2, 4), "f"), f"{name}.lora_B.weight": np.ones((6, 2), "f")}
        safetensors.numpy.save_file(keys, tmp_path / folder / "adapter_model.safetensors")
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(PEFT))
    for folder, part in (("a", "text_encoder_2"), ("b", "text_encoder"), ("c", "text_encoder")):
        merged = lora.merge(tmp_path / folder, {part: net_of(base)})[part].params
        np.testing.assert_allclose(jax.tree.leaves(merged)[0], 7.0)  # 1 + 6 / 2 * 2


def test_options_in_the_header_of_a_unets_own_file_count(tmp_path):
    """As diffusers' save_lora_adapter writes them: neither keys nor options have a prefix."""
    bare = {key.removeprefix("unet."): x for key, x in arrays(down="lora_A.weight", up="lora_B.weight").items()}
    file = written(tmp_path, bare, {"lora_adapter_metadata": json.dumps(PEFT)})
    np.testing.assert_allclose(lora.read_lora(file, {"unet": tree()})["unet"].params["block"]["to_q"]["up"], 3.0)
    file = written(tmp_path, bare, {"lora_adapter_metadata": json.dumps(PEFT | {"use_dora": True})})
    with pytest.raises(ValueError, match="lora.safetensors: use_dora = True is DoRA: merge it"):
        lora.read_lora(file, {"unet": tree()})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"peft_type": "LOHA"}, "adapter_config.json: peft_type = 'LOHA' is no LoRA: merge it into its model"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is no LoRA"),
        ({"use_dora": True}, "adapter_config.json: use_dora = True is DoRA: merge it"),
        ({"modules_to_save": ["conv_in"]}, r"modules_to_save = \['conv_in'\] is more than a plain LoRA: merge it"),
        ({"bias": "lora_only"}, "bias = lora_only is more than a plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4 is more than a plain LoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = .* is more than a plain LoRA"),
        ({"some_new_option": 3}, "some_new_option = 3 is more than a plain LoRA"),
        ({"r": 4}, "has rank 2, but its options say 4"),
        ({"rank_pattern": {"to_q": 8}}, "block.to_q has rank 2, but its options say 8"),
    ],
)
def test_options_that_a_plain_lora_does_not_have_are_refused(options, sentence, tmp_path):
    peft_folder(tmp_path, PEFT | options)
    with pytest.raises(ValueError, match=sentence):
        lora.read_lora(tmp_path, {"unet": tree()})


def test_pefts_adapters_need_their_options(tmp_path):
    peft_folder(tmp_path, {"peft_type": "LORA", "r": 2})
    with pytest.raises(ValueError, match=r"adapter_config\.json lacks lora_alpha, the scale of a LoRA"):
        lora.read_lora(tmp_path, {"unet": tree()})
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(
        ValueError, match=r"adapter_config\.json is missing: renamed\.safetensors needs it for its scale"
    ):
        lora.read_lora(tmp_path, {"unet": tree()})

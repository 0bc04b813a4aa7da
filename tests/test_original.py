"""A branch under the names of the original ControlNet code."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from cddistill import models
from cddistill.models import original
from cddistill.models.convert import TORCH_FILE
from cddistill.pipeline import Pipeline

UNET = {  # the blocks of Stable Diffusion 1.5, narrow
    "in_channels": 4, "out_channels": 4, "block_out_channels": [4, 8, 16, 16], "layers_per_block": 2,
    "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
TENSORS = 340  # of the files of ControlNet for Stable Diffusion 1.5


@pytest.fixture(scope="module")
def teacher():
    return models.init(UNET, 0, zero_out=False)


@pytest.fixture(scope="module")
def branch(teacher):
    return tiny.disturbed(models.make_branch(teacher, jax.random.key(1), embedding_channels=original.WIDTHS))


def test_names_and_values_are_those_of_the_original(branch, tmp_path):
    held = safetensors.numpy.load_file(original.save(tmp_path, branch, np.float32))
    assert len(held) == TENSORS == len(jax.tree.leaves(branch.params))
    assert all(name.startswith("control_model.") for name in held)
    held = {name.removeprefix("control_model."): x for name, x in held.items()}
    embedding = branch.params["controlnet_cond_embedding"]
    for name, ours in {
        "time_embed.2.bias": branch.params["time_embedding"]["linear_2"]["bias"],
        "input_hint_block.0.bias": embedding["conv_in"]["bias"],
        "input_hint_block.2.bias": embedding["blocks_0"]["bias"],
        "input_hint_block.12.bias": embedding["blocks_5"]["bias"],
        "input_hint_block.14.bias": embedding["conv_out"]["bias"],
        "input_blocks.0.0.bias": branch.params["conv_in"]["bias"],
        "zero_convs.11.0.bias": branch.params["controlnet_down_blocks_11"]["bias"],
        "middle_block_out.0.bias": branch.params["controlnet_mid_block"]["bias"],
        "middle_block.2.in_layers.2.bias": branch.params["mid_block"]["resnets_1"]["conv1"]["bias"],
        "input_blocks.3.0.op.bias": branch.params["down_blocks_0"]["downsamplers_0"]["conv"]["bias"],
        "input_blocks.4.0.skip_connection.bias": branch.params["down_blocks_1"]["resnets_0"]["conv_shortcut"]["bias"],
        "input_blocks.11.0.out_layers.3.bias": branch.params["down_blocks_3"]["resnets_1"]["conv2"]["bias"],
    }.items():
        np.testing.assert_array_equal(held[name], ours, err_msg=name)
    assert held["input_hint_block.0.weight"].shape == (16, 3, 3, 3)
    assert held["input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight"].shape == (16, 8)


@pytest.mark.parametrize("options", [{"kind": "mu_blend"}, {"cond_channels": 4}, {"embedding_channels": (16, 32)}])
def test_branches_that_the_original_lacks_do_not_fit(teacher, branch, options):
    make = functools.partial(models.make_branch, **{"embedding_channels": original.WIDTHS} | options)
    assert original.fits(branch)
    assert not original.fits(jax.eval_shape(make, teacher, jax.random.key(1)))
    assert not original.fits(teacher)


@pytest.mark.parametrize("text", [True, False])
def test_an_export_has_the_file_if_its_teacher_has_prompts(teacher, branch, text, tmp_path):
    folder = tmp_path / "teacher"
    models.save(folder, "unet", teacher.params, teacher.module.to_config())
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    if text:
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "config.json").write_text("{}")
        index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    Pipeline(str(folder)).write(tmp_path / "student", teacher, {"controlnet": branch}, None)
    assert (tmp_path / "student" / "controlnet" / TORCH_FILE).is_file()
    assert (tmp_path / "student" / original.FILE).is_file() == text


@pytest.mark.slow
def test_diffusers_converts_it_to_the_same_network(branch, tmp_path):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("safetensors.torch")
    config = branch.module.to_config()
    models.save(tmp_path, "controlnet", branch.params, config)
    ours = torch.load_file(tmp_path / "controlnet" / TORCH_FILE)
    theirs = utils.convert_controlnet_checkpoint(torch.load_file(original.save(tmp_path, branch)), config)
    assert {name for name, x in theirs.items() if x is not None} == {*ours}
    assert all(theirs[name].equal(x) for name, x in ours.items())

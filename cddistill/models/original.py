"""A trained branch in one file, under the names of the original ControlNet code: the layout of ComfyUI and A1111."""

import re
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np

from cddistill.models.adapter import ControlNetModel
from cddistill.models.convert import to_torch, torch_name
from cddistill.models.ldm import unet_names
from cddistill.models.lora import save_tensors
from cddistill.net import Net

FILE = "controlnet_original.safetensors"
PREFIX = "control_model."
WIDTHS = (16, 32, 96, 256)  # of E(c) there: the condition is an image, 8 times as large as the latents


def fits(net: Net) -> bool:
    """Whether the original layout has this branch: zero convolutions, and E(c) of an image of three channels."""
    module = net.module
    if not isinstance(module, ControlNetModel):
        return False
    return (module.conditioning_embedding_out_channels, module.conditioning_channels) == (WIDTHS, 3)


def controlnet_names(names) -> dict[str, str]:
    """{layer of diffusers' ControlNet: layer of the original}."""
    own = {name for name in names if name.startswith("controlnet_")}
    renamed = unet_names([name for name in names if name not in own])
    for name in own:
        kind, _, layer = name.removeprefix("controlnet_").partition(".")
        if kind == "down_blocks":
            renamed[name] = f"zero_convs.{layer}.0"
        elif kind == "mid_block":
            renamed[name] = "middle_block_out.0"
        else:  # E(c): convolutions with an activation between each two
            number = {"conv_in": 0, "conv_out": 2 * len(WIDTHS) - 1}
            i = number[layer] if layer in number else 1 + int(layer.removeprefix("blocks."))
            renamed[name] = f"input_hint_block.{2 * i}"
    return renamed


def save(folder: Path, net: Net, dtype=np.float16) -> Path:
    """Write a branch that `fits` to folder/FILE; returns the file."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(net.params))
    tensors = {torch_name(path): to_torch(path, np.asarray(x)) for path, x in flat.items()}
    names = controlnet_names({re.sub(r"\.\w+$", "", name) for name in tensors})
    renamed = {}
    for name, x in tensors.items():
        layer, _, leaf = name.rpartition(".")
        renamed[f"{PREFIX}{names[layer]}.{leaf}"] = np.array(x, dtype, order="C")
    return save_tensors(folder / FILE, renamed)

"""What both sides of a comparison are given: networks by their published shapes, noise for data, and what a side is."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CROSS = "CrossAttn"
UNETS = {  # in diffusers' names; attention_head_dim is the number of heads
    "sd15": {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {
        "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024, "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", f"{CROSS}DownBlock2D", f"{CROSS}DownBlock2D"],
        "up_block_types": [f"{CROSS}UpBlock2D", f"{CROSS}UpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
VAE = {  # Stable Diffusion's
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TOKENS = 77
GUIDANCE, RATIO, GAN, CRITIC_GAN = 1.75, 5, 1e-3, 1e-2  # Stable Diffusion's recipe of DMD2, but for the ratio
LR, DECAY = 1e-5, 0.999


class Setup(NamedTuple):
    """What a side is given; the last three are for PyTorch, since JAX takes the device that it finds."""

    config: dict  # of the UNet
    size: int  # height and width of the latents
    batch: int
    dtype: str  # that the networks compute in
    device: str = "cpu"
    channels_last: bool = False
    compile: bool = False


class Work(NamedTuple):
    """A side of a comparison."""

    run: Callable  # starts one unit of the work
    wait: Callable  # returns when all that was started has finished


def unet(name: str, width: int = 320, **changes) -> dict:
    """The config of a UNet of UNETS with `width` channels in its first block instead of 320."""
    config = UNETS[name]
    channels = [c * width // 320 for c in config["block_out_channels"]]
    heads = config["attention_head_dim"]
    heads = [max(c // 64, 1) for c in channels] if isinstance(heads, list) else heads
    return config | {"block_out_channels": channels, "attention_head_dim": heads} | changes


def tiny_unet(name: str) -> dict:
    """The same with one level, few channels and as few layers as there can be, which compiles in seconds."""
    small = {
        "block_out_channels": [16], "attention_head_dim": 2, "cross_attention_dim": 16, "norm_num_groups": 4,
        "layers_per_block": 0, "transformer_layers_per_block": 1, "down_block_types": [f"{CROSS}DownBlock2D"],
        "up_block_types": [f"{CROSS}UpBlock2D"],
    }  # fmt: skip
    if "addition_embed_type" in UNETS[name]:
        small |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8}
    return UNETS[name] | small


def arrays(setup: Setup, cond: bool = False, seed: int = 0) -> dict:
    """A batch of latents and two texts, all noise, channels last; with `cond` also a condition image in [0, 1]."""
    rng, b, width = np.random.default_rng(seed), setup.batch, setup.config["cross_attention_dim"]
    text = lambda: rng.standard_normal((b, TOKENS, width), "f")
    found = {"x0": rng.standard_normal((b, setup.size, setup.size, 4), "f"), "text": text(), "null": text()}
    return found | ({"cond": rng.random((b, 8 * setup.size, 8 * setup.size, 3), "f")} if cond else {})

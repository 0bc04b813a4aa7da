"""Reference outputs of PyTorch diffusers for tiny random networks: python tests/golden/make_models.py

Recorded with torch 2.13.0 (CPU), diffusers 0.42.1. Weights and inputs come from a numpy seed, here and in the tests, so
models.npz holds only outputs and gradient norms. Neither torch nor diffusers is needed to run the tests.
"""

import zlib
from pathlib import Path

import numpy as np

SD = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
}
XL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}
PIXEL = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [16, 16, 32],
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "num_class_embeds": 10,
}
ODD = {  # options that no model above uses
    "attention_head_dim": [4, 8, 16],  # not reversed on the way up in diffusers
    "resnet_time_scale_shift": "scale_shift",
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "center_input_sample": True,
    "norm_eps": 1e-3,
    "conv_in_kernel": 1,
    "conv_out_kernel": 5,
    "num_class_embeds": None,
    "class_embed_type": "timestep",
    "time_embedding_dim": 24,
}
ONE = SD | {  # a single block, for what differs outside of blocks only
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
SSD = (
    SD
    | XL
    | {  # the layout of SSD-1B: numbers of transformer blocks per layer, which differ on the way up
        "block_out_channels": [16, 16, 32],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 2, 4],
        "transformer_layers_per_block": [1, [1, 2], [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1], 1],
    }
)
UNETS = {
    "sd15": SD,
    "sd21_unclip": SD | {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True,
                         "layers_per_block": [2, 1], "class_embed_type": "projection",
                         "projection_class_embeddings_input_dim": 6},
    "sdxl": SD | XL,
    "upscaler": SD | {"in_channels": 7, "only_cross_attention": [True, False], "num_class_embeds": 9,
                      "time_cond_proj_dim": 5, "norm_eps": 1e-3},
    "instruct_pix2pix": ONE | {"in_channels": 8},
    "inpainting": ONE | {"in_channels": 9},
    "lcm": ONE | {"time_cond_proj_dim": 5},
    "ssd1b": SSD,
    "layers": ONE | {"transformer_layers_per_block": [[2]], "reverse_transformer_layers_per_block": [[1, 2]]},
    "no_mid": ONE | {"mid_block_type": None},
    "pixel": PIXEL,
    "odd": PIXEL | ODD,
}  # fmt: skip
UNET_KEYS = {"sample_size", "out_channels", "up_block_types"}
CONTROLNETS = {
    "sd15": {"conditioning_embedding_out_channels": [4, 8, 16]},
    "pixel": {"conditioning_embedding_out_channels": [4], "conditioning_channels": 1},
}


def controlnet_config(name):
    """The config of the ControlNet for a UNet config."""
    return {k: v for k, v in UNETS[name].items() if k not in UNET_KEYS} | CONTROLNETS[name]


def weights(shapes: dict) -> dict:
    """Random weights for {PyTorch name: shape}, as large as trained ones, including zero-initialised layers."""
    out = {}
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        x = x / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * x + name.endswith("weight")
        out[name] = x.astype(np.float32)
    return out


def inputs(config: dict, cond_size: int = 1, seed: int = 0) -> dict:
    """A batch of two: z_t and cond in NCHW, and the other inputs of the config, by diffusers' names."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    size = config.get("sample_size", 8)
    x = {"sample": normal(2, config.get("in_channels", 4), size, size), "timestep": np.array([17, 940])}
    x["encoder_hidden_states"] = normal(2, 5, config.get("cross_attention_dim", 1280))
    if config.get("num_class_embeds"):
        x["class_labels"] = np.array([3, 7])
    if kind := config.get("class_embed_type"):
        x["class_labels"] = np.array([5, 250]) if kind == "timestep" else normal(2, 6)
    if config.get("addition_embed_type"):
        ids = np.array([[512, 512, 0, 0, 512, 512], [768, 512, 0, 64, 1024, 1024]], np.float32)
        x["added_cond_kwargs"] = {"text_embeds": normal(2, 10), "time_ids": ids}
    if config.get("time_cond_proj_dim"):
        x["timestep_cond"] = normal(2, 5)
    if "conditioning_embedding_out_channels" in config:
        factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        shape = (2, config.get("conditioning_channels", 3), size * factor, size * factor)
        x["controlnet_cond"] = rng.uniform(size=shape).astype(np.float32)
    return x


def main():
    """Run diffusers and write models.npz next to this file."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    def network(cls, config):
        net = cls(**config)
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights(shapes).items()})
        return net

    def tensors(tree):
        return {k: tensors(v) if isinstance(v, dict) else torch.from_numpy(v) for k, v in tree.items()}

    def norms(net):
        grads = {k: p.grad.norm() for k, p in net.named_parameters()}
        return torch.stack([grads[k] for k in sorted(grads)])

    def record(name, config):
        net, x = network(UNet2DConditionModel, config), tensors(inputs(config))
        y = net(**(x | {"sample": x["sample"].requires_grad_()})).sample
        (y**2).mean().backward()
        yield from {"out": y, "grad": x["sample"].grad, "grad_norm": norms(net)}.items()
        if name in CONTROLNETS:
            config = controlnet_config(name) | {"sample_size": config["sample_size"]}
            branch, xc = network(ControlNetModel, controlnet_config(name)), tensors(inputs(config, seed=1))
            xc["controlnet_cond"].requires_grad_()
            x["sample"] = x["sample"].detach()  # whose gradient is already taken
            down, mid = branch(**xc, conditioning_scale=0.7, return_dict=False)
            y = net(**x, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
            (y**2).mean().backward()
            yield from {"mid": mid, "controlled": y, "controlled_grad": xc["controlnet_cond"].grad}.items()
            yield "controlled_grad_norm", norms(branch)

    out = {f"{n}/{k}": v.detach().numpy() for n, config in UNETS.items() for k, v in record(n, config)}
    np.savez_compressed(Path(__file__).parent / "models.npz", **out)
    print({k: (v.shape, float(np.abs(v).mean())) for k, v in out.items()})


if __name__ == "__main__":
    main()

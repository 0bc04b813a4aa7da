"""Reference outputs of single modules of PyTorch diffusers and transformers: python -m golden.make_modules, in tests/

Recorded with torch 2.13.0 (CPU), diffusers 0.42.1, transformers 5.23.0. Weights and inputs come from a numpy seed, here
and in the tests, so modules.npz holds only outputs and gradients. None of the three is needed to run the tests.
"""

import importlib
import zlib
from pathlib import Path

import numpy as np
from golden.make_models import weights

X, EMB, TEXT, TOKENS = (2, 8, 4, 6), (2, 6), (2, 5, 10), (2, 7, 8)  # images in NCHW
RESNET = {"in_channels": 8, "out_channels": 8, "temb_channels": 6, "groups": 2}
ATTENTION = {"query_dim": 8, "heads": 2, "dim_head": 4}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 8, "norm_num_groups": 4}
BLOCK = {"in_channels": 8, "out_channels": 12, "temb_channels": 6, "resnet_groups": 4, "resnet_eps": 1e-5}
CROSS = {"num_attention_heads": 2, "cross_attention_dim": 10}
CLIP = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 9,
        "max_position_embeddings": 7, "hidden_act": "quick_gelu"}  # fmt: skip
MODULES = {  # name: (class, its options, shapes of its inputs)
    "GroupNorm": ("torch.nn.GroupNorm", {"num_groups": 4, "num_channels": 8, "eps": 1e-5}, (X,)),
    "TimestepEmbedding": ("diffusers.models.embeddings.TimestepEmbedding",
                          {"in_channels": 8, "time_embed_dim": 6, "cond_proj_dim": 5}, ((2, 8), (2, 5))),
    "ResnetBlock2D": ("diffusers.models.resnet.ResnetBlock2D", RESNET | {"out_channels": 12}, (X, EMB)),
    "ResnetBlock2D, scale_shift": ("diffusers.models.resnet.ResnetBlock2D",
                                   RESNET | {"time_embedding_norm": "scale_shift"}, (X, EMB)),
    "ResnetBlock2D, no time": ("diffusers.models.resnet.ResnetBlock2D", RESNET | {"temb_channels": None}, (X,)),
    "Downsample2D": ("diffusers.models.downsampling.Downsample2D",
                     {"channels": 8, "use_conv": True, "name": "op"}, (X,)),
    "Downsample2D, padding 0": ("diffusers.models.downsampling.Downsample2D",
                                {"channels": 8, "use_conv": True, "padding": 0, "name": "op"}, (X,)),
    "Upsample2D": ("diffusers.models.upsampling.Upsample2D", {"channels": 8, "use_conv": True}, (X,)),
    "Attention": ("diffusers.models.attention_processor.Attention", ATTENTION | {"cross_attention_dim": 10},
                  (TOKENS, TEXT)),
    "SpatialAttention": ("diffusers.models.attention_processor.Attention",
                         ATTENTION | {"norm_num_groups": 4, "bias": True, "residual_connection": True,
                                      "_from_deprecated_attn_block": True}, (X,)),
    "FeedForward": ("diffusers.models.attention.FeedForward", {"dim": 8}, (TOKENS,)),
    "BasicTransformerBlock": ("diffusers.models.attention.BasicTransformerBlock",
                              {"dim": 8, "num_attention_heads": 2, "attention_head_dim": 4, "cross_attention_dim": 10},
                              (TOKENS, TEXT)),
    "Transformer2DModel": ("diffusers.Transformer2DModel", TRANSFORMER | {"cross_attention_dim": 10}, (X, TEXT)),
    "Transformer2DModel, linear": ("diffusers.Transformer2DModel",
                                   TRANSFORMER | {"cross_attention_dim": 10, "use_linear_projection": True,
                                                  "num_layers": 2}, (X, TEXT)),
    "CrossAttnDownBlock2D": ("diffusers.models.unets.unet_2d_blocks.CrossAttnDownBlock2D", BLOCK | CROSS,
                             (X, EMB, TEXT)),
    "CrossAttnUpBlock2D": ("diffusers.models.unets.unet_2d_blocks.CrossAttnUpBlock2D",
                           BLOCK | CROSS | {"prev_output_channel": 8}, (X, (X,), EMB, TEXT)),
    "UNetMidBlock2DCrossAttn": ("diffusers.models.unets.unet_2d_blocks.UNetMidBlock2DCrossAttn",
                                {"in_channels": 8, "temb_channels": 6, "resnet_groups": 4, "resnet_eps": 1e-5} | CROSS,
                                (X, EMB, TEXT)),
    "ControlNetConditioningEmbedding": ("diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding",
                                        {"conditioning_embedding_channels": 8, "block_out_channels": (4, 6)},
                                        ((2, 3, 8, 8),)),
    "AutoencoderTinyBlock": ("diffusers.models.autoencoders.vae.AutoencoderTinyBlock",
                             {"in_channels": 8, "out_channels": 8, "act_fn": "relu"}, (X,)),
    "CLIPMLP": ("transformers.models.clip.modeling_clip.CLIPMLP", CLIP, (TOKENS,)),
    "CLIPMLP, gelu": ("transformers.models.clip.modeling_clip.CLIPMLP", CLIP | {"hidden_act": "gelu"}, (TOKENS,)),
    "CLIPAttention": ("transformers.models.clip.modeling_clip.CLIPAttention", CLIP, (TOKENS,)),
    "CLIPEncoderLayer": ("transformers.models.clip.modeling_clip.CLIPEncoderLayer", CLIP, (TOKENS,)),
    # the residual block of EDM's networks, as far as diffusers can express it
    "UNetBlock, ADM": ("diffusers.models.resnet.ResnetBlock2D",
                       RESNET | {"time_embedding_norm": "scale_shift", "eps": 1e-5}, (X, EMB)),
    "UNetBlock, ADM down": ("diffusers.models.resnet.ResnetBlock2D",
                            RESNET | {"time_embedding_norm": "scale_shift", "eps": 1e-5, "down": True}, (X, EMB)),
    "UNetBlock, DDPM++": ("diffusers.models.resnet.ResnetBlock2D",
                          RESNET | {"output_scale_factor": 2**0.5, "out_channels": 12, "groups_out": 3}, (X, EMB)),
    "UNetBlock, NCSN++ up": ("diffusers.models.resnet.ResnetBlock2D",
                             RESNET | {"output_scale_factor": 2**0.5, "up": True, "kernel": "fir",
                                       "use_in_shortcut": True}, (X, EMB)),
    "UNetBlock, NCSN++ down": ("diffusers.models.resnet.ResnetBlock2D",
                               RESNET | {"output_scale_factor": 2**0.5, "down": True, "kernel": "fir",
                                         "use_in_shortcut": True}, (X, EMB)),
}  # fmt: skip
UNET_BLOCK = {  # diffusers' names of the layers of UNetBlock
    "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
    "skip": "conv_shortcut",
}  # fmt: skip


def normal(name: str, shape):
    """Unit Gaussian numbers seeded by a name; a tuple of arrays for a tuple of shapes."""
    if isinstance(shape[0], tuple):
        return tuple(normal(f"{name}{i}", s) for i, s in enumerate(shape))
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def inputs(name: str) -> tuple:
    """The inputs of a module, images in NCHW."""
    return normal(f"{name} in", MODULES[name][2])


def cotangents(name: str, shapes) -> tuple:
    """Random weights of the outputs (NCHW) in the scalar sum whose gradient is recorded."""
    return normal(f"{name} out", tuple(map(tuple, shapes)))


def build(name: str):
    """The module with the weights of make_models.py."""
    import torch
    from transformers import CLIPTextConfig

    path, options, _ = MODULES[name]
    module, cls = path.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), cls)
    net = cls(CLIPTextConfig(**options, attn_implementation="eager")) if "CLIP" in name else cls(**options)
    shapes = {k: tuple(v.shape) for k, v in net.named_parameters()}
    with torch.no_grad():
        for k, x in weights(shapes).items():
            net.get_parameter(k).copy_(torch.from_numpy(x))
    return net.eval()


def leaves(tree) -> list:
    """The tensors of nested tuples and lists, in order."""
    return [x for part in tree for x in leaves(part)] if isinstance(tree, tuple | list) else [tree]


def call(net, name, x):
    """The outputs of a module, as a list."""
    import torch

    if name in ("CLIPAttention", "CLIPEncoderLayer"):
        n = x[0].shape[1]
        out = net(*x, attention_mask=torch.full((n, n), -torch.inf).triu(1)[None, None])
        return leaves(out)[:1]
    if MODULES[name][2][-1] == TEXT:
        out = net(*x[:-1], encoder_hidden_states=x[-1])
        return leaves(getattr(out, "sample", out))
    return leaves(net(*x, None) if name == "ResnetBlock2D, no time" else net(*x))


def main():
    """Run every module and write modules.npz next to this file."""
    import torch

    tensors = lambda x: tuple(map(tensors, x)) if isinstance(x, tuple) else torch.from_numpy(x).requires_grad_()
    out = {}
    for name in MODULES:
        net, x = build(name), tensors(inputs(name))
        y = call(net, name, x)
        of = cotangents(name, [part.shape for part in y])
        sum((torch.from_numpy(a) * part).sum() for a, part in zip(of, y, strict=True)).backward()
        recorded = {f"out{i}": part for i, part in enumerate(y)}
        recorded |= {f"grad{i}": part.grad for i, part in enumerate(leaves(x))}
        norms = dict(net.named_parameters())
        recorded["grad_norm"] = torch.stack([norms[k].grad.norm() for k in sorted(norms)])
        out |= {f"{name}/{k}": v.detach().numpy() for k, v in recorded.items()}
    np.savez_compressed(Path(__file__).parent / "modules.npz", **out)
    print({k: (v.shape, float(np.abs(v).mean())) for k, v in out.items()})


if __name__ == "__main__":
    main()

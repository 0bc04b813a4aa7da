"""Single modules: equal to PyTorch's, output and gradients, so that a difference in a whole network can be located."""

from functools import partial
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
from golden import make_modules as golden
from golden.make_models import weights

from cddistill.models import adapter, attention, blocks, clip, convert, edm, edm_blocks, tiny_vae, unet

RECORDED = np.load(Path(golden.__file__).parent / "modules.npz")


class Silu(nn.Module):
    """An EDM block after SiLU of the embedding, which diffusers' block includes."""

    block: nn.Module

    def __call__(self, x, emb):
        return self.block(x, nn.silu(emb))


class Doubled(nn.Module):
    """An up block without the feature before its upsampler, which diffusers does not return."""

    block: nn.Module

    def __call__(self, *x):
        return self.block(*x)[0]


def edm_block(cls, width=8, resample="", **config):
    return edm_blocks.UNetBlock(cls.from_config(config).style(), width, resample=resample, parent=None)


resnet = partial(blocks.ResnetBlock2D, groups=4, eps=1e-5)
cross = lambda layer, name: attention.Transformer2DModel(2, 1, 4, name=name)
clip_attention, clip_mlp = partial(clip.CLIPAttention, 2), partial(clip.CLIPMLP, 12)
FIR = [1, 3, 3, 1]
OURS = {
    "GroupNorm": blocks.GroupNorm(4, 1e-5),
    "TimestepEmbedding": blocks.TimestepEmbedding(6, cond_proj_dim=5),
    "ResnetBlock2D": blocks.ResnetBlock2D(12, 2, 1e-6),
    "ResnetBlock2D, scale_shift": blocks.ResnetBlock2D(8, 2, 1e-6, scale_shift=True),
    "ResnetBlock2D, no time": blocks.ResnetBlock2D(8, 2, 1e-6),
    "Downsample2D": blocks.Downsample2D(8),
    "Downsample2D, padding 0": blocks.Downsample2D(8, padding=0),
    "Upsample2D": blocks.Upsample2D(8),
    "Attention": attention.Attention(2),
    "SpatialAttention": attention.SpatialAttention(4, 4, 1e-5),
    "FeedForward": attention.FeedForward(),
    "BasicTransformerBlock": attention.BasicTransformerBlock(2),
    "Transformer2DModel": attention.Transformer2DModel(2, 1, 4),
    "Transformer2DModel, linear": attention.Transformer2DModel(2, 2, 4, linear=True),
    "CrossAttnDownBlock2D": unet.DownBlock2D(1, partial(resnet, 12), cross, partial(blocks.Downsample2D, 12)),
    "CrossAttnUpBlock2D": Doubled(unet.UpBlock2D(partial(resnet, 12), cross, partial(blocks.Upsample2D, 12))),
    "UNetMidBlock2DCrossAttn": unet.MidBlock2D(partial(resnet, 8), cross),
    "ControlNetConditioningEmbedding": adapter.ControlNetConditioningEmbedding((4, 6), 8),
    "AutoencoderTinyBlock": tiny_vae.AutoencoderTinyBlock(np.float32),
    "CLIPMLP": clip_mlp("quick_gelu"),
    "CLIPMLP, gelu": clip_mlp("gelu"),
    "CLIPAttention": clip_attention(),
    "CLIPEncoderLayer": clip.CLIPEncoderLayer(
        clip_attention, partial(clip_mlp, hidden_act="quick_gelu"), partial(nn.LayerNorm, 1e-5, use_fast_variance=False)
    ),
    "UNetBlock, ADM": edm_block(edm.DhariwalUNet),
    "UNetBlock, ADM down": edm_block(edm.DhariwalUNet, resample="down"),
    "UNetBlock, DDPM++": edm_block(edm.SongUNet, width=12),
    "UNetBlock, NCSN++ up": edm_block(edm.SongUNet, resample="up", resample_filter=FIR),
    "UNetBlock, NCSN++ down": edm_block(edm.SongUNet, resample="down", resample_filter=FIR),
}


def nhwc(tree):
    return jax.tree.map(lambda x: np.moveaxis(x, 1, -1) if x.ndim == 4 else x, tree)


def name_of(name, path):
    """PyTorch's name of the weight at our path."""
    path = [golden.UNET_BLOCK[p] if "UNetBlock" in name and p in golden.UNET_BLOCK else p for p in path if p != "block"]
    return convert.torch_name(path)


@pytest.mark.parametrize("name", golden.MODULES)
def test_module_and_every_gradient_equal_pytorch(name, parity):
    module = Silu(OURS[name]) if "UNetBlock" in name else OURS[name]
    x, names = nhwc(golden.inputs(name)), partial(name_of, name)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *x))["params"]
    shapes = flax.traverse_util.flatten_dict(shapes)
    arrays = weights({names(p): convert.to_torch(p, np.empty(s.shape)).shape for p, s in shapes.items()})
    params = convert.unflatten(convert.match(arrays, shapes, names, convert.from_torch, "golden"))
    recorded = {k.split("/")[1]: v for k, v in RECORDED.items() if k.split("/")[0] == name}
    theirs = [recorded[k] for k in recorded if k.startswith("out")]
    of = nhwc(golden.cotangents(name, [y.shape for y in theirs]))

    def loss(params, x):
        out = jax.tree.leaves(module.apply({"params": params}, *x))
        return sum((a * b).sum() for a, b in zip(of, out, strict=True)), out

    (moved, inputs), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    for ours, y in zip(out, nhwc(theirs), strict=True):
        parity(name, "output", ours, y)
    for i, ours in enumerate(jax.tree.leaves(inputs)):
        parity(name, "input gradient", ours, nhwc(recorded[f"grad{i}"]))
    parity.weights(name, moved, recorded["grad_norm"], names)

"""diffusers' UNet2DConditionModel in Flax: Stable Diffusion 1.x, 2.x, XL, their editing variants, small pixel models.

Parameter paths are diffusers' names with ".3" written "_3", so `convert` is a rule and not a table. Fields are the keys
of diffusers' config.json. Weights are float32, `dtype` is the layers' compute type, norms and softmax are float32.
"""

import dataclasses
from functools import partial
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.models.attention import SpatialAttention, Transformer2DModel
from cddistill.models.blocks import (
    DecoderLevel,
    DownBlock2D,
    Downsample2D,
    GroupNorm,
    MidBlock2D,
    ResnetBlock2D,
    TimestepEmbedding,
    UpBlock2D,
    Upsample2D,
    conv,
    sinusoid,
)
from cddistill.models.configured import Blocks, Configured, Entries, Epsilon, Kernel, Sizes, Widths, rematerialised
from cddistill.models.unet_options import (
    DECODER_LISTS,
    DOWN_BLOCKS,
    MID_BLOCKS,
    NO_EFFECT,
    SUPPORTED,
    UP_BLOCKS,
    check_depths,
    check_sizes,
)
from cddistill.typed import Width, within


class Residuals(NamedTuple):
    """Output of a conditioning branch: every skip and the mid feature h of the UNet become keep * h + r."""

    down: tuple[jax.Array, ...]
    mid: jax.Array
    keep: jax.Array | float = 1.0


@dataclasses.dataclass(frozen=True)
class Apply:
    """A module as a pure function. Equal when the modules are, so equal nets have one pytree structure."""

    module: nn.Module

    def __call__(self, params, z_t, t, text=None, *args, **kwargs):
        return self.module.apply({"params": params}, z_t, t, *args, **conditioning(text), **kwargs)


def conditioning(text) -> dict:
    """`text` as keyword arguments of a UNet: a dict is copied, an array becomes encoder_hidden_states."""
    if text is None or isinstance(text, dict):
        return dict(text or {})
    return {"encoder_hidden_states": text}


class Encoder(Configured):
    """Base of a UNet and its ControlNet: options, embeddings, down blocks and mid block."""

    supported = SUPPORTED
    no_effect = NO_EFFECT

    in_channels: Width = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, within(least=0, most=1)] = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: Widths = (320, 640, 1280, 1280)
    layers_per_block: Blocks | tuple[Blocks, ...] = 2
    downsample_padding: int = 1
    act_fn: str = "silu"
    norm_num_groups: Width = 32
    norm_eps: Epsilon = 1e-5  # of resnets and output; transformer blocks have 1e-6
    cross_attention_dim: Width | tuple[Width, ...] = 1280
    transformer_layers_per_block: Blocks | tuple[Blocks | tuple[Blocks, ...], ...] = (
        1  # per block, or per layer of each block
    )
    attention_head_dim: Width | tuple[Width, ...] = (
        8  # the NUMBER of heads; in Attn*Block2D their width (so in diffusers)
    )
    num_attention_heads: Width | tuple[Width, ...] | None = None
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: Entries | None = None
    projection_class_embeddings_input_dim: Width | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: Width | None = None
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: Width | None = None
    time_cond_proj_dim: Width | None = None
    conv_in_kernel: Kernel = 3

    def check(self):
        """Raise ValueError for per-block and per-layer options of the wrong length and for unknown blocks."""
        n, up_block_types = len(self.block_out_channels), getattr(self, "up_block_types", ())
        for name, value in self.options().items():
            per_block = name in Encoder.__dataclass_fields__ or name in DECODER_LISTS
            if per_block and isinstance(value, tuple) and len(value) != n:
                raise ValueError(f"{name} has {len(value)} entries but block_out_channels has {n}")
        if unknown := sorted({*self.down_block_types} - {*DOWN_BLOCKS} | {*up_block_types} - {*UP_BLOCKS}):
            known = ", ".join([*DOWN_BLOCKS, *UP_BLOCKS])
            raise ValueError(f"block types {', '.join(unknown)} are not supported, only {known} are")
        check_depths("transformer_layers_per_block", self.depths(), self.per_block(self.layers_per_block))
        check_sizes(self)

    def depths(self) -> tuple:
        """Transformer blocks of the attention layers, per block of the encoder: a number, or one per layer."""
        return self.per_block(self.transformer_layers_per_block)

    def example(self):
        """Smallest inputs that use every weight, as (args, kwargs)."""
        size = 2 ** (len(self.block_out_channels) - 1)
        args = jnp.zeros((1, size, size, self.in_channels)), jnp.zeros((1,), jnp.int32)
        kwargs = {"encoder_hidden_states": jnp.zeros((1, 1, self.per_block(self.cross_attention_dim)[-1]))}
        if self.class_embed_type or self.num_class_embeds:
            vector = jnp.zeros((1, self.projection_class_embeddings_input_dim or 1))
            per_type = {None: jnp.zeros((1,), jnp.int32), "timestep": jnp.zeros((1,))}
            kwargs["class_labels"] = per_type.get(self.class_embed_type, vector)
        if self.addition_embed_type == "text_time":
            pooled = self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim
            kwargs["added_cond_kwargs"] = {"text_embeds": jnp.zeros((1, pooled)), "time_ids": jnp.zeros((1, 6))}
        return args, kwargs

    @property
    def conditional(self) -> bool:
        """Whether the output depends on classes or text."""
        cross = "cross" in map(DOWN_BLOCKS.get, self.down_block_types) or self.mid_block_type == MID_BLOCKS[0]
        return cross or bool(self.class_embed_type or self.num_class_embeds or self.addition_embed_type)

    def per_block(self, value):
        """An option as a tuple of one value per block."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def resnet(self, i):
        """Constructor of the resnets of block i."""
        return partial(
            ResnetBlock2D, self.block_out_channels[i], self.norm_num_groups, self.norm_eps,
            self.resnet_time_scale_shift == "scale_shift", self.dtype,
        )  # fmt: skip

    def attention(self, kind, i, head_dim_of=None, depths=None):
        """Constructor of the attention layers of block i from their number in the block, or None."""
        heads = self.per_block(self.num_attention_heads or self.attention_head_dim)[i]
        head_dim = self.per_block(self.attention_head_dim)[i if head_dim_of is None else head_dim_of]
        depths = self.depths()[i] if depths is None else depths
        only_cross = kind == "cross" and self.per_block(self.only_cross_attention)[i]

        def cross(layer, name):
            depth = depths if isinstance(depths, int) else depths[layer]
            return Transformer2DModel(
                heads, depth, self.norm_num_groups, self.use_linear_projection, only_cross, self.dtype, self.flash,
                name=name,
            )  # fmt: skip

        def spatial(layer, name):
            groups, eps = self.norm_num_groups, self.norm_eps
            return SpatialAttention(head_dim, groups, eps, self.dtype, self.flash, name=name)

        return {"none": None, "cross": cross, "mid": cross, "self": spatial}[kind]

    def block(self, cls):
        """The block's class, rematerialised if remat is set."""
        return rematerialised(cls, self.remat)

    @property
    def text_widths(self) -> list[int]:
        """Widths of the text embeddings that cross-attention takes; [] without any."""
        dims = self.per_block(self.cross_attention_dim)
        crossed = [d for d, b in zip(dims, self.down_block_types, strict=True) if DOWN_BLOCKS[b] == "cross"]
        return crossed + [dims[-1]] * (self.mid_block_type == "UNetMidBlock2DCrossAttn")

    def check_inputs(self, z_t, context):
        """Raise ValueError for inputs whose shapes do not fit this network."""
        factor, (_, h, w, c) = 2 ** (len(self.block_out_channels) - 1), z_t.shape
        if h % factor or w % factor:
            raise ValueError(f"height {h} and width {w} must be divisible by {factor}: this network halves them")
        if c != self.in_channels:
            raise ValueError(f"the network takes in_channels = {self.in_channels} but z_t (with concat) has {c}")
        dims = self.text_widths
        if dims and context is None:
            raise ValueError("this network has cross-attention: pass text embeddings as encoder_hidden_states")
        if dims and context.shape[-1] not in dims:
            raise ValueError(f"encoder_hidden_states have width {context.shape[-1]}, cross_attention_dim is {dims[0]}")

    def embedding(self, t, class_labels, added_cond_kwargs, timestep_cond):
        """The embedding [b, c] for every resnet: timestep and, if configured, class and SDXL's text and sizes."""
        wave = partial(sinusoid, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        features = self.time_embedding_dim or 4 * self.block_out_channels[0]
        mlp = partial(TimestepEmbedding, features, dtype=self.dtype)
        time = wave(t, self.block_out_channels[0]).astype(self.dtype)
        emb = mlp(self.time_cond_proj_dim, name="time_embedding")(time, timestep_cond)
        if self.class_embed_type or self.num_class_embeds:
            if class_labels is None:
                raise ValueError("this network is class-conditional: pass class_labels [b]")
            if self.class_embed_type is None:
                table = nn.Embed(self.num_class_embeds, features, dtype=self.dtype, name="class_embedding")
                emb = emb + table(class_labels)
            elif self.class_embed_type == "simple_projection":
                emb = emb + nn.Dense(features, dtype=self.dtype, name="class_embedding")(class_labels)
            else:
                waved = self.class_embed_type == "timestep"
                labels = wave(class_labels, self.block_out_channels[0]) if waved else class_labels
                emb = emb + mlp(name="class_embedding")(labels.astype(self.dtype))
        elif class_labels is not None:
            raise ValueError("class_labels were passed to a network without classes (num_class_embeds is not set)")
        if self.addition_embed_type == "text_time":
            if not {"text_embeds", "time_ids"} <= {*(added_cond_kwargs or ())}:
                raise ValueError("this network needs added_cond_kwargs with text_embeds [b, d] and time_ids [b, 6]")
            pooled, ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            sizes = wave(ids.reshape(-1), self.addition_time_embed_dim).reshape(ids.shape[0], -1)
            added = jnp.concatenate([pooled.astype(self.dtype), sizes.astype(self.dtype)], -1)
            emb = emb + mlp(name="add_embedding")(added)
        return emb

    def encode(self, h, emb, context, level_input=None):
        """conv_in's output to (skips, mid feature); level_input(i, feature), if given, replaces block i's input."""
        skips = ()
        for i, kind in enumerate(self.down_block_types):
            last = i == len(self.block_out_channels) - 1
            down = partial(Downsample2D, self.block_out_channels[i], self.downsample_padding, self.dtype)
            block = self.block(DownBlock2D)(
                self.per_block(self.layers_per_block)[i], self.resnet(i), self.attention(DOWN_BLOCKS[kind], i),
                None if last else down, name=f"down_blocks_{i}",
            )  # fmt: skip
            h = level_input(i, h) if level_input else h
            skips += (h,)
            h, new = block(h, emb, context)
            skips += new if last else new[:-1]  # the downsampled feature is added as skip by the next block
        if self.mid_block_type is not None:
            attention = self.attention("mid" if self.mid_block_type == "UNetMidBlock2DCrossAttn" else "none", -1)
            h = self.block(MidBlock2D)(self.resnet(-1), attention, name="mid_block")(h, emb, context)
        return skips, h

    def start(self, z_t, concat, context):
        """conv_in on z_t and, for editing and inpainting models, the channels of concat."""
        z_t = z_t if concat is None else jnp.concatenate([z_t, concat], -1)
        self.check_inputs(z_t, context)
        return conv(self.block_out_channels[0], self.conv_in_kernel, self.dtype, "conv_in")(z_t)


class UNet2DConditionModel(Encoder):
    """The denoiser, with diffusers' argument names; `concat` is concatenated to z_t's channels."""

    supported = {k: v for k, v in SUPPORTED.items() if k not in DECODER_LISTS}

    out_channels: Width = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    reverse_transformer_layers_per_block: tuple[Blocks | tuple[Blocks, ...], ...] | None = None  # coarsest first
    center_input_sample: bool = False
    conv_out_kernel: Kernel = 3
    sample_size: Sizes | None = None  # only written to configs
    output_layer = "conv_out"  # the network's last layer

    def check(self):
        """The same for the decoder, which must have its own numbers of transformer blocks if they are per layer."""
        super().check()
        nested = any(isinstance(depth, tuple) for depth in self.depths())
        if nested and self.reverse_transformer_layers_per_block is None:
            raise ValueError(
                f"transformer_layers_per_block = {self.transformer_layers_per_block} has numbers per layer: give the "
                "decoder's, coarsest first, in reverse_transformer_layers_per_block"
            )
        layers = [n + 1 for n in reversed(self.per_block(self.layers_per_block))]
        check_depths("reverse_transformer_layers_per_block", self.up_depths(), layers)

    def up_depths(self) -> tuple:
        """`depths` of the decoder, coarsest block first."""
        return self.reverse_transformer_layers_per_block or self.depths()[::-1]

    @nn.compact
    def __call__(self, z_t, t, residuals: Residuals | None = None, *, features: bool = False, **conditions):
        """Raw output float32 [b, h, w, out_channels] for z_t [b, h, w, c] at timesteps t [b], integers or fractional.

        conditions: encoder_hidden_states [b, l, d]; class_labels [b] (or vectors [b, d], by class_embed_type);
        added_cond_kwargs with text_embeds [b, d] and time_ids [b, 6]; timestep_cond [b, time_cond_proj_dim]; concat
        [b, h, w, n], where n channels complete in_channels. With features, the result is (output, output of the mid
        block, DecoderLevels, coarsest first), all float32. Raises ValueError for inputs that do not fit the config.
        """
        h, *hidden = self.trunk(z_t, t, residuals, **conditions)
        h = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name="conv_norm_out")(h))
        out = conv(self.out_channels, self.conv_out_kernel, self.dtype, "conv_out")(h).astype(jnp.float32)
        return (out, *jax.tree.map(lambda h: h.astype(jnp.float32), hidden)) if features else out

    def trunk(
        self, z_t, t, residuals: Residuals | None = None, *, encoder_hidden_states=None, class_labels=None,
        added_cond_kwargs=None, timestep_cond=None, concat=None, level_input=None,
    ):  # fmt: skip
        """Everything before the output layers: (last feature, output of the mid block, DecoderLevels, coarsest first).

        level_input(i, feature), if given, replaces the input of block i of the encoder, also as skip.
        """
        context = None if encoder_hidden_states is None else encoder_hidden_states.astype(self.dtype)
        z_t = 2.0 * z_t - 1.0 if self.center_input_sample else z_t
        emb = self.embedding(t, class_labels, added_cond_kwargs, timestep_cond)
        skips, h = self.encode(self.start(z_t, concat, context), emb, context, level_input)
        if residuals is not None:
            skips, h = adjust(residuals, skips, h)
        last, levels = self.decode(h, skips, emb, context)
        return last, h, levels

    def decode(self, h, skips, emb, context):
        """The up blocks: (last feature, DecoderLevels). Up block j has the widths and options of down block n-1-j."""
        n, levels = len(self.block_out_channels), ()
        for j, kind in enumerate(self.up_block_types):
            i = n - 1 - j
            num = self.per_block(self.layers_per_block)[i] + 1
            up = partial(Upsample2D, self.block_out_channels[i], self.dtype) if i else None
            # diffusers does not reverse attention_head_dim for AttnUpBlock2D, hence j
            attention = self.attention(UP_BLOCKS[kind], i, head_dim_of=j, depths=self.up_depths()[j])
            block = self.block(UpBlock2D)(self.resnet(i), attention, up, name=f"up_blocks_{j}")
            upsampled, after = block(h, skips[-num:], emb, context)
            levels += (DecoderLevel(h, skips[-1], after),)
            h, skips = upsampled, skips[:-num]
        return h, levels


def adjust(residuals: Residuals, skips, mid):
    """(skips, mid), each as keep * h + r; ValueError for residuals of another number or shape."""
    if len(residuals.down) != len(skips):
        raise ValueError(f"the UNet has {len(skips)} skips but the branch gives {len(residuals.down)} residuals")
    for h, r in zip((*skips, mid), (*residuals.down, residuals.mid), strict=True):
        if h.shape != r.shape:
            raise ValueError(f"a residual of shape {r.shape} cannot be added to a feature of shape {h.shape}")

    def blend(h, r):
        return (residuals.keep * h + r).astype(h.dtype)

    return tuple(map(blend, skips, residuals.down)), blend(mid, residuals.mid)

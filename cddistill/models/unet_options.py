"""Options of diffusers' UNet2DConditionModel and ControlNetModel: what is supported, and what contradicts itself."""

from cddistill.models.configured import check_groups, check_layers

DOWN_BLOCKS = {"DownBlock2D": "none", "CrossAttnDownBlock2D": "cross", "AttnDownBlock2D": "self"}
UP_BLOCKS = {"UpBlock2D": "none", "CrossAttnUpBlock2D": "cross", "AttnUpBlock2D": "self"}
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
CLASS_EMBEDS = (None, "timestep", "projection", "simple_projection")

# Options of diffusers and their supported values: choices first, then options supported only at neutral values.
SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "mid_block_type": MID_BLOCKS,
    "class_embed_type": CLASS_EMBEDS,
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_padding": (0, 1),
    "dropout": (0, None),
    "mid_block_scale_factor": (1,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "attention_type": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "reverse_transformer_layers_per_block": (None,),  # of a ControlNet, which has no decoder
    "global_pool_conditions": (False,),
    "controlnet_conditioning_channel_order": ("rgb",),
}
# Options of diffusers without effect on these networks.
NO_EFFECT = {
    "upcast_attention",
    "use_memory_efficient_attention",
    "split_head_dim",
    "mid_block_only_cross_attention",
    "addition_embed_type_num_heads",
}


DECODER_LISTS = ("up_block_types", "reverse_transformer_layers_per_block")  # the decoder's options per block


def check_depths(name: str, depths, layers) -> None:
    """Raise ValueError for a block of fewer numbers than attention layers."""
    for i, (depth, n) in enumerate(zip(depths, layers, strict=True)):
        if isinstance(depth, tuple) and len(depth) < n:
            raise ValueError(f"{name}[{i}] = {list(depth)} has {len(depth)} entries for {n} layers")


def check_sizes(unet) -> None:
    """Raise ValueError for too many layers, channels that no group or head divides, and embeddings without a width."""
    layers, keys = unet.per_block(unet.layers_per_block), "layers_per_block and transformer_layers_per_block"
    depths = [sum(d[:k]) if isinstance(d, tuple) else k * d for d, k in zip(unet.depths(), layers, strict=True)]
    check_layers(sum(layers) + sum(depths), keys)
    check_groups(unet.block_out_channels, unet.norm_num_groups)
    key = "num_attention_heads" if unet.num_attention_heads else "attention_head_dim"
    heads, middle = unet.per_block(getattr(unet, key)), unet.mid_block_type == MID_BLOCKS[0]
    for i, (width, kind) in enumerate(zip(unet.block_out_channels, unet.down_block_types, strict=True)):
        crossed = DOWN_BLOCKS[kind] == "cross" or (middle and i == len(heads) - 1)
        if width < 4 or (crossed and width % heads[i]):
            raise ValueError(f"block_out_channels[{i}] = {width} cannot be split into {key} = {heads[i]} heads")
    vector, time = unet.projection_class_embeddings_input_dim or 0, unet.addition_time_embed_dim or 0
    if unet.class_embed_type in CLASS_EMBEDS[2:] and not vector:
        raise ValueError(f"class_embed_type = {unet.class_embed_type!r} needs projection_class_embeddings_input_dim")
    if unet.addition_embed_type == "text_time" and not 0 < 6 * time < vector:
        raise ValueError(
            "addition_embed_type = 'text_time' needs addition_time_embed_dim, and "
            "projection_class_embeddings_input_dim above six times that"
        )

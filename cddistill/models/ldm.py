"""Names of the original Stable Diffusion code (latent-diffusion) for the layers of diffusers' networks."""

import re

MOST_BLOCKS = 50  # of an encoder or decoder; Stable Diffusion has 12
BLOCK = r"(down_blocks\.\d|mid_block|up_blocks\.\d)\.(\w+)\.(\d+)\.(.+)"
UNET_LAYERS = {  # where they differ from diffusers'
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def unet_names(names) -> dict:
    """{layer of diffusers' UNet: layer of the original}; there a block is one resnet with its attention.

    Raises ValueError for blocks of more than ten resnets.
    """
    if deep := next((name for name in names if re.match(r"(down|up)_blocks\.\d\.resnets\.\d\d", name)), None):
        raise ValueError(f"{deep} is more than Stable Diffusion in one file may have: ten resnets in a block")
    resnets = sorted({m[0] for name in names if (m := re.match(r"(down|up)_blocks\.\d\.resnets\.\d", name))})
    ups = [name for name in resnets if name.startswith("up")]
    number = {name: i for i, name in enumerate(ups)}
    for i, name in enumerate(name for name in resnets if name not in number):
        number[name] = 1 + i + int(name.split(".")[1])  # after conv_in and one downsampler per earlier block

    def convert(name):
        if not (match := re.fullmatch(BLOCK, name)):
            return UNET_LAYERS.get(name, name)
        block, kind, j, layer = match.groups()
        layer, is_attention = UNET_LAYERS.get(layer, layer), int(kind == "attentions")
        if block == "mid_block":
            return f"middle_block.{2 * int(j) + is_attention}.{layer}"
        last = max(i for resnet, i in number.items() if resnet.startswith(f"{block}."))
        if kind == "downsamplers":
            return f"input_blocks.{last + 1}.0.op"
        if kind == "upsamplers":  # in its block, after the resnet and, if any, the attention
            return f"output_blocks.{last}.{1 + any(n.startswith(f'{block}.attentions.') for n in names)}.{layer}"
        side = "output_blocks" if block.startswith("up") else "input_blocks"
        return f"{side}.{number[f'{block}.resnets.{j}']}.{is_attention}.{layer}"

    return {name: convert(name) for name in names}


VAE_LAYERS = (  # (diffusers', the original's), replaced in this order
    (".down_blocks.", ".down."), (".resnets.", ".block."), (".downsamplers.0.conv", ".downsample.conv"),
    (".upsamplers.0.conv", ".upsample.conv"), (".conv_shortcut", ".nin_shortcut"), (".conv_norm_out", ".norm_out"),
    (".mid_block.attentions.0.", ".mid.attn_1."), (".attn_1.group_norm", ".attn_1.norm"), (".attn_1.to_q", ".attn_1.q"),
    (".attn_1.to_k", ".attn_1.k"), (".attn_1.to_v", ".attn_1.v"), (".attn_1.to_out.0", ".attn_1.proj_out"),
)  # fmt: skip
OPEN_CLIP = (  # (pattern in OpenCLIP's names, transformers')
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)


def vae_names(names) -> dict:
    """{layer of diffusers' AutoencoderKL: layer of the original}, whose decoder counts its blocks from the finest."""
    last = max(int(m[1]) for name in names if (m := re.match(r"decoder\.up_blocks\.(\d)", name)))

    def convert(name):
        name = re.sub(r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"\.up_blocks\.(\d)", lambda m: f".up.{last - int(m[1])}", name)
        for ours, theirs in VAE_LAYERS:
            name = name.replace(ours, theirs)
        return name

    return {name: convert(name) for name in names}


def open_clip(tensors: dict) -> dict:
    """OpenCLIP's text encoder under transformers' names: its fused projections of q, k, v are rows of one matrix."""
    renamed = {}
    for name, x in tensors.items():
        for pattern, ours in OPEN_CLIP:
            name = re.sub(pattern, ours, name)
        module, fused, leaf = name.partition(".in_proj_")
        rows = x.shape[0] // 3 if x.ndim else 0
        if fused and rows:
            renamed |= {
                f"{module}.{part}_proj.{leaf}": x.rows(i * rows, (i + 1) * rows) for i, part in enumerate("qkv")
            }
        else:
            renamed[name] = x.T if name == "text_projection.weight" else x  # it is multiplied from the right
    return renamed


def unet_config(shapes: dict) -> dict:
    """config.json of the UNet whose tensors, by the original's names, have these shapes; no heads, no text inputs."""
    down, up = blocks(shapes, "input_blocks", 1, "0.op"), blocks(shapes, "output_blocks", 0, r"\d.conv")
    attended = [any(depth for _, depth in block) for block in down]
    middle = num_layers(shapes, "middle_block.1.transformer_blocks")
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": [block[0][0] for block in down],
        "layers_per_block": len(down[0]),
        "down_block_types": [f"{'CrossAttn' * cross}DownBlock2D" for cross in attended],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "up_block_types": [f"{'CrossAttn' * cross}UpBlock2D" for cross in attended[::-1]],
        "use_linear_projection": any(len(s) == 2 for name, s in shapes.items() if name.endswith("1.proj_in.weight")),
        **transformer_layers(down, up, middle),
    }


def transformer_layers(down, up, middle: int) -> dict:
    """The options for the layers per transformer: one per block or, in distilled networks, one per attention."""

    def short(block, default):
        depths = [depth for _, depth in block]
        return depths[0] or default if len({*depths}) == 1 else depths

    encoder = [short(block, 1) for block in down[:-1]] + [short(down[-1], middle or 1)]
    decoder = [short(block, default) for block, default in zip(up, encoder[::-1], strict=True)]
    if decoder != encoder[::-1]:
        return {"transformer_layers_per_block": encoder, "reverse_transformer_layers_per_block": decoder}
    return {"transformer_layers_per_block": 1 if {*encoder} == {1} else encoder}


def blocks(shapes: dict, side: str, first: int, resampler: str) -> list[list[tuple[int, int]]]:
    """(width, transformer layers) of every resnet, per block: a block of the encoder begins after, one of the decoder
    ends with a resampler."""
    found = [[]]
    for i in range(first, MOST_BLOCKS):
        if not any(name.startswith(f"{side}.{i}.") for name in shapes):
            break
        ends = any(re.fullmatch(rf"{side}\.{i}\.{resampler}\.weight", name) for name in shapes)
        if width := shapes.get(f"{side}.{i}.0.out_layers.3.weight"):
            found[-1].append((width[0], num_layers(shapes, f"{side}.{i}.1.transformer_blocks")))
        if ends:
            found.append([])
    return [block for block in found if block]


def num_layers(names, prefix: str) -> int:
    """Number of the layers prefix.0, prefix.1 ..."""
    return len({name.split(".")[prefix.count(".") + 1] for name in names if name.startswith(f"{prefix}.")})


def vae_config(shapes: dict) -> dict:
    """config.json of the AutoencoderKL whose tensors, by the original's names, have these shapes."""
    n = num_layers(shapes, "encoder.down")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(n)],
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "layers_per_block": num_layers(shapes, "encoder.down.0.block"),
    }


def clip_config(shapes: dict) -> dict:
    """config.json of the CLIP text encoder whose tensors, by transformers' names, have these shapes."""
    sizes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocabulary, width = sizes["embeddings.token_embedding.weight"]
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": sizes.get("text_projection.weight", (width,))[0],
        "intermediate_size": sizes["encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": sizes["embeddings.position_embedding.weight"][0],
        "num_hidden_layers": num_layers(sizes, "encoder.layers"),
        "num_attention_heads": max(width // 64, 1),
        "eos_token_id": vocabulary - 1,
    }

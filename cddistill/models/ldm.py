"""Names of the original Stable Diffusion code (latent-diffusion) for the layers of diffusers' networks."""

import re

BLOCK = r"(down_blocks\.\d|mid_block|up_blocks\.\d)\.(\w+)\.(\d+)\.(.+)"
UNET_LAYERS = {  # where they differ from diffusers'
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def unet_names(names) -> dict:
    """{layer of diffusers' UNet: layer of the original}; there a block is one resnet with its attention."""
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

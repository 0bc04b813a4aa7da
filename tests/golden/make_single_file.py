"""Single files of Stable Diffusion and what diffusers makes of them: python -m golden.make_single_file, in tests/

Recorded with torch 2.13.0, diffusers 0.42.1, transformers 5.23.0. Names and shapes come from the constructors of the
original code, written down here as loops. single_file.json has, for full and tiny sizes, the configs of diffusers'
converter and a digest of which tensor becomes which weight. No weights are needed; the tests need no such package.
"""

import hashlib
import json
from pathlib import Path

FULL_UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2}
V1 = {"attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_heads": 8, "transformer_depth": 1,
      "context_dim": 768}  # fmt: skip
V2 = V1 | {"context_dim": 1024, "num_head_channels": 64, "use_linear_in_transformer": True}
V2.pop("num_heads")
XL = V2 | {"attention_resolutions": [4, 2], "channel_mult": [1, 2, 4], "transformer_depth": [1, 2, 10],
           "context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816}  # fmt: skip
VAE = {"in_channels": 3, "out_ch": 3, "z_channels": 4, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
L, H, G = (  # vocabulary, width, layers, width of the MLP
    (49408, 768, 12, 3072),
    (49408, 1024, 24, 4096),
    (49408, 1280, 32, 5120),
)
FULL = {
    "sd1": {"unet": FULL_UNET | V1, "vae": VAE, "text": {"cond_stage_model.transformer.text_model.": L}},
    "sd2": {"unet": FULL_UNET | V2, "vae": VAE, "text": {"cond_stage_model.model.": H}},
    "xl": {
        "unet": FULL_UNET | XL,
        "vae": VAE,
        "text": {"conditioner.embedders.0.transformer.text_model.": L, "conditioner.embedders.1.model.": G},
    },
}
TINY_UNET = {"model_channels": 64, "num_res_blocks": 1, "channel_mult": [1, 2]}
TINY_VAE = VAE | {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
TINY = {
    "sd1": {
        "unet": FULL_UNET | V1 | TINY_UNET | {"model_channels": 32, "attention_resolutions": [1]},
        "vae": TINY_VAE,
        "text": {"cond_stage_model.transformer.text_model.": (62, 768, 1, 96)},  # works with the UNet
    },
    "sd2": {
        "unet": FULL_UNET | V2 | TINY_UNET | {"attention_resolutions": [2, 1]},
        "vae": TINY_VAE,
        "text": {"cond_stage_model.model.": (62, 64, 2, 96)},
    },
    "xl": {
        "unet": FULL_UNET | XL | TINY_UNET | {"attention_resolutions": [2], "transformer_depth": [1, 2]},
        "vae": TINY_VAE,
        "text": {
            "conditioner.embedders.0.transformer.text_model.": (62, 64, 2, 96),
            "conditioner.embedders.1.model.": (62, 128, 2, 96),
        },
    },
}
SIZES = FULL | {f"tiny_{kind}": p for kind, p in TINY.items()}


def layer(name: str, *shape: int, bias: bool = True) -> dict:
    """A weight [out, ...] and its bias."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def prefixed(prefix: str, shapes: dict) -> dict:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def resblock(before: int, after: int, emb: int) -> dict:
    shapes = (
        layer("in_layers.0", before) | layer("in_layers.2", after, before, 3, 3) | layer("emb_layers.1", after, emb)
    )
    shapes |= layer("out_layers.0", after) | layer("out_layers.3", after, after, 3, 3)
    return shapes | (layer("skip_connection", after, before, 1, 1) if before != after else {})


def transformer(width: int, depth: int, context: int, linear: bool) -> dict:
    taps = () if linear else (1, 1)
    shapes = layer("norm", width) | layer("proj_in", width, width, *taps)
    for i in range(depth):
        block = {}
        for attention, source in (("attn1", width), ("attn2", context)):
            block |= layer(f"{attention}.to_q", width, width, bias=False)
            block |= layer(f"{attention}.to_k", width, source, bias=False)
            block |= layer(f"{attention}.to_v", width, source, bias=False)
            block |= layer(f"{attention}.to_out.0", width, width)
        block |= layer("ff.net.0.proj", 8 * width, width) | layer("ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            block |= layer(norm, width)
        shapes |= prefixed(f"transformer_blocks.{i}.", block)
    return shapes | layer("proj_out", width, width, *taps)


def unet(p: dict) -> dict:
    """Names and shapes of openaimodel.UNetModel, in the order of its constructor."""
    width, mult, depth = p["model_channels"], p["channel_mult"], p["transformer_depth"]
    depth, emb = [depth] * len(mult) if isinstance(depth, int) else depth, 4 * width
    linear, context = p.get("use_linear_in_transformer", False), p["context_dim"]
    shapes = layer("time_embed.0", emb, width) | layer("time_embed.2", emb, emb)
    if "adm_in_channels" in p:
        shapes |= layer("label_emb.0.0", emb, p["adm_in_channels"]) | layer("label_emb.0.2", emb, emb)
    shapes |= layer("input_blocks.0.0", width, p["in_channels"], 3, 3)
    skips, now, ds, number = [width], width, 1, 1
    for level, m in enumerate(mult):
        for _ in range(p["num_res_blocks"]):
            shapes |= prefixed(f"input_blocks.{number}.0.", resblock(now, m * width, emb))
            now = m * width
            if ds in p["attention_resolutions"]:
                shapes |= prefixed(f"input_blocks.{number}.1.", transformer(now, depth[level], context, linear))
            skips, number = [*skips, now], number + 1
        if level < len(mult) - 1:
            shapes |= layer(f"input_blocks.{number}.0.op", now, now, 3, 3)
            skips, number, ds = [*skips, now], number + 1, 2 * ds
    shapes |= prefixed("middle_block.0.", resblock(now, now, emb))
    shapes |= prefixed("middle_block.1.", transformer(now, depth[-1], context, linear))
    shapes |= prefixed("middle_block.2.", resblock(now, now, emb))
    number = 0
    for level in reversed(range(len(mult))):
        for i in range(p["num_res_blocks"] + 1):
            shapes |= prefixed(f"output_blocks.{number}.0.", resblock(now + skips.pop(), mult[level] * width, emb))
            now, parts = mult[level] * width, 1
            if ds in p["attention_resolutions"]:
                shapes |= prefixed(f"output_blocks.{number}.1.", transformer(now, depth[level], context, linear))
                parts = 2
            if level and i == p["num_res_blocks"]:
                shapes |= layer(f"output_blocks.{number}.{parts}.conv", now, now, 3, 3)
                ds //= 2
            number += 1
    return shapes | layer("out.0", now) | layer("out.2", p["out_channels"], width, 3, 3)


def vae(p: dict) -> dict:
    """Names and shapes of AutoencoderKL, encoder and decoder as their constructors make them."""
    widths, n, z = [m * p["ch"] for m in p["ch_mult"]], p["num_res_blocks"], p["z_channels"]

    def block(before, after):
        shapes = layer("norm1", before) | layer("conv1", after, before, 3, 3)
        shapes |= layer("norm2", after) | layer("conv2", after, after, 3, 3)
        return shapes | (layer("nin_shortcut", after, before, 1, 1) if before != after else {})

    attention = layer("norm", widths[-1])
    for name in ("q", "k", "v", "proj_out"):
        attention |= layer(name, widths[-1], widths[-1], 1, 1)
    middle = prefixed("mid.block_1.", block(widths[-1], widths[-1])) | prefixed("mid.attn_1.", attention)
    middle |= prefixed("mid.block_2.", block(widths[-1], widths[-1]))
    encoder, decoder, now = layer("conv_in", p["ch"], p["in_channels"], 3, 3) | middle, middle, p["ch"]
    for level, width in enumerate(widths):
        for i in range(n):
            encoder = encoder | prefixed(f"down.{level}.block.{i}.", block(now, width))
            now = width
        if level < len(widths) - 1:
            encoder |= layer(f"down.{level}.downsample.conv", now, now, 3, 3)
    encoder |= layer("norm_out", now) | layer("conv_out", 2 * z, now, 3, 3)
    decoder = decoder | layer("conv_in", now, z, 3, 3)
    for level in reversed(range(len(widths))):
        for i in range(n + 1):
            decoder |= prefixed(f"up.{level}.block.{i}.", block(now, widths[level]))
            now = widths[level]
        if level:
            decoder |= layer(f"up.{level}.upsample.conv", now, now, 3, 3)
    decoder |= layer("norm_out", now) | layer("conv_out", p["out_ch"], now, 3, 3)
    both = prefixed("encoder.", encoder) | prefixed("decoder.", decoder)
    return both | layer("quant_conv", 2 * z, 2 * z, 1, 1) | layer("post_quant_conv", z, z, 1, 1)


def clip(vocabulary: int, width: int, layers: int, mlp: int) -> dict:
    """Names and shapes of transformers' CLIPTextTransformer."""
    shapes = layer("embeddings.token_embedding", vocabulary, width, bias=False)
    shapes |= layer("embeddings.position_embedding", 77, width, bias=False)
    for i in range(layers):
        own = {}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            own |= layer(f"self_attn.{name}", width, width)
        own |= layer("layer_norm1", width) | layer("layer_norm2", width)
        own |= layer("mlp.fc1", mlp, width) | layer("mlp.fc2", width, mlp)
        shapes |= prefixed(f"encoder.layers.{i}.", own)
    return shapes | layer("final_layer_norm", width)


def open_clip(vocabulary: int, width: int, layers: int, mlp: int) -> dict:
    """Names and shapes of OpenCLIP's text tower, whose attention is PyTorch's MultiheadAttention."""
    shapes = {"positional_embedding": (77, width), "text_projection": (width, width), "logit_scale": ()}
    shapes |= layer("token_embedding", vocabulary, width, bias=False)
    for i in range(layers):
        own = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        own |= layer("attn.out_proj", width, width) | layer("ln_1", width) | layer("ln_2", width)
        own |= layer("mlp.c_fc", mlp, width) | layer("mlp.c_proj", width, mlp)
        shapes |= prefixed(f"transformer.resblocks.{i}.", own)
    return shapes | layer("ln_final", width)


def checkpoint(p: dict) -> dict:
    """{name: shape} of everything in a single file."""
    shapes = prefixed("model.diffusion_model.", unet(p["unet"])) | prefixed("first_stage_model.", vae(p["vae"]))
    for prefix, sizes in p["text"].items():
        shapes |= prefixed(prefix, (clip if "transformer" in prefix else open_clip)(*sizes))
    return shapes


def digest(lines) -> str:
    """Of lines "our name, shape, their name, first row", one for each weight."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def main():
    """Run diffusers' converter and write single_file.json next to this file."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def marked(names):
        """Tensors without memory of their own whose values say which one and which row they are."""
        for i, (name, shape) in enumerate(names.items()):
            rows = 100_000 * i + torch.arange(shape[0] if "in_proj" in name else 1)
            yield name, rows.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape) if shape else rows[0]

    def lines(converted, names, wanted, prefix=""):
        assert {*converted} == {*wanted}, {*converted} ^ {*wanted}
        for name, x in converted.items():
            first = int(x[(0,) * x.ndim])
            assert tuple(x.shape) == tuple(wanted[name].shape), name
            yield f"{prefix}{name} {tuple(x.shape)} {names[first // 100_000]} {first % 100_000}"

    def shapes_of(cls, config):
        with torch.device("meta"):
            return cls(config).state_dict() if hasattr(cls, "config_class") else cls.from_config(config).state_dict()

    out = []
    for kind, p in SIZES.items():
        held = checkpoint(p)
        names, tensors = [*held], dict(marked(held))
        scale = {"scale_factor": 0.13025 if len(p["text"]) == 2 else 0.18215}
        parts = {"unet_config": {"params": p["unet"]}, "first_stage_config": {"params": {"ddconfig": p["vae"]}}}
        original, found = {"model": {"params": parts | scale}}, {}
        config = theirs.create_unet_diffusers_config_from_ldm(original, tensors)
        converted = theirs.convert_ldm_unet_checkpoint(tensors, config)
        found["unet"] = config, digest(lines(converted, names, shapes_of(UNet2DConditionModel, config)))
        config = theirs.create_vae_diffusers_config_from_ldm(original, tensors)
        converted = theirs.convert_ldm_vae_checkpoint(tensors, config)
        found["vae"] = config, digest(lines(converted, names, shapes_of(AutoencoderKL, config)))
        for i, (prefix, (vocabulary, width, layers, mlp)) in enumerate(p["text"].items()):
            is_open, projected = "transformer" not in prefix, i == 1
            config = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "projection_dim": width,
                      "num_hidden_layers": 23 if layers == 24 else layers, "num_attention_heads": width // 64,
                      "hidden_act": "gelu" if is_open else "quick_gelu"}  # fmt: skip
            cls = CLIPTextModelWithProjection if projected else CLIPTextModel
            with torch.device("meta"):
                model = cls(CLIPTextConfig(**config))
            if is_open:
                converted = theirs.convert_open_clip_checkpoint(model, tensors, prefix)
            else:
                converted = theirs.convert_ldm_clip_checkpoint(tensors)
            long = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in model.state_dict().items()}
            found["text_encoder" + "_2" * i] = config, digest(lines(converted, names, long))
        for config, _ in found.values():
            if kind not in FULL:  # follows from the real number of levels
                config.pop("sample_size", None)
        found = {part: {"config": config, "digest": mark} for part, (config, mark) in found.items()}
        out.append(f'"{kind}": {json.dumps(found)}')
    (Path(__file__).parent / "single_file.json").write_text("{\n" + ",\n".join(out) + "\n}\n")


if __name__ == "__main__":
    main()

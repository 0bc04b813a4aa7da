"""Reference outputs of PyTorch diffusers with LoRA files of every style: python -m golden.make_lora, in tests/

Recorded with torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.23.0. Networks, LoRAs and inputs come
from a numpy seed, here and in the tests, so lora.npz holds only outputs, gradients and the names that diffusers itself
writes. None of the four is needed to run the tests.
"""

import json
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
from golden import make_clip
from golden.make_models import UNETS, inputs, weights

ATTENTION, RANK, ALPHA = r".*\.(to_q|to_k|to_v|to_out\.0)", 3, 2.0
LDM = {  # for the tiny SDXL, written down by hand from the original UNet: a block per resnet
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks_1_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.resnets.0.conv2": "input_blocks_3_0_out_layers_3",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks_3_1_transformer_blocks_1_attn2_to_k",
    "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.resnets.0.conv1": "output_blocks_0_0_in_layers_2",
    "up_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q": "output_blocks_0_1_transformer_blocks_1_attn1_to_q",
    "up_blocks.0.attentions.1.proj_out": "output_blocks_1_1_proj_out",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2": "output_blocks_1_1_transformer_blocks_0_ff_net_2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "up_blocks.1.resnets.1.conv_shortcut": "output_blocks_3_0_skip_connection",
}


def factor(name: str, shape) -> np.ndarray:
    """The down or up matrix of a LoRA layer, about as large as the weights, so that its effect is large."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return (x / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def layers(shapes: dict, pattern: str = ".*") -> dict:
    """{layer name: kernel shape} of the matching linear layers and convolutions in {PyTorch name: shape}."""
    kernels = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) > 1}
    return {k: s for k, s in kernels.items() if re.fullmatch(pattern, k) and "embeddings" not in k}


def halves(name: str, shape, rank: int = RANK):
    """(down, up) of a layer in PyTorch's layout."""
    down = factor(f"{name}.down", (rank, *shape[1:]))
    return down, factor(f"{name}.up", (shape[0], rank, *(1,) * (len(shape) - 2)))


def styled(shapes: dict, pattern: str, key_of) -> dict:
    """The tensors of a file: key_of(layer, 0) is the key of the down matrix, key_of(layer, 1) that of the up matrix."""
    return {key_of(k, i): x for k, s in layers(shapes, pattern).items() for i, x in enumerate(halves(k, s))}


def processor(name: str, i: int) -> str:
    """Key names of diffusers before 0.17."""
    module, layer = re.fullmatch(r"(.*)\.(to_q|to_k|to_v|to_out)(?:\.0)?", name).groups()
    return f"unet.{module}.processor.{layer}_lora.{('down', 'up')[i]}.weight"


def kohya(shapes: dict, prefix: str, names: dict, alpha: float) -> dict:
    """kohya's key names; ranks differ (2 for convolutions) but alpha does not: diffusers misreads differing alphas."""
    tensors = {}
    for layer, name in names.items():
        down, up = halves(layer, layers(shapes)[layer], 2 if len(layers(shapes)[layer]) == 4 else RANK)
        tensors |= {f"{prefix}{name}.lora_down.weight": down, f"{prefix}{name}.lora_up.weight": up}
        tensors |= {f"{prefix}{name}.alpha": np.array(alpha, np.float32)}
    return tensors


def lora_files(unet: dict, xl: dict, text: dict) -> dict:
    """{style: (UNet, tensors, metadata)} given {PyTorch name: shape} of the tiny SD 1.5, SDXL and text encoder."""
    special = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    options = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {special: 5.0}, "rank_pattern": {}}
    options["target_modules"] = sorted(layers(unet, ATTENTION))
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in options.items()})}
    underscored = {k: k.replace(".", "_") for k in layers(unet)}
    encoder = {k: k.replace(".", "_") for k in layers(text, r".*(_proj|fc1)")}
    peft = lambda prefix: lambda k, i: f"{prefix}{k}.lora_{'AB'[i]}.weight"
    dotted = lambda k, i: f"unet.{k}.lora.{('down', 'up')[i]}.weight"
    return {
        "peft": ("sd15", styled(unet, ATTENTION, peft("unet.")), metadata),
        "dotted": ("sd15", styled(unet, r".*\.(to_\w|to_out\.0|proj_in|net\.2|conv\d?|time_emb_proj)", dotted), {}),
        "processor": ("sd15", styled(unet, ATTENTION, processor), {}),
        "kohya": (  # as LCM-LoRA: every layer
            "sd15",
            kohya(unet, "lora_unet_", underscored, 1.0) | kohya(text, "lora_te_", encoder, 2.0),
            {},
        ),
        "kohya_xl": ("sdxl", kohya(xl, "lora_unet_", LDM, 4.0), {}),
    }


def main():
    """Run diffusers and write lora.npz next to this file."""
    import safetensors.torch
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from peft import get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel

    def filled(net, prefix=""):
        shapes = {prefix + k: tuple(v.shape) for k, v in net.state_dict().items()}
        net.load_state_dict({k.removeprefix(prefix): torch.from_numpy(v) for k, v in weights(shapes).items()})
        return net.eval(), shapes

    def tensors(tree):
        return {k: tensors(v) if isinstance(v, dict) else torch.from_numpy(v) for k, v in tree.items()}

    def unet(name):
        return filled(UNet2DConditionModel(**UNETS[name]))

    def encoder():
        return filled(CLIPTextModel(CLIPTextConfig(**make_clip.L)), "text_model.")  # transformers 5 leaves that out

    out, folder = {}, Path(tempfile.mkdtemp())
    files = lora_files(unet("sd15")[1], unet("sdxl")[1], encoder()[1])
    for style, (name, arrays, metadata) in files.items():
        file = folder / f"{style}.safetensors"
        safetensors.torch.save_file(tensors(arrays), file, metadata={"format": "pt"} | metadata)
        net, pipeline = unet(name)[0], StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
        state, alphas, options = pipeline.lora_state_dict(file, unet_config=net.config, return_lora_metadata=True)
        pipeline.load_lora_into_unet(state, alphas, net, metadata=options)
        x = tensors(inputs(UNETS[name]))
        x["sample"].requires_grad_()
        y = net(**x).sample
        (y**2).mean().backward()
        out[f"{style}/out"], out[f"{style}/grad"] = y.detach().numpy(), x["sample"].grad.numpy()
        halves_of = {k: p for k, p in net.named_parameters() if "lora_" in k}
        out[f"{style}/num"] = np.array(len(halves_of))
        if style == "peft":
            names = sorted(halves_of)
            out[f"{style}/grad_norm"] = np.array([halves_of[k].grad.norm().item() for k in names], np.float32)
            pipeline.save_lora_weights(
                folder, unet_lora_layers=get_peft_model_state_dict(net, adapter_name="default_0")
            )
            saved = safetensors.torch.load_file(folder / "pytorch_lora_weights.safetensors")
            out["saved"] = np.array([f"{k} {tuple(v.shape)}" for k, v in sorted(saved.items())])
        if style == "kohya":
            text = encoder()[0]
            pipeline.load_lora_into_text_encoder(state, alphas, text)
            ids = torch.from_numpy(make_clip.token_ids(make_clip.L))
            out["kohya/text"] = text(ids).last_hidden_state.detach().numpy()
            out["kohya/num_text"] = np.array(sum("lora_" in k for k, _ in text.named_parameters()))
    np.savez_compressed(Path(__file__).parent / "lora.npz", **out)
    print({k: (v.shape, v if v.ndim == 0 else v.dtype) for k, v in out.items()})


if __name__ == "__main__":
    main()

"""Reference outputs of PyTorch transformers and diffusers for tiny text encoders: python -m golden.make_clip, in tests/

Recorded with torch 2.13.0 (CPU), transformers 5.23.0, diffusers 0.42.1. Weights and inputs come from a numpy seed, here
and in the tests, so clip.npz holds only outputs and gradients. None of the three is needed to run the tests.
"""

import json
import tempfile
import types
from pathlib import Path

import numpy as np
from golden.make_models import weights

MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "h a", "ha t</w>"]
LETTERS = list("!abcdefghijklmnopqrstuvwxyz")
START, END = "<|startoftext|>", "<|endoftext|>"
VOCAB = [*LETTERS, *(c + "</w>" for c in LETTERS), *(merge.replace(" ", "") for merge in MERGES), START, END]
LENGTH = 12  # tokens, where the real ones have 77

L = {  # Stable Diffusion 1.x: quick_gelu, eos_token_id of old configs
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": len(VOCAB),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 20,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
H = L | {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 3, "hidden_act": "gelu"}  # 2.x
G = H | {  # SDXL's second; eps and a vocabulary of its own, ids behind the end token as after textual inversion
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": len(VOCAB) + 3,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-3,
    "eos_token_id": len(VOCAB) - 1,
}
ENCODERS = {"clip_l": L, "openclip_h": H, "openclip_bigg": G}
PIPELINES = {"sd15": ["clip_l"], "sd21": ["openclip_h"], "sdxl": ["clip_l", "openclip_bigg"]}
PADS = {"clip_l": END, "openclip_h": "!", "openclip_bigg": "!"}
PROMPTS = ["A cat, a hat", "dog!", "", "the quick brown fox jumps over the lazy dog"]  # the last has to be cut
SIZES = {"original_size": (768, 512), "crop": (0, 64), "target_size": (1024, 960)}


def token_ids(config: dict) -> np.ndarray:
    """Three texts: one padded, one full, one with ids after (and, if the vocabulary has any, above) the end token."""
    ids = np.random.default_rng(0).integers(0, len(VOCAB) - 2, (3, LENGTH))
    end = len(VOCAB) - 1
    ids[0, 5:], ids[1, -1], ids[2, 3], ids[2, 7] = end, end, end, config["vocab_size"] - 1
    return ids.astype(np.int32)


def cotangents(config: dict) -> dict:
    """Random weights of the outputs in the scalar sum whose gradient is recorded."""
    rng, d = np.random.default_rng(1), config["hidden_size"]
    pooled = config["projection_dim"] if "Projection" in config["architectures"][0] else d
    shapes = {"last_hidden_state": (3, LENGTH, d), "penultimate": (3, LENGTH, d), "pooled": (3, pooled)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_tokenizer(folder, pad: str) -> None:
    """Write a CLIP tokenizer folder with the layout of the published ones."""
    path = Path(folder)
    path.mkdir(parents=True)
    path.joinpath("vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCAB)}))
    path.joinpath("merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    config = special | {"pad_token": END, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    path.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    path.joinpath("special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))  # this one counts


def network(name: str):
    """(transformers' model, its parameters by published name)."""
    import torch
    import transformers

    config = ENCODERS[name]
    net = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config)).eval()
    prefix = "" if hasattr(net, "text_model") else "text_model."  # transformers 5 has dropped it from one class
    params = {prefix + k: v for k, v in net.named_parameters()}
    with torch.no_grad():
        for k, x in weights({k: tuple(v.shape) for k, v in params.items()}).items():
            params[k].copy_(torch.from_numpy(x))
    return net, params


def record_encoder(name: str) -> dict:
    """Outputs, and the gradient of their sum weighted by `cotangents`."""
    import torch

    net, params = network(name)
    y = net(torch.from_numpy(token_ids(ENCODERS[name])).long(), output_hidden_states=True)
    pooled = y.text_embeds if "text_embeds" in y else y.pooler_output
    out = {"last_hidden_state": y.last_hidden_state, "penultimate": y.hidden_states[-2], "pooled": pooled}
    sum((out[k] * torch.from_numpy(x)).sum() for k, x in cotangents(ENCODERS[name]).items()).backward()
    out["token_grad"] = params["text_model.embeddings.token_embedding.weight"].grad
    out["grad_norm"] = torch.stack([params[k].grad.norm() for k in sorted(params)])
    return {f"{name}/{k}": v.detach().numpy() for k, v in out.items()}


def record_pipeline(name: str) -> dict:
    """Token ids and the output of diffusers' encode_prompt, including the null text."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    parts, out = {}, {}
    for suffix, encoder in zip(("", "_2"), PIPELINES[name], strict=False):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(f"{folder}/tokenizer", PADS[encoder])
            tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
        parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": network(encoder)[0]}
        ids = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
        out[f"{name}/ids{suffix}"] = np.array(ids, np.int32)
    if name != "sdxl":
        none = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
        pipeline = StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
        with torch.no_grad():
            text, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
        return out | {f"{name}/text": text.numpy(), f"{name}/null": null.numpy()}
    for zeros in (True, False):
        pipeline = StableDiffusionXLPipeline(
            vae=None, unet=None, scheduler=None, force_zeros_for_empty_prompt=zeros, add_watermarker=False, **parts
        )
        with torch.no_grad():
            keys, values = ("text", "null", "pooled", "pooled_null"), pipeline.encode_prompt(PROMPTS, device="cpu")
        assert not zeros or not any(x.any() for x in values[1::2])
    linear = types.SimpleNamespace(linear_1=types.SimpleNamespace(in_features=6 * 8 + 10))
    unet = types.SimpleNamespace(config=types.SimpleNamespace(addition_time_embed_dim=8), add_embedding=linear)
    ids = StableDiffusionXLPipeline._get_add_time_ids(
        types.SimpleNamespace(unet=unet), *SIZES.values(), torch.float32, text_encoder_projection_dim=10
    )
    recorded = dict(zip(keys, values, strict=True)) | {"time_ids": ids}
    return out | {f"{name}/{k}": x.numpy() for k, x in recorded.items()}


def main():
    """Run transformers and diffusers and write clip.npz next to this file."""
    out = {}
    for name in ENCODERS:
        out |= record_encoder(name)
    for name in PIPELINES:
        out |= record_pipeline(name)
    np.savez_compressed(Path(__file__).parent / "clip.npz", **out)
    print({k: (v.shape, float(np.abs(v).mean())) for k, v in out.items()})


if __name__ == "__main__":
    main()

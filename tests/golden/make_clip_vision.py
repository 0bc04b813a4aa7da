"""Outputs of PyTorch transformers' CLIPModel with tiny random encoders: python -m golden.make_clip_vision, in tests/

Recorded with torch 2.13.0 (CPU), transformers 5.24.0. Weights and images come from a numpy seed, here and in the tests,
so clip_vision.npz holds only outputs.
"""

import tempfile
from pathlib import Path

import numpy as np
from golden import make_clip
from golden.make_models import weights

TEXT = make_clip.G | {
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": len(make_clip.VOCAB),
    "num_hidden_layers": 1,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 13,  # not a multiple: the last row and column belong to no patch
    "patch_size": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
CONFIG = {"model_type": "clip", "projection_dim": 20, "text_config": TEXT, "vision_config": VISION}
PROMPTS = ["a photo depicts a cat", "the quick brown fox jumps over the lazy dog"]  # the last one is cut


def images() -> np.ndarray:
    """Normalised images [2, h, w, 3]."""
    size = VISION["image_size"]
    return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def picture() -> np.ndarray:
    """A photograph's stand-in, uint8 [h, w, 3]."""
    return np.random.default_rng(1).integers(0, 256, (40, 31, 3), np.uint8)


def main():
    """Run transformers and write clip_vision.npz next to this file."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    net = CLIPModel(CLIPConfig(**CONFIG)).eval()
    state = {name: x for name, x in net.named_parameters() if name != "logit_scale"}
    with torch.no_grad():
        for name, x in weights({name: tuple(x.shape) for name, x in state.items()}).items():
            state[name].copy_(torch.from_numpy(x))
        with tempfile.TemporaryDirectory() as folder:
            make_clip.write_tokenizer(f"{folder}/x", make_clip.END)
            tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/x")
        ids = tokenizer(
            PROMPTS, padding="max_length", max_length=make_clip.LENGTH, truncation=True, return_tensors="pt"
        )
        out = net(pixel_values=torch.from_numpy(images().transpose(0, 3, 1, 2)), **ids)
    size = {"shortest_edge": VISION["image_size"]}
    processor = CLIPImageProcessorPil(size=size, crop_size=VISION["image_size"])
    seen = processor(picture()[:31], return_tensors="np")["pixel_values"][0]
    found = {
        "image_embeds": out.image_embeds,
        "text_embeds": out.text_embeds,
        "cosines": (out.image_embeds * out.text_embeds).sum(-1),
    }
    found = {name: x.detach().numpy() for name, x in found.items()} | {"seen": np.moveaxis(np.asarray(seen), 0, -1)}
    names = sorted(state)
    np.savez_compressed(Path(__file__).parent / "clip_vision.npz", names=names, **found)
    print({name: x.shape for name, x in found.items()}, found["cosines"], len(names))


if __name__ == "__main__":
    main()

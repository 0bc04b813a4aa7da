"""Make the folder that configs/teacher_pocket.py starts from; users of the trained pocket pipeline need not.

python -m cddistill.precompute.make_pocket VAE OUTPUT    with VAE/vae/ as configs/autoencoder_pocket.py exports it

It has Stable Diffusion 1.x's layout: that VAE, a tokenizer trained on the captions of the training split, and a random
text encoder and UNet, with v-prediction and zero terminal SNR (Lin et al. 2024, arXiv:2305.08891).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers, trainers

from cddistill import checksums, data, io, models
from cddistill.diffusion import DDPM
from cddistill.models.clip import CLIPTextModel
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.models.schedulers import write_scheduler
from cddistill.models.tokenizer import END, POSITIONS, START, clip
from cddistill.net import count

VOCABULARY = 2048  # tokens
WIDTH = 128  # of the text encoder
PASSES, SCENES = 3, 3000  # passes over the icons; scenes, whose captions repeat a few words
TEXT_ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "projection_dim": WIDTH,
    "eos_token_id": VOCABULARY - 1,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 16, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [64, 96, 160], "layers_per_block": 1, "norm_num_groups": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],  # attention at 8 and 4 px
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": WIDTH, "attention_head_dim": 4,
}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
    "requires_safety_checker": False, "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def captions() -> list[str]:
    """Captions of the training split: every icon in random skin tones, PASSES times, and some scenes."""
    rng = np.random.default_rng(0)
    icons, scenes = (
        data.load(data.configure(source=name, size=8, num_classes=24), "train") for name in ("icons", "scenes")
    )
    rows = [icons.item(i, rng) for _ in range(PASSES) for i in range(len(icons))]
    return [row["caption"] for row in rows + [scenes.item(i, rng) for i in range(SCENES)]]


def train_tokenizer(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a byte-pair encoding in CLIP's format: bytes, bytes that end a word, merges, two ends."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    start = [*letters, *(letter + "</w>" for letter in letters)]
    untrained = clip({token: i for i, token in enumerate([*start, START, END])}, [])
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - len(start) - 2]
    tokens = [*start, *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """The files of transformers' CLIPTokenizer."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    io.write_json(folder / "vocab.json", vocabulary)
    io.write_atomic(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    io.write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS, "do_lower_case": True}
    io.write_json(folder / "tokenizer_config.json", special | settings)


def make(vae: Path, output: Path) -> None:
    """Write the pipeline folder."""
    shutil.copytree(vae / "vae", output / "vae", dirs_exist_ok=True)
    write_tokenizer(output / "tokenizer", *train_tokenizer(captions()))
    encoder = CLIPTextModel.from_config(TEXT_ENCODER)
    params = init_params_numpy(weight_shapes(encoder), 0)
    models.save(output, "text_encoder", params, encoder.to_config(), dtype=np.float32)
    schedule = DDPM(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_snr=True)
    unet = models.init(UNET, 0, schedule, "v")
    models.save(output, "unet", unet.params, unet.module.to_config(), dtype=np.float32)
    write_scheduler(output, schedule, "v")
    io.write_json(output / "model_index.json", INDEX)
    checksums.write_shipped(output)
    print(f"{output}: {unet}; a text encoder of {count(params)}")


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:3]))

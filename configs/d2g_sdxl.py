"""Diffusion2GAN from Stable Diffusion XL, text-to-image, one step. Not run here: needs accelerators.

    python -m cddistill.main --mode=pairs --config=configs/d2g_sdxl.py    first: 8 M pairs
    python -m cddistill.main --config=configs/d2g_sdxl.py

Needs the teacher's weights, encoded captions (--mode=encode) and the released latent LPIPS. Pairs, losses and batch
size are the paper's; learning rate, loss weights and steps are ours.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("d2g_sd15.py")))["get_config"]()  # and what differs:
    config.teacher = "stabilityai/stable-diffusion-xl-base-1.0"
    config.teacher_guidance = 7.0
    config.data.path = "data/laion_sdxl"
    config.data.pairs = "data/pairs_sdxl"
    config.num_pairs = 8_000_000
    config.method.metric = "weights/sdxl_latest_vgg16_tuned.pth"
    return config

"""Diffusion2GAN from Stable Diffusion 1.5, text-to-image, one step. Not run here: needs accelerators.

    python -m cddistill.main --mode=pairs --config=configs/d2g_sd15.py    first: 12 M pairs
    python -m cddistill.main --config=configs/d2g_sd15.py

Needs the teacher's weights, encoded captions (--mode=encode) and the released latent LPIPS. Pairs, losses and batch
size are the paper's; learning rate, loss weights and steps are ours.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("diffusion2gan")
    config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.teacher_steps = (50,)
    config.teacher_guidance = 8.0  # "SD-CFG-8"; 3 for "SD-CFG-3", with 3 million pairs
    config.data.source = "arrays"
    config.data.path = "data/laion_sd15"
    config.data.pairs = "data/pairs_sd15"
    config.num_pairs = 12_000_000
    config.pairs_batch = 1024
    config.steps = 100_000
    config.batch_size = 1024
    config.dtype = "bfloat16"
    config.remat = True
    config.fsdp = -1
    config.optim.lr = 1e-5
    config.optim.clip = 1.0
    config.method.metric = "weights/sd15_latest_vgg16_tuned.pth"
    config.method.warmup = 20_000
    config.method.r1_stride = 16  # one image on each of 64 devices
    config.sample_steps = (1,)
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 10_000
    return config

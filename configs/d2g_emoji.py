"""Diffusion2GAN: a one-step generator from pairs of noise and what the teacher's ODE makes of it.

    python -m cddistill.main --mode=pairs --config=configs/d2g_emoji.py   first: 2,048 pairs of the embedded teacher
    python -m cddistill.main --config=configs/d2g_emoji.py                emoji, class-conditional, one step
    ... --config=configs/d2g_emoji.py:cifar10                             the paper's runs; these need accelerators,
    ... --config=configs/d2g_emoji.py:sd15                                weights and pairs, and were not run here
    ... --config=configs/d2g_emoji.py:sdxl

The paper publishes its pairs, losses and batch size; learning rates, weights and all of the embedded variant are ours.
"""

from cddistill.config import defaults


def get_config(variant="emoji"):
    config = defaults("diffusion2gan")
    config.sample_steps = (1,)
    config.teacher_steps = (50,)
    config.optim.clip = 1.0
    if variant == "emoji":
        config.teacher = "emoji"
        config.teacher_guidance = 2.0
        config.data.pairs = "runs/pairs_emoji"
        config.pairs = 2048
        config.steps = 1000
        config.batch_size = 8
        config.optim.lr = 3e-4
        config.optim.warmup = 50
        config.method.regression = "lpips"
        config.method.warmup = 300
        config.method.ema_decay = 0.995
        config.eval_every = 250
        config.checkpoint_every = 500
        return config
    config.optim.lr = 1e-5
    config.dtype = "bfloat16"
    config.fsdp = -1
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 10_000
    if variant == "cifar10":  # regression alone, in pixels
        config.teacher = "weights/edm-cifar10-32x32-cond-vp"
        config.teacher_sampler = "heun"
        config.teacher_steps = (18,)
        config.data.source = "tfds"
        config.data.path = "cifar10"
        config.data.num_classes = 10
        config.data.pairs = "data/pairs_cifar10"
        config.pairs = 1_000_000
        config.pairs_batch = 1024
        config.steps = 100_000
        config.batch_size = 256
        config.method.regression = "lpips"
        config.method.gan_weight = 0.0
        return config
    if variant not in ("sd15", "sdxl"):
        raise ValueError(f"configs/d2g_emoji.py has no variant {variant!r}: known are emoji, cifar10, sd15, sdxl")
    config.data.source = "arrays"
    config.pairs_batch = 1024
    config.remat = True
    config.steps = 100_000
    config.batch_size = 1024
    config.method.r1_stride = 16  # one image on each of 64 devices
    config.method.warmup = 20_000
    if variant == "sd15":
        config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        config.teacher_guidance = 8.0  # "SD-CFG-8"; 3 for "SD-CFG-3", of which there were 3 million
        config.data.path = "data/laion_sd15"
        config.data.pairs = "data/pairs_sd15"
        config.pairs = 12_000_000
        config.method.metric = "weights/sd15_latest_vgg16_tuned.pth"
    else:
        config.teacher = "stabilityai/stable-diffusion-xl-base-1.0"
        config.teacher_guidance = 7.0
        config.data.path = "data/laion_sdxl"
        config.data.pairs = "data/pairs_sdxl"
        config.pairs = 8_000_000
        config.method.metric = "weights/sdxl_latest_vgg16_tuned.pth"
    return config

"""Diffusion2GAN from the embedded emoji teacher: class-conditional images in one step, from pairs of noise and x0.

    python -m cddistill.main --mode=pairs --config=configs/d2g_emoji.py    first: 2,048 pairs of the teacher
    python -m cddistill.main --config=configs/d2g_emoji.py

All values are ours.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("diffusion2gan")
    config.teacher = "emoji"
    config.teacher_steps = (50,)
    config.teacher_guidance = 2.0
    config.data.pairs = "runs/pairs_emoji"
    config.num_pairs = 2048
    config.steps = 1000
    config.batch_size = 8
    config.optim.lr = 3e-4
    config.optim.warmup = 50
    config.optim.clip = 1.0
    config.method.regression = "lpips"
    config.method.warmup = 300
    config.method.ema_decay = 0.995
    config.sample_steps = (1,)
    config.eval_every = 250
    config.checkpoint_every = 500
    return config

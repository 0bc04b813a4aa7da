"""The embedded teacher: a class-conditional v-prediction UNet of 3.1 M parameters on 32 px emoji, from random weights.

    python -m cddistill.main --config=configs/teacher_emoji.py

About 1.5 hours on 2 CPU cores. Hyper-parameters are ours; docs/results.md says how the shipped weights were made.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("diffusion")
    config.random_init = True
    config.steps = 8000
    config.batch_size = 32
    config.optim.lr = 1e-3
    config.optim.warmup = 300
    config.optim.decay = "cosine"
    config.method.ema_decay = 0.999
    config.method.ema_warmup = True
    config.method.guidance = 2.0
    config.sample_steps = (50,)
    config.log_every = 50
    config.eval_every = 500
    return config

"""Diffusion2GAN from the embedded pocket pipeline: 64 px icons and scenes from prompts in one step, with E-LatentLPIPS.

    python -m cddistill.main --config=configs/dmd2_pocket.py:encode --mode=encode --output=runs/pocket_embedded
    python -m cddistill.main --mode=pairs --config=configs/d2g_pocket.py                     then 4,096 pairs
    python -m cddistill.main --config=configs/d2g_pocket.py

All values are ours.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("diffusion2gan")
    config.teacher = "pocket"
    config.teacher_steps = (50,)
    config.teacher_guidance = 2.5
    config.data.source = "arrays"
    config.data.path = "runs/pocket_embedded"
    config.data.pairs = "runs/pairs_pocket"
    config.data.num_classes = 33
    config.num_pairs = 4096
    config.steps = 3000
    config.batch_size = 16
    config.optim.lr = 2e-4
    config.optim.warmup = 100
    config.optim.clip = 1.0
    config.method.metric = "pocket"
    config.method.warmup = 1000
    config.method.ema_decay = 0.998
    config.sample_steps = (1,)
    config.eval_every = 500
    config.checkpoint_every = 500
    config.eval_images = 1000
    return config

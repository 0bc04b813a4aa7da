"""The baseline that CoDi is compared with: the same network and data, fine-tuned as a conditional diffusion model.

python -m cddistill.main --config=configs/finetune_sr.py       emoji 8 px -> 32 px; 7 minutes on 2 CPU cores;
                                                                   50 steps: LPIPS-VGG 0.191
"""

from cddistill.config import defaults


def get_config():
    config = defaults("diffusion")
    config.method.adapter = "controlnet"
    config.data.task = "sr"
    config.steps = 4000
    config.batch_size = 4
    config.optim.lr = 1e-3
    config.optim.warmup = 50
    config.optim.decay = "cosine"
    config.method.ema_decay = 0.995
    config.sample_steps = (4, 8, 50)
    config.checkpoint_every = 1000
    config.eval_every = 500
    return config

"""DMD2 on ImageNet 64 x 64, class-conditional, one step (the paper's table 1). Not run here: needs accelerators.

    python -m cddistill.main --config=configs/dmd2_imagenet64.py

Needs EDM's weights (a state dict with a config.json) and the images as arrays. Values are the paper's and its released
code's.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("dmd2")
    config.teacher = "weights/edm-imagenet-64x64-cond-adm"
    config.data.source = "arrays"
    config.data.path = "data/imagenet64"
    config.data.num_classes = 1000
    config.steps = 200_000
    config.batch_size = 280
    config.dtype = "bfloat16"
    config.remat = True
    config.fsdp = -1
    config.optim.lr = 2e-6
    config.optim.warmup = 72
    config.optim.student.warmup = 15  # its updates in 72 steps: the released schedule counts all steps
    config.optim.weight_decay = 1e-2
    config.optim.clip = 10.0
    config.sample_steps = (1,)
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 10_000
    return config

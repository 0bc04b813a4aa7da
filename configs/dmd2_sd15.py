"""DMD2 from Stable Diffusion 1.5, text-to-image, one step (the paper's table 3). Not run here: needs accelerators.

    python -m cddistill.main --config=configs/dmd2_sd15.py

Needs the teacher's weights and encoded data (--mode=encode). Values are the paper's and its released code's. This is
the first stage; the second has 2,000 more steps with optim.lr=5e-7 and method.gan_weight=1e-3, by init_from_run.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("dmd2")
    config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.data.source = "arrays"
    config.data.path = "data/laion_sd15"
    config.steps = 40_000
    config.batch_size = 2048
    config.accumulate = 1  # micro-batches; raise it where a batch does not fit the devices
    config.dtype = "bfloat16"
    config.remat = True
    config.fsdp = -1
    config.optim.lr = 1e-5
    config.optim.warmup = 8
    config.optim.student.warmup = 1  # its updates in 8 steps: the released schedule counts all steps
    config.optim.weight_decay = 1e-2
    config.optim.clip = 10.0
    config.method.ratio = 10
    config.method.real_guidance = 1.75
    config.method.gan_weight = 0.0
    config.method.dm_float32 = "fake"
    config.sample_steps = (1,)
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 10_000
    return config

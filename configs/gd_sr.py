"""Guided progressive distillation (gd) of a conditional teacher, "GD-II" in CoDi's tables, and of Stable Diffusion.

    python -m cddistill.main --config=configs/gd_sr.py             emoji 8 px -> 32 px: the fine-tuned super-resolution
                                                                   network's 32 steps become 16, 8 and 4
    python -m cddistill.main --config=configs/gd_sr.py:sd15        Stable Diffusion 1.5, text-to-image, with guidance;
                                                                   needs accelerators, weights and encoded data

Not measured yet. Learning rates, batch sizes and the lengths of stages are ours.
"""

from cddistill.config import defaults


def get_config(variant="emoji"):
    config = defaults("gd")
    config.optim.decay = "linear"  # in each stage anew, as in published code
    config.sample_steps = (4,)
    if variant == "emoji":
        config.teacher = config.controlnet = config.baseline = "emoji_sr"
        config.data.task = "sr"
        config.method.adapter = "controlnet"
        config.method.guidance_range = (1.0, 1.0)
        config.method.embedding_width = 0
        config.method.first_steps = 32
        config.method.halvings = config.optim.cycles = 3
        config.method.halve_every = config.eval_every = 1000
        config.steps = 3000
        config.batch_size = 4
        config.optim.lr = 2e-4
    elif variant == "sd15":
        config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        config.data.source = "arrays"
        config.data.path = "data/laion_sd15"
        config.method.halve_every = config.eval_every = config.checkpoint_every = 5000
        config.optim.cycles = 5  # guidance, then 32, 16, 8 and 4 steps
        config.steps = 25_000
        config.batch_size = 512
        config.fsdp = -1
        config.dtype = "bfloat16"
        config.remat = True
        config.optim.lr = 1e-5
        config.eval_images = 10_000
    else:
        raise ValueError(f"configs/gd_sr.py has no variant {variant!r}: emoji, sd15")
    return config

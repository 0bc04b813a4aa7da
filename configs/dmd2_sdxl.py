"""DMD2 from Stable Diffusion XL, text-to-image. Not run here: needs accelerators.

    python -m cddistill.main --config=configs/dmd2_sdxl.py         four steps (the paper's table 2)
    python -m cddistill.main --config=configs/dmd2_sdxl.py:one     one step
    python -m cddistill.main --config=configs/dmd2_sdxl.py:lora    four steps; student and critic are LoRAs of one base

Needs the teacher's weights and encoded data (--mode=encode). Values are the paper's and its released code's.
"""

from cddistill.config import defaults

STEPS = {"four": 20_000, "one": 25_000, "lora": 16_000}


def get_config(variant="four"):
    if variant not in STEPS:
        raise ValueError(f"configs/dmd2_sdxl.py has no variant {variant!r}: known are {', '.join(STEPS)}")
    config = defaults("dmd2")
    config.teacher = "stabilityai/stable-diffusion-xl-base-1.0"
    config.data.source = "arrays"
    config.data.path = "data/laion_sdxl"
    config.steps = STEPS[variant]
    config.batch_size = 128
    config.dtype = "bfloat16"
    config.remat = True
    config.fsdp = -1
    config.optim.lr = 5e-5 if variant == "lora" else 5e-7
    config.optim.warmup = 8
    config.optim.student.warmup = 2  # its updates in 8 steps: the released schedule counts all steps
    config.optim.weight_decay = 1e-2
    config.optim.clip = 10.0
    config.method.real_guidance = 8.0
    config.method.gan_weight = 5e-3
    config.method.dm_float32 = "fake"
    config.method.student_timesteps = (399,) if variant == "one" else (999, 749, 499, 249)
    config.sample_steps = (1,) if variant == "one" else (4,)
    if variant == "lora":
        config.method.student_lora = "blocks"
        config.method.fake_lora = "blocks"  # ours: the paper's critic trains as a whole
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 10_000
    return config

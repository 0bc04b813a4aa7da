"""CoDi canny-to-image (ccd: conditional diffusion distillation): from an unconditional teacher to a 1-4-step student.

    python -m cddistill.main --config=configs/ccd_canny.py         64 px icons and scenes, embedded pocket pipeline
    python -m cddistill.main --config=configs/ccd_canny.py:pe      PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_canny.py:sd21    PE-CoDi of Stable Diffusion 2.1 as the released code
                                                                   has it, 512 px; needs accelerators, weights, data

Edges are Canny's, with random blur and thresholds in training. :sd21 has the values of the released code's README,
without its loss with guidance; how many devices shared its batch is not known. The other values are ours.
"""

from cddistill.config import defaults

VARIANTS = ("pocket", "pe", "sd21")


def get_config(variant="pocket"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/ccd_canny.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("codi")
    config.data.task = "canny"
    config.method.freeze_backbone = variant != "pocket"
    config.method.text_dropout = 0.1
    if variant == "sd21":
        config.teacher = "stabilityai/stable-diffusion-2-1"  # or the path of its folder
        config.data.source = "folder"
        config.data.path = "data/diffusiondb"
        config.data.size = 512
        config.encode_sample = True
        config.steps = 200_000
        config.batch_size = 32  # 4 on each of 8 devices
        config.accumulate = 2
        config.fsdp = -1
        config.dtype = "bfloat16"
        config.remat = True
        config.optim.lr = 8e-6
        config.optim.warmup = 0
        config.optim.weight_decay = 1e-2  # the released code's AdamW
        config.method.preset = "released"
        config.method.grid_size = 20
        config.method.delta_t = 50
        config.optim.clip = 1.0
        config.method.ema_decay = 0.99995
        config.checkpoint_every = config.eval_every = 2000
        config.eval_images = 10_000
        return config
    config.teacher = "pocket"
    config.data.source = "mixture"  # icons and scenes
    config.data.size = 64
    config.data.num_classes = 33
    config.data.flip = False  # letters and arrows have a direction
    config.steps = 4000
    config.batch_size = 8
    config.optim.lr = 5e-4
    config.optim.warmup = 50
    config.optim.decay = "cosine"
    config.method.ema_decay = 0.995
    config.method.shared_t = False  # with so few images a step, one t for all is too noisy
    config.eval_every = config.checkpoint_every = 500
    config.eval_images = 500
    return config

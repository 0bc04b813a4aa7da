"""CoDi depth-to-image (ccd: conditional diffusion distillation): from an unconditional teacher to a 1-4-step student.

    python -m cddistill.main --config=configs/ccd_depth.py         64 px scenes, exact depth, embedded pocket pipeline
    python -m cddistill.main --config=configs/ccd_depth.py:pe      PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_depth.py:sd21    PE-CoDi of Stable Diffusion 2.1, 512 px, images and
                                                                   depth maps; needs accelerators, weights and data

The condition is inverse depth, normalised per image. The paper (PE-CoDi on WebLI, which is not public, with MiDaS-type
depth) gives neither learning rate, batch size nor number of steps; those values are ours.
"""

from cddistill.config import defaults

VARIANTS = ("pocket", "pe", "sd21")


def get_config(variant="pocket"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/ccd_depth.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("codi")
    config.data.task = "depth"
    config.method.freeze_backbone = variant != "pocket"
    config.method.text_dropout = 0.1
    if variant == "sd21":
        config.teacher = "stabilityai/stable-diffusion-2-1"  # or the path of its folder
        config.data.source = "folder"
        config.data.path = "data/depth"
        config.data.size = 512
        config.encode_sample = True
        config.steps = 200_000
        config.batch_size = 256
        config.fsdp = -1
        config.dtype = "bfloat16"
        config.remat = True
        config.optim.lr = 1e-5
        config.optim.warmup = 1000
        config.optim.weight_decay = 1e-2  # the released code's AdamW
        config.method.ema_decay = 0.9999
        config.checkpoint_every = config.eval_every = 2000
        config.eval_images = 10_000
        return config
    config.teacher = "pocket"
    config.data.source = "scenes"
    config.data.size = 64
    config.data.num_classes = 24
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

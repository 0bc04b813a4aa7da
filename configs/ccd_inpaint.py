"""CoDi inpainting (ccd: conditional diffusion distillation): from an unconditional teacher to a 1-4-step student.

    python -m cddistill.main --config=configs/ccd_inpaint.py         64 px icons and scenes, embedded pocket pipeline
    python -m cddistill.main --config=configs/ccd_inpaint.py:pe      PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_inpaint.py:sd15    PE-CoDi of Stable Diffusion 1.5, ImageNet, 512 px;
                                                                     needs accelerators, weights and data

Holes are unions of 1 to 3 rectangles, as in the paper's figure; --config.data.hole=brush or half are others. The first
one's condition enters as further input channels, in latent space: in as few updates as a CPU makes, a branch does not
learn to pass the known pixels on (docs/results.md). --config.method.adapter=controlnet is the paper's. The paper gives
neither its masks nor learning rate, batch size and number of steps; those values are ours.
"""

from cddistill.config import defaults

VARIANTS = ("pocket", "pe", "sd15")


def get_config(variant="pocket"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/ccd_inpaint.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("codi")
    config.data.task = "inpaint"
    config.method.freeze_backbone = variant != "pocket"
    config.method.text_dropout = 0.1
    if variant == "sd15":
        config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # or the path of its folder
        config.data.source = "folder"
        config.data.path = "data/imagenet"
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
    config.method.adapter = "concat" if variant == "pocket" else "controlnet"
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

"""CoDi canny-to-image (ccd: conditional diffusion distillation): from an unconditional teacher to a 1-4-step student.

    python -m cddistill.main --config=configs/ccd_canny.py         64 px icons and scenes, embedded pocket pipeline
    python -m cddistill.main --config=configs/ccd_canny.py:pe      PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_canny.py:sd21    PE-CoDi of Stable Diffusion 2.1 as the released code
                                                                   has it, 512 px; needs accelerators, weights, data

Edges are Canny's, with random blur and thresholds in training. :sd21 has the values of the released code's README,
without its loss with guidance; how many devices shared its batch is not known. The other values are ours.
"""

import pathlib
import runpy

VARIANTS = ("pocket", "pe", "sd21")


def get_config(variant="pocket"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/ccd_canny.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    inpainting = runpy.run_path(str(pathlib.Path(__file__).with_name("ccd_inpaint.py")))["get_config"]
    config = inpainting(variant.replace("sd21", "sd15"))  # whose values are these, too, but for what follows
    config.data.task = "canny"
    if variant == "sd21":
        config.teacher = "stabilityai/stable-diffusion-2-1"  # or the path of its folder
        config.data.path = "data/diffusiondb"
        config.batch_size = 32  # 4 on each of 8 devices
        config.accumulate = 2
        config.optim.lr = 8e-6
        config.optim.warmup = 0
        config.optim.clip = 1.0
        config.method.preset = "released"
        config.method.grid_size = 20
        config.method.delta_t = 50
        config.method.ema_decay = 0.99995
    return config

"""CoDi depth-to-image (ccd: conditional diffusion distillation): from an unconditional teacher to a 1-4-step student.

    python -m cddistill.main --config=configs/ccd_depth.py         64 px scenes, exact depth, embedded pocket pipeline
    python -m cddistill.main --config=configs/ccd_depth.py:pe      PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_depth.py:sd21    PE-CoDi of Stable Diffusion 2.1, 512 px, images and
                                                                   depth maps; needs accelerators, weights and data

The condition is inverse depth, normalised per image. The paper (PE-CoDi on WebLI, which is not public, with MiDaS-type
depth) gives neither learning rate, batch size nor number of steps; those values are ours.
"""

import pathlib
import runpy

VARIANTS = ("pocket", "pe", "sd21")


def get_config(variant="pocket"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/ccd_depth.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    inpainting = runpy.run_path(str(pathlib.Path(__file__).with_name("ccd_inpaint.py")))["get_config"]
    config = inpainting(variant.replace("sd21", "sd15"))  # whose values are these, too, but for teacher and data
    config.data.task = "depth"
    if variant == "sd21":
        config.teacher = "stabilityai/stable-diffusion-2-1"  # or the path of its folder
        config.data.path = "data/depth"
    else:
        config.data.source = "scenes"
        config.data.num_classes = 24
        config.data.flip = True
    return config

"""CoDi editing by instruction (ccd: conditional diffusion distillation): from an unconditional teacher to 1-4 steps.

    python -m cddistill.main --config=configs/ccd_edit.py         64 px icons and scenes, embedded pocket pipeline
    python -m cddistill.main --config=configs/ccd_edit.py:pe      PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_edit.py:sd15    Stable Diffusion 1.5, InstructPix2Pix's data, 256 px;
                                                                  needs accelerators, weights and data

The text is the instruction: "make the red ball blue", "redraw it in noto style". The paper shows this task in pictures
only and gives neither learning rate, batch size nor number of steps; those values are ours.
"""

import pathlib
import runpy

VARIANTS = ("pocket", "pe", "sd15")


def get_config(variant="pocket"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/ccd_edit.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    inpainting = runpy.run_path(str(pathlib.Path(__file__).with_name("ccd_inpaint.py")))["get_config"]
    config = inpainting(variant)  # whose values are these, too, but for the data
    config.data.task = "edit"
    config.method.freeze_backbone = variant == "pe"
    if variant == "sd15":
        config.data.path = "data/instructpix2pix"
        config.data.size = 256  # as InstructPix2Pix was trained
    else:
        config.data.mixture = ("icon_edits", "scenes")
    return config

"""The baseline of the tasks on the pocket pipeline: the teacher, fine-tuned with the condition but not distilled.

    python -m cddistill.main --config=configs/finetune_pocket.py:inpaint      or edit, depth, canny, sr

Data and number of updates are those of configs/ccd_inpaint.py and so on. All values are ours.
"""

import pathlib
import runpy

from cddistill.config import defaults

VARIANTS = ("inpaint", "edit", "depth", "canny", "sr")


def get_config(task="inpaint"):
    if task not in VARIANTS:
        raise ValueError(f"configs/finetune_pocket.py has no variant {task!r}: known are {', '.join(VARIANTS)}")
    student = runpy.run_path(str(pathlib.Path(__file__).with_name(f"ccd_{task}.py")))["get_config"]("pocket")
    config = defaults("diffusion")
    for name, value in student.items():
        if name != "method":
            config[name] = value
    config.method.adapter = student.method.adapter
    config.method.ema_decay = student.method.ema_decay
    config.method.text_dropout = student.method.text_dropout
    config.sample_steps = (4, 8, 50)
    return config

"""LCM as the second of two stages, CoDi's "CM-II": the fine-tuned network of configs/finetune_pocket.py is distilled.

    python -m cddistill.main --config=configs/finetune_pocket.py:inpaint
    python -m cddistill.main --config=configs/finetune_pocket.py:inpaint --mode=export --output=runs/finetuned_inpaint
    python -m cddistill.main --config=configs/lcm_pocket.py:inpaint           or edit, depth, canny, sr

Data and number of updates are those of configs/ccd_inpaint.py and so on. All values are ours.
"""

import pathlib
import runpy

from cddistill.config import defaults

FINETUNED = runpy.run_path(str(pathlib.Path(__file__).with_name("finetune_pocket.py")))
VARIANTS = FINETUNED["VARIANTS"]


def get_config(task="inpaint"):
    tuned = FINETUNED["get_config"](task)
    config = defaults("lcm")
    for name, value in tuned.items():
        if name != "method":
            config[name] = value
    config.teacher = f"runs/finetuned_{task}"
    config.method.adapter = tuned.method.adapter
    config.method.embedding_width = 0
    config.method.guidance_range = (1.0, 1.0)  # as CoDi's student, which is sampled without guidance
    config.method.guidance = 1.0
    config.method.ema_decay = tuned.method.ema_decay
    config.sample_steps = (1, 2, 4)
    return config

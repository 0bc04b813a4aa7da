"""A few-step student made elsewhere, evaluated or sampled beside ours: LCM, SDXL-Turbo, DMD2 or any diffusers folder.

    python -m cddistill.main --mode=evaluate --config=configs/pretrained.py --config.teacher=FOLDER
    python -m cddistill.main --mode=sample --config=configs/pretrained.py --output=sheet.png    the embedded teacher

It is sampled as its scheduler/scheduler_config.json says. Images that it is compared with
are encoded by its own VAE, and captions by its text encoders: --config.data.source=folder --config.data.path=IMAGES.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("pretrained")
    config.method.scheduler = config.get_oneway_ref("teacher")
    config.sample_steps = (4, 50)
    return config

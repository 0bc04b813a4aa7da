"""CoDi super-resolution (ccd: conditional diffusion distillation): from an unconditional teacher to a 1-4-step student.

    python -m cddistill.main --config=configs/ccd_sr.py            emoji 8 px -> 32 px; 7 minutes on 2 CPU cores;
                                                                   2 steps: LPIPS-VGG 0.208 (the same network, not
                                                                   distilled: 0.221; bicubic 0.345)
    python -m cddistill.main --config=configs/ccd_sr.py:pe         PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_sr.py:pocket     icons and scenes 16 px -> 64 px, embedded pocket
                                                                   pipeline; :pocket_pe is its PE-CoDi
    python -m cddistill.main --config=configs/ccd_sr.py:sd21       Stable Diffusion 2.1, 128 px -> 512 px; needs
                                                                   accelerators, weights and DF2K in data/df2k

The first one's distance d_x is a LatentLPIPS of emoji (ours): one and two steps become sharper, at 1 to 2 dB of PSNR.
--config.method.signal=l2 is the paper's. The paper gives neither learning rate, batch size, number of steps nor
prompts; what is here is ours. :sd21 trains on random crops of the images as they are, each degraded anew in every
epoch (Real-ESRGAN).
"""

import pathlib
import runpy

from cddistill.config import defaults

VARIANTS = ("emoji", "pe", "pocket", "pocket_pe", "sd21")
LIKE_INPAINTING = {"pocket": "pocket", "pocket_pe": "pe", "sd21": "sd15"}  # to that config's variants


def get_config(variant="emoji"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/ccd_sr.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    if variant in LIKE_INPAINTING:
        inpainting = runpy.run_path(str(pathlib.Path(__file__).with_name("ccd_inpaint.py")))["get_config"]
        config = inpainting(LIKE_INPAINTING[variant])  # whose values are these, too, but for what follows
        config.data.task = "sr"
        if variant == "sd21":
            config.teacher = "stabilityai/stable-diffusion-2-1"  # or the path of its folder
            config.data.path = "data/df2k"
            config.data.crop = "random"
            config.data.degradation = "realesrgan"
            config.eval_images = 3000  # the paper's number of pairs
            config.method.freeze_backbone = False
            config.method.text_dropout = 0.0
        return config
    config = defaults("codi")
    config.data.task = "sr"
    config.optim.warmup = 50
    config.method.freeze_backbone = variant == "pe"
    config.optim.decay = "cosine"
    config.method.ema_decay = 0.995
    config.method.shared_t = False  # with so few images a step, one t for all is too noisy
    config.method.text_dropout = 0.1  # the class or prompt is often unknown when the student is used
    config.teacher = "emoji"
    config.steps = 3000
    config.batch_size = 4  # on a CPU, the number of updates matters more than the batch
    config.optim.lr = 1e-3
    config.method.grid_power = 2.5  # chosen on the validation split
    config.eval_every = 250
    config.checkpoint_every = 500
    config.baseline = "emoji_sr"
    if variant == "emoji":
        config.method.signal = "latent_lpips"
        config.method.metric = "emoji"
        config.sample_steps = (1, 2)
        config.baseline_steps = (1, 2, 50)
    return config

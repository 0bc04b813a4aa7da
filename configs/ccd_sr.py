"""CoDi super-resolution (ccd: conditional diffusion distillation): from an unconditional teacher to a 1-4-step student.

    python -m cddistill.main --config=configs/ccd_sr.py            emoji 8 px -> 32 px; 7 minutes on 2 CPU cores;
                                                                   4 steps: LPIPS-VGG 0.195 (bicubic 0.345)
    python -m cddistill.main --config=configs/ccd_sr.py:pe         PE-CoDi: only the condition branch trains
    python -m cddistill.main --config=configs/ccd_sr.py:sd21       Stable Diffusion 2.1, 512 px; needs accelerators
    and weights

The paper gives neither learning rate, batch size nor number of steps; those values are ours.
"""

from cddistill.config import defaults


def get_config(variant="emoji"):
    config = defaults("codi")
    config.data.task = "sr"
    config.optim.warmup = 50
    if variant in ("emoji", "pe"):
        config.method.freeze_backbone = variant == "pe"
        config.teacher = "emoji"
        config.steps = 3000
        config.batch_size = 4  # on a CPU, the number of updates matters more than the batch
        config.optim.lr = 1e-3
        config.optim.decay = "cosine"
        config.method.ema_decay = 0.995
        config.method.shared_t = False  # with so few images a step, one t for all is too noisy
        config.method.grid_power = 2.5  # chosen on the validation split
        config.method.text_dropout = 0.1  # the class is often unknown when the student is used
        config.eval_every = 250
        config.checkpoint_every = 500
        config.baseline = "emoji_sr"
    elif variant == "sd21":
        config.teacher = "stabilityai/stable-diffusion-2-1"  # or the path of its folder
        config.data.source = "arrays"  # latents, text embeddings and conditions computed beforehand
        config.data.path = "data/df2k_sd21"
        config.data.degradation = "realesrgan"
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
        config.checkpoint_every = 2000
        config.eval_every = 2000
        config.eval_images = 3000  # the paper's number of pairs
    else:
        raise ValueError(f"configs/ccd_sr.py has no variant {variant!r}: emoji, pe, sd21")
    return config

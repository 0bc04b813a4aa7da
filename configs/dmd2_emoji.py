"""DMD2: one- and four-step generators without regression pairs, by matching the teacher's scores and a diffusion GAN.

    python -m cddistill.main --config=configs/dmd2_emoji.py               emoji, class-conditional, one step
    python -m cddistill.main --config=configs/dmd2_emoji.py:four          the same in four steps, backward simulation
    python -m cddistill.main --config=configs/dmd2_emoji.py:imagenet64    the paper's runs; these need accelerators,
    python -m cddistill.main --config=configs/dmd2_emoji.py:sd15          weights and encoded data, and were not run
    python -m cddistill.main --config=configs/dmd2_emoji.py:sdxl          here
    python -m cddistill.main --config=configs/dmd2_emoji.py:sdxl_one
    python -m cddistill.main --config=configs/dmd2_emoji.py:sdxl_lora

Steps count critic updates, as the paper's do; the student has one in method.ratio. Values of the embedded variants are
ours, those of the others the paper's and its released code's.
"""

from cddistill.config import defaults


def get_config(variant="emoji"):
    config = defaults("dmd2")
    config.optim.weight_decay = 1e-2
    config.optim.clip = 10.0
    if variant in ("emoji", "four"):
        config.teacher = "emoji"
        config.teacher_steps = (50,)
        config.teacher_guidance = 2.0
        config.steps = 1500
        config.batch_size = 8
        config.optim.lr = 3e-4
        config.optim.warmup = 50
        config.method.real_guidance = 2.0
        config.method.ema_decay = 0.995
        config.eval_every = 250
        config.checkpoint_every = 500
        config.method.times = (999,) if variant == "emoji" else (999, 749, 499, 249)
        config.sample_steps = (1,) if variant == "emoji" else (1, 2, 4)
        return config
    config.data.source = "arrays"
    config.dtype = "bfloat16"
    config.remat = True
    config.fsdp = -1
    config.sample_steps = (1,)
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 10_000
    if variant == "imagenet64":
        config.teacher = "weights/edm-imagenet-64x64-cond-adm"
        config.data.path = "data/imagenet64"
        config.data.num_classes = 1000
        config.steps = 200_000
        config.batch_size = 280
        config.optim.lr = 2e-6
        config.optim.warmup = 72
    elif variant == "sd15":
        config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        config.data.path = "data/laion_sd15"
        config.steps = 40_000
        config.batch_size = 2048
        config.optim.lr = 1e-5
        config.optim.warmup = 8
        config.method.ratio = 10
        config.method.real_guidance = 1.75
        config.method.gan_weight = 0.0  # its second stage: 2,000 more at lr 5e-7 with gan_weight 1e-3
    elif variant in ("sdxl", "sdxl_one", "sdxl_lora"):
        config.teacher = "stabilityai/stable-diffusion-xl-base-1.0"
        config.data.path = "data/laion_sdxl"
        config.steps = {"sdxl": 20_000, "sdxl_one": 25_000, "sdxl_lora": 16_000}[variant]
        config.batch_size = 128
        config.optim.lr = 5e-5 if variant == "sdxl_lora" else 5e-7
        config.optim.warmup = 8
        config.method.real_guidance = 8.0
        config.method.gan_weight = 5e-3
        config.method.times = (399,) if variant == "sdxl_one" else (999, 749, 499, 249)
        config.sample_steps = (1,) if variant == "sdxl_one" else (4,)
        if variant == "sdxl_lora":
            config.method.student_lora = "blocks"
            config.method.fake_lora = "blocks"  # ours: the paper's critic trains as a whole
    else:
        known = "emoji, four, imagenet64, sd15, sdxl, sdxl_one, sdxl_lora"
        raise ValueError(f"configs/dmd2_emoji.py has no variant {variant!r}: {known}")
    return config

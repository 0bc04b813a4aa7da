"""A latent LPIPS for Stable Diffusion 1.5's VAE, about as published ones were made. Not run here: needs accelerators.

    python -m cddistill.main --config=configs/latent_lpips_sd15.py          100 epochs of ImageNet's labels
    python -m cddistill.main --config=configs/latent_lpips_sd15.py:judge    starts from the weights of the first

For another VAE, change config.teacher (a folder with vae/ is enough), method.family and data.path.
"""

from cddistill.config import defaults

VARIANTS = ("classify", "judge")


def get_config(variant="classify"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/latent_lpips_sd15.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("latent_lpips")
    config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.method.stage = variant
    config.method.classes = config.data.get_oneway_ref("num_classes")
    config.method.family = "sd15"
    config.data.source = "folder"
    config.data.path = "data/imagenet"  # with "label" in its metadata.jsonl
    config.data.num_classes = 1000
    config.data.size = 512
    config.fsdp = -1
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 1000
    if variant == "classify":
        config.batch_size = 512
        config.steps = 250_000  # 100 epochs
        config.optim.lr = 1e-3  # ours: published ones take 0.1 by SGD
        config.optim.decay = "cosine"
        config.optim.weight_decay = 1e-4
        config.optim.warmup = 2000
    else:
        config.init_from_run = "runs/latent_lpips_sd15"
        config.batch_size = 64
        config.steps = 30_000  # as many triplets as ten epochs of BAPPS
        config.optim.lr = 1e-4
        config.optim.decay = "linear"
        config.optim.betas = (0.5, 0.999)
    return config

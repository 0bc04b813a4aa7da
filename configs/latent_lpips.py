"""A latent LPIPS of one's own: classification on latents, then heads that answer as pixel LPIPS-VGG does.

    python -m cddistill.main --config=configs/latent_lpips.py          of 32 px emoji themselves; minutes on a CPU
    python -m cddistill.main --config=configs/latent_lpips.py:judge    goes on from the weights of the first
    python -m cddistill.main --mode=export --config=configs/latent_lpips.py:judge --output=emoji.safetensors
    ... --config=configs/latent_lpips.py:sd15                          Stable Diffusion's VAE, about as published ones
    ... --config=configs/latent_lpips.py:sd15_judge                    were made; needs accelerators, was not run here

For another VAE, change config.teacher (a folder with vae/ in it is enough), method.family and data.path of :sd15.
"""

from cddistill.config import defaults


def get_config(variant="emoji"):
    if variant not in ("emoji", "judge", "sd15", "sd15_judge"):
        known = "emoji, judge, sd15, sd15_judge"
        raise ValueError(f"configs/latent_lpips.py has no variant {variant!r}: known are {known}")
    config = defaults("latent_lpips")
    config.method.classes = config.data.get_ref("num_classes")
    if variant.endswith("judge"):
        config.method.stage = "judge"
        config.optim.decay = "linear"
        config.optim.betas = (0.5, 0.999)
    else:
        config.optim.decay = "cosine"
    if variant in ("emoji", "judge"):
        config.method.family = "emoji"
        config.method.width = 16
        config.method.pools = (1, 2, 3, 4)  # pixel LPIPS's
        config.checkpoint_every = 200
        if variant == "emoji":
            config.steps = 600
            config.optim.lr = 2e-3
            config.optim.warmup = 50
            config.optim.weight_decay = 1e-2
            return config
        config.start_from = "runs/latent_lpips"
        config.steps = 200
        config.method.tune = True  # False moves the heads alone, as published ones were made: then optim.lr=1e-2
        config.optim.lr = 1e-3
        return config
    config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.method.family = "sd15"
    config.data.source = "folder"
    config.data.path = "data/imagenet"  # with "label" in its metadata.jsonl
    config.data.num_classes = 1000
    config.data.size = 512
    config.fsdp = -1
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 1000
    if variant == "sd15":
        config.batch_size = 512
        config.steps = 250_000  # 100 epochs
        config.optim.lr = 1e-3  # ours: published ones take 0.1 by SGD
        config.optim.weight_decay = 1e-4
        config.optim.warmup = 2000
        return config
    config.start_from = "runs/latent_lpips-sd15"
    config.batch_size = 64
    config.steps = 30_000  # as many triplets as ten epochs of BAPPS
    config.optim.lr = 1e-4
    return config

"""A latent LPIPS for one's own autoencoder: classification on latents, then heads fitted to pixel LPIPS-VGG's answers.

python -m cddistill.main --config=configs/latent_lpips.py          on 32 px emoji themselves; minutes on a CPU
python -m cddistill.main --config=configs/latent_lpips.py:judge    starts from the weights of the first
python -m cddistill.main --mode=export --config=configs/latent_lpips.py:judge --output=emoji.safetensors
"""

from cddistill.config import defaults

VARIANTS = ("classify", "judge")


def get_config(variant="classify"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/latent_lpips.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("latent_lpips")
    config.method.stage = variant
    config.method.classes = config.data.get_oneway_ref("num_classes")
    config.method.family = "emoji"
    config.method.width = 16
    config.method.pools = (1, 2, 3, 4)  # pixel LPIPS's
    config.checkpoint_every = 200
    if variant == "classify":
        config.steps = 600
        config.optim.lr = 2e-3
        config.optim.warmup = 50
        config.optim.decay = "cosine"
        config.optim.weight_decay = 1e-2
    else:
        config.init_from_run = "runs/latent_lpips"
        config.steps = 200
        config.method.tune = True  # False trains the heads alone, as published ones were: then optim.lr=1e-2
        config.optim.lr = 1e-3
        config.optim.decay = "linear"
        config.optim.betas = (0.5, 0.999)
    return config

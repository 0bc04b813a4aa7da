"""The latent LPIPS of the embedded pocket pipeline's VAE, on icons and scenes. All values are ours.

python -m cddistill.main --config=configs/latent_lpips_pocket.py          classify
python -m cddistill.main --config=configs/latent_lpips_pocket.py:judge    starts from the weights of the first
python -m cddistill.main --mode=export --config=configs/latent_lpips_pocket.py:judge --output=latent_lpips.safetensors
"""

from cddistill.config import defaults

VARIANTS = ("classify", "judge")


def get_config(variant="classify"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/latent_lpips_pocket.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("latent_lpips")
    config.teacher = "pocket"
    config.data.source = "mixture"
    config.data.size = 64
    config.data.num_classes = 33
    config.method.stage = variant
    config.method.classes = config.data.get_oneway_ref("num_classes")
    config.method.family = "pocket"
    config.method.width = 16  # 3.7 MB
    config.eval_images = 200
    config.checkpoint_every = 200
    if variant == "classify":
        config.batch_size = 64
        config.steps = 600
        config.optim.lr = 2e-3
        config.optim.warmup = 50
        config.optim.decay = "cosine"
        config.optim.weight_decay = 1e-2
    else:
        config.init_from_run = "runs/latent_lpips_pocket"
        config.batch_size = 16
        config.steps = 300
        config.method.tune = True
        config.optim.lr = 1e-3
        config.optim.decay = "linear"
        config.optim.betas = (0.5, 0.999)
    return config

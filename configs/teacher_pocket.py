"""The pocket pipeline's UNet and text encoder: 64 px icons and scenes from prompts, on latents, from random weights.

    launch/pocket.sh                                      everything, from the VAE on; or one by one:
    python -m cddistill.precompute.make_pocket runs/pocket_vae runs/pocket_start
    python -m cddistill.main --config=configs/teacher_pocket.py:encode --mode=encode --output=runs/pocket_latents
    python -m cddistill.main --config=configs/teacher_pocket.py
    python -m cddistill.main --config=configs/teacher_pocket.py --mode=export --output=runs/pocket

The VAE in runs/pocket_vae is that of configs/autoencoder_pocket.py. All values are ours.
"""

from cddistill.config import defaults

VARIANTS = ("train", "encode")


def get_config(variant="train"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/teacher_pocket.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("diffusion")
    config.teacher = "runs/pocket_start"
    config.method.train_text_encoder = True
    config.method.guidance = 4.0
    config.method.ema_decay = 0.9995
    config.method.ema_warmup = True
    config.data.num_classes = 33
    if variant == "encode":
        config.data.source = "mixture"
        config.data.size = 64
        config.data.flip = False  # letters and arrows have a direction
        config.encode_epochs = 2
        config.batch_size = 32
        return config
    config.data.source = "arrays"
    config.data.path = "runs/pocket_latents"
    config.steps = 60_000
    config.batch_size = 64
    config.optim.lr = 3e-4  # constant, so that a run may be continued for longer
    config.optim.warmup = 500
    config.optim.weight_decay = 1e-2
    config.sample_steps = (50,)
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 500
    config.eval_images = 1000
    return config

"""The VAE of the pocket pipeline: 64 px images to 16 x 16 x 4 latents, 1.4 M weights, on icons and scenes.

    python -m cddistill.main --config=configs/autoencoder_pocket.py
    python -m cddistill.main --config=configs/autoencoder_pocket.py --mode=export --output=runs/pocket

For one's own images: --config.data.source=folder --config.data.path=IMAGES --config.data.size=256, say. With
--config.teacher=FOLDER that has a vae/, that one is fine-tuned. Hyper-parameters are ours.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("autoencoder")
    config.data.source = "mixture"
    config.data.size = 64
    config.data.num_classes = 33
    config.method.lpips_every = 2
    config.method.lpips_crop = 32
    config.steps = 5000
    config.batch_size = 8
    config.optim.lr = 1e-3
    config.optim.warmup = 200
    config.optim.decay = "cosine"
    config.log_every = 20
    config.eval_every = 1000
    config.checkpoint_every = 500
    config.eval_images = 500
    return config

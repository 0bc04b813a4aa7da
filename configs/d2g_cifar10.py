"""Diffusion2GAN's regression loss alone on CIFAR-10, in pixels, one step. Not run here: needs accelerators.

    python -m cddistill.main --mode=pairs --config=configs/d2g_cifar10.py    first: 1 M pairs
    python -m cddistill.main --config=configs/d2g_cifar10.py

Needs EDM's weights and extra tfds. Pairs, loss and batch size are the paper's; learning rate and steps are ours.
"""

from cddistill.config import defaults


def get_config():
    config = defaults("diffusion2gan")
    config.teacher = "weights/edm-cifar10-32x32-cond-vp"
    config.teacher_sampler = "heun"
    config.teacher_steps = (18,)
    config.data.source = "tfds"
    config.data.path = "cifar10"
    config.data.num_classes = 10
    config.data.pairs = "data/pairs_cifar10"
    config.num_pairs = 1_000_000
    config.pairs_batch = 1024
    config.steps = 100_000
    config.batch_size = 256
    config.dtype = "bfloat16"
    config.fsdp = -1
    config.optim.lr = 1e-5
    config.optim.clip = 1.0
    config.method.regression = "lpips"
    config.method.gan_weight = 0.0
    config.sample_steps = (1,)
    config.checkpoint_every = config.eval_every = 1000
    config.eval_images = 10_000
    return config

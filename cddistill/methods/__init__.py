"""The methods by name. A new method is one file and one line here."""

from cddistill.methods.autoencoder import TrainAutoencoder
from cddistill.methods.codi import CoDi
from cddistill.methods.diffusion import Diffusion
from cddistill.methods.diffusion2gan import Diffusion2GAN
from cddistill.methods.dmd2 import DMD2
from cddistill.methods.gd import GuidedDistillation
from cddistill.methods.latent_lpips import LatentMetric
from cddistill.methods.lcm import LCM
from cddistill.methods.pretrained import Pretrained

METHODS = {
    "diffusion": Diffusion,
    "codi": CoDi,
    "dmd2": DMD2,
    "diffusion2gan": Diffusion2GAN,
    "lcm": LCM,
    "gd": GuidedDistillation,
    "pretrained": Pretrained,
    "latent_lpips": LatentMetric,
    "autoencoder": TrainAutoencoder,
}
UNTRAINED = Pretrained  # how teachers and baselines are sampled as they are

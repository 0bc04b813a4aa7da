"""Distillation methods. To add one, write its file and add a line here."""

from cddistill.methods.codi import CoDi
from cddistill.methods.denoising import Denoising
from cddistill.methods.diffusion2gan import Diffusion2GAN
from cddistill.methods.dmd2 import DMD2
from cddistill.methods.latent_lpips import LatentMetric
from cddistill.methods.pretrained import Pretrained

METHODS = {
    "diffusion": Denoising,
    "codi": CoDi,
    "dmd2": DMD2,
    "diffusion2gan": Diffusion2GAN,
    "pretrained": Pretrained,
    "latent_lpips": LatentMetric,
}

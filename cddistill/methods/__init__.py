"""Distillation methods. To add one, write its file and add a line here."""

from cddistill.methods.codi import CoDi
from cddistill.methods.denoising import Denoising
from cddistill.methods.pretrained import Pretrained

METHODS = {"diffusion": Denoising, "codi": CoDi, "pretrained": Pretrained}

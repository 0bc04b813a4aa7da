"""Networks: ports of diffusers' models with parameter paths after diffusers' names, and how their weights are read."""

from cddistill.models.adapter import make_branch
from cddistill.models.convert import AUTOENCODERS, CONTROLNETS, DENOISERS, abstract, init, load, resolve, save

__all__ = ["AUTOENCODERS", "CONTROLNETS", "DENOISERS", "abstract", "init", "load", "make_branch", "resolve", "save"]

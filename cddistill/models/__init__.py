"""Networks: Flax ports of diffusers' models with diffusers' parameter names, and loading and saving of weights."""

from cddistill.models.adapter import make_branch
from cddistill.models.convert import AUTOENCODERS, CONTROLNETS, DENOISERS, abstract, init, load, save
from cddistill.models.folders import resolve

__all__ = ["AUTOENCODERS", "CONTROLNETS", "DENOISERS", "abstract", "init", "load", "make_branch", "resolve", "save"]

"""Families of teachers: which class denoises, where it lies in a diffusers folder, its schedule and its text encoders.

A new kind of teacher is a module for its denoiser and one record here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from cddistill.diffusion import EDM, Schedule
from cddistill.models.edm import DhariwalUNet, SongUNet
from cddistill.models.schedulers import read_scheduler, scheduler_file
from cddistill.models.unet import UNet2DConditionModel


class Family(NamedTuple):
    """One kind of teacher."""

    what: str  # in the words of its users
    denoisers: tuple[type, ...]  # classes that config.json may name
    read_schedule: Callable[[Path], tuple[Schedule, str]]  # the pipeline's folder -> (schedule, what it predicts)
    denoiser: str = "unet"  # its subfolder
    text_encoders: tuple[str, ...] = ()  # their subfolders
    zero_null: bool = False  # the null text is zeros instead of the empty prompt, unless model_index.json says not
    combine: Callable[[list], dict] | None = None  # the text encoders' outputs -> the denoiser's text inputs


def from_scheduler(root: Path):
    """The schedule of a pipeline's scheduler; Stable Diffusion 1.x's if there is none."""
    return read_scheduler(scheduler_file(root))


def edm(root: Path):
    """EDM's networks predict x0 on its schedule by construction."""
    return EDM(), "x0"


def last_hidden_state(outputs) -> dict:
    """Stable Diffusion 1.x and 2.x: token features [b, l, d] of the last layer."""
    return {"encoder_hidden_states": outputs[0].last_hidden_state}


def penultimate_and_pooled(outputs) -> dict:
    """Stable Diffusion XL: token features of both encoders' penultimate layers, and the second one's pooled feature."""
    hidden = jnp.concatenate([f.penultimate for f in outputs], -1)
    return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": outputs[-1].pooled}}


FAMILIES = {
    "unet": Family("class-conditional and unconditional ones", (UNet2DConditionModel,), from_scheduler),
    "sd": Family(
        "Stable Diffusion 1.x and 2.x", (UNet2DConditionModel,), from_scheduler, text_encoders=("text_encoder",),
        combine=last_hidden_state,
    ),
    "sdxl": Family(
        "Stable Diffusion XL", (UNet2DConditionModel,), from_scheduler,
        text_encoders=("text_encoder", "text_encoder_2"), zero_null=True, combine=penultimate_and_pooled,
    ),
    "edm": Family("EDM", (DhariwalUNet, SongUNet), edm),
}  # fmt: skip
DENOISERS = tuple(dict.fromkeys(cls for family in FAMILIES.values() for cls in family.denoisers))


def family_of(text_encoders: tuple[str, ...], root: Path) -> Family:
    """The family with these text encoders, the subfolders that a folder's model_index.json names.

    Raises ValueError naming those that are supported.
    """
    for family in FAMILIES.values():
        if text_encoders and family.text_encoders == text_encoders:
            return family
    known = " and ".join(str(list(f.text_encoders)) for f in FAMILIES.values() if f.text_encoders)
    raise ValueError(f"{root} has the text encoders {list(text_encoders)}; supported are {known}")


def read_schedule(module, root: Path) -> tuple[Schedule, str]:
    """(schedule, what the network predicts) of a denoiser's module in a pipeline's folder."""
    return next(f for f in FAMILIES.values() if isinstance(module, f.denoisers)).read_schedule(root)


def supported() -> str:
    """The denoisers that can be loaded, by class: "UNet2DConditionModel (of Stable Diffusion XL, ...) or ..."."""
    users = {}
    for family in FAMILIES.values():
        users.setdefault(family.denoisers, []).append(family.what)
    return " or ".join(f"{' or '.join(c.__name__ for c in cls)} (of {', '.join(of)})" for cls, of in users.items())

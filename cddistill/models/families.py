"""Families of teachers: which class denoises, where it lies in a diffusers folder, its schedule and its text encoders.

A new kind of teacher is a module for its denoiser and one record here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from cddistill.diffusion import EDM, Schedule
from cddistill.models.edm import DhariwalUNet, SongUNet
from cddistill.models.schedulers import read_scheduler
from cddistill.models.unet import UNet2DConditionModel


class Family(NamedTuple):
    """One kind of teacher."""

    denoisers: tuple[type, ...]  # classes that config.json may name
    read_schedule: Callable[[Path], tuple[Schedule, str]]  # the denoiser's folder -> (schedule, what it predicts)
    denoiser: str = "unet"  # its subfolder
    text_encoders: tuple[str, ...] = ()  # their subfolders
    zero_null: bool = False  # the null text is zeros instead of the empty prompt, unless model_index.json says not
    combine: Callable[[list], dict] | None = None  # the text encoders' outputs -> the denoiser's text inputs


def from_scheduler(folder: Path):
    """The schedule of scheduler/ beside the denoiser's folder; Stable Diffusion 1.x's if there is none."""
    return read_scheduler(folder.parent / "scheduler" / "scheduler_config.json")


def edm(folder: Path):
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
    "unet": Family((UNet2DConditionModel,), from_scheduler),  # class-conditional or unconditional
    "sd": Family(
        (UNet2DConditionModel,), from_scheduler, text_encoders=("text_encoder",), combine=last_hidden_state
    ),
    "sdxl": Family(
        (UNet2DConditionModel,), from_scheduler,
        text_encoders=("text_encoder", "text_encoder_2"), zero_null=True, combine=penultimate_and_pooled,
    ),
    "edm": Family((DhariwalUNet, SongUNet), edm),
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


def read_schedule(module, folder: Path) -> tuple[Schedule, str]:
    """(schedule, what the network predicts) of a denoiser's module in a folder."""
    return next(f for f in FAMILIES.values() if isinstance(module, f.denoisers)).read_schedule(folder)

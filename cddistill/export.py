"""A trained student as a diffusers folder: unet/, controlnet/ and scheduler/, as PyTorch diffusers and `models.load`
read it."""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from cddistill import models, sharding
from cddistill.diffusion import DDPM

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def export(parts, state, folder, dtype: str = "float16") -> float:
    """Write the averaged nets of a finished run and load them back; returns the largest difference of a weight.

    A backbone that was not trained is not written: a PE-CoDi student is its controlnet/, to be used with the
    teacher's unet/. Raises ValueError if what was written does not load back as the same network.
    """
    nets = state.ema or state.nets
    folder, worst = pathlib.Path(folder), 0.0
    for name, subfolder in (("backbone", "unet"), ("branch", "controlnet")):
        if name not in nets or not sharding.is_host0():
            continue
        params = jax.tree.map(np.asarray, nets[name].params)
        models.save(folder, subfolder, params, nets[name].apply.module.to_config(), dtype=np.dtype(dtype))
        write_scheduler(folder, parts.frozen["teacher"])
        back = models.load(folder, subfolder=subfolder).params
        worst = max(
            worst, *jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), params, back))
        )
    return worst


def write_scheduler(folder: pathlib.Path, teacher) -> None:
    """scheduler/scheduler_config.json of the teacher's schedule, with the spacing that students are trained on."""
    if not isinstance(teacher.schedule, DDPM):
        raise ValueError(f"diffusers folders hold DDPM schedules, not {type(teacher.schedule).__name__}")
    fields = dataclasses.asdict(teacher.schedule)
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": fields.pop("num_timesteps"),
        "rescale_betas_zero_snr": fields.pop("zero_snr"),
        "timestep_spacing": "trailing",
        "prediction_type": PREDICTION_TYPES[teacher.predicts],
        "set_alpha_to_one": True,
        "clip_sample": False,
        **fields,
    }
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

"""A trained student as a diffusers folder: unet/, controlnet/ and scheduler/, as PyTorch diffusers and `models.load`
read it."""

import pathlib

import jax
import numpy as np

from cddistill import models, sharding


def export(parts, state, folder, dtype: str = "float16") -> float:
    """Write the averaged nets of a finished run and load them back; returns the largest difference of a weight.

    A backbone that was not trained is not written: a PE-CoDi student is its controlnet/, to be used with the
    teacher's unet/. Raises ValueError if what was written does not load back as the same network.
    """
    nets = state.ema or state.nets
    folder, worst, teacher = pathlib.Path(folder), 0.0, parts.frozen["teacher"]
    if not sharding.is_host0():
        return worst
    models.convert.write_scheduler(folder, teacher.schedule, teacher.predicts)
    for name, subfolder in (("backbone", "unet"), ("branch", "controlnet")):
        if name not in nets:
            continue
        params = jax.tree.map(np.asarray, nets[name].params)
        models.save(folder, subfolder, params, nets[name].apply.module.to_config(), dtype=np.dtype(dtype))
        back = models.load(folder, subfolder=subfolder).params
        worst = max(
            worst, *jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), params, back))
        )
    return worst

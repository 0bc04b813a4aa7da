"""Noise and what the teacher's ODE makes of it, once and for all: what `data.pairs` reads.

DMD2's warm-up and DMD's regression loss learn from such pairs, and so does Diffusion2GAN.
"""

import functools
import pathlib

import jax
import numpy as np

from cddistill import data, sampling
from cddistill.build import load_teacher
from cddistill.config import Experiment
from cddistill.data.loader import stack
from cddistill.encode import named, write


def make_pairs(experiment: Experiment, output: pathlib.Path, config: dict) -> None:
    """Write run.pairs rows of noise, x0 (both float16) and their text below `output`/train, as `data.pairs` reads them.

    Texts are those of the training split, over and over; x0 is the teacher's, by DDIM (Euler's method) in the last of
    run.teacher_steps steps with run.teacher_guidance. Every host makes its share; rows already written by the same
    command are kept. Raises ValueError if no number of steps is set, and for an `output` made by another command.
    """
    run = experiment.run
    if not run.teacher_steps:
        raise ValueError("--mode=pairs needs the teacher's number of steps: --config.teacher_steps=50")
    if run.pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {run.pairs}")
    teacher, dataset = load_teacher(run), data.load(experiment.data, "train", augment=False)
    names = ("teacher", "lora", "lora_scale", "teacher_steps", "teacher_guidance", "data", "dtype", "seed")
    made = {name: config[name] for name in names}

    @jax.jit
    def integrate(teacher, noise, text, null):
        denoise = sampling.guided(teacher, text, null, run.teacher_guidance)
        return sampling.ddim(denoise, teacher.schedule, noise, sampling.times(teacher.schedule, run.teacher_steps[-1]))

    def draw(rows):
        given = stack([{name: row[name] for name in ("noise", "text", "null")} for row in rows])
        x0 = integrate(teacher, np.float32(given["noise"]), given["text"], given["null"])
        return {"noise": given["noise"], "x0": np.asarray(x0, np.float16), **named(given["text"])}

    null = dataset.item(0, np.random.default_rng(0))["null"]
    write(output / "train", made, functools.partial(row, dataset, run.seed), run.pairs, run.batch_size, draw, null)


def row(dataset, seed: int, i: int) -> dict:
    """Text of an image of the data set, and noise of the shape of its x0, rounded to what the file will hold."""
    item = dataset.item(i % len(dataset), np.random.default_rng([seed, i]))
    noise = np.random.default_rng([seed, i, 1]).standard_normal(item["x0"].shape).astype(np.float16)
    return {name: item[name] for name in ("text", "null", "caption")} | {"noise": noise}

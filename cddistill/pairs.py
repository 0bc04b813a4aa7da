"""Noise and what the teacher's ODE makes of it, once and for all: what `data.pairs` reads.

DMD2's warm-up and DMD's regression loss learn from such pairs, and so does Diffusion2GAN.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import data, models, sampling
from cddistill.config import Experiment
from cddistill.data.loader import stack
from cddistill.encode import named, null_files, write
from cddistill.net import Denoiser


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
    teacher = models.load(run.teacher, dtype=jnp.dtype(run.dtype), flash=run.flash, expect=models.DENOISERS)
    dataset = data.load(experiment.data, "train", augment=False)
    hosts, host = jax.process_count(), jax.process_index()
    mine = range(run.pairs * host // hosts, run.pairs * (host + 1) // hosts)
    made = {name: config[name] for name in ("teacher", "teacher_steps", "teacher_guidance", "data", "dtype", "seed")}
    items = (row(dataset, i, run.seed) for i in mine)
    draw = Trajectories(teacher, run.teacher_steps[-1], run.teacher_guidance, run.batch_size)
    folder = output / "train" / f"{host:05}-of-{hosts:05}"
    write(folder, made, items, len(mine), run.batch_size, draw)
    for name, x in null_files(dataset.item(0, np.random.default_rng(0))["null"]).items():
        np.save(folder / f"{name}.npy", x)


def row(dataset, i: int, seed: int) -> dict:
    """Text of an image of the data set, and noise of the shape of its x0, rounded to what the file will hold."""
    item = dataset.item(i % len(dataset), np.random.default_rng([seed, i]))
    noise = np.random.default_rng([seed, i, 1]).standard_normal(item["x0"].shape).astype(np.float16)
    return {name: item[name] for name in ("text", "null", "caption")} | {"noise": noise}


@dataclasses.dataclass
class Trajectories:
    """Rows to arrays; padded to one batch size, so that one program serves all."""

    teacher: Denoiser
    steps: int
    guidance: float
    batch_size: int

    def __post_init__(self):
        self.draw = jax.jit(self.integrate)

    def integrate(self, teacher, noise, text, null):
        """x0 of unit noise."""
        times = sampling.times(teacher.schedule, self.steps)
        return sampling.ddim(sampling.guided(teacher, text, null, self.guidance), teacher.schedule, noise, times)

    def __call__(self, rows) -> dict[str, np.ndarray]:
        kept = [{name: row[name] for name in ("noise", "text", "null")} for row in rows]
        padded = stack(kept + kept[-1:] * (self.batch_size - len(rows)))
        x0 = self.draw(self.teacher, np.float32(padded["noise"]), padded["text"], padded["null"])
        arrays = {"noise": padded["noise"], "x0": np.asarray(x0, np.float16), **named(padded["text"])}
        return {name: x[: len(rows)] for name, x in arrays.items()}

"""Runs in Python: configs with changes, training, pairs, scores and pictures, as the command line has them.

settings = cddistill.configure("ccd_sr", steps=300, optim={"lr": 1e-3})
student = cddistill.fit(settings, "runs/ccd_sr")  # again: resumes, or loads what is complete
cddistill.grid(cddistill.sample(student, image="small.png"))  # a picture, which notebooks show
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cddistill import api, commands, config, config_files, data, health, io, train, typed
from cddistill.evals import compare, grids
from cddistill.method import Generator
from cddistill.typed import Count


def configure(name: str | PurePath, /, **changes) -> ConfigDict:
    """The config "ccd_sr" or "ccd_sr:pe" of the package, or of a file "my.py", with changes to its fields.

    Fields of a group are a dict: optim={"lr": 1e-3}. Raises ValueError, in one sentence, for an unknown config or field
    and for a value out of range.
    """
    spec = str(name)
    if not spec.partition(":")[0].endswith(".py"):
        spec = f"cddistill:{spec.removeprefix('cddistill:')}"
    texts = [(field, str(value)) for field, value in io.flatten(changes).items()]
    settings = config_files.override(config_files.load_config(spec), texts, spec)
    config.resolve(settings)
    return settings


def fit(settings, workdir: str | PurePath) -> api.Model | None:
    """Train to settings.steps, resuming from what the workdir holds, and evaluate, as --mode=train does.

    Returns the trained model as `load(workdir)` does; None if the method trains no generator of images. Interrupting it
    saves a checkpoint, with which the model is returned.
    """
    train.train(settings, io.path(workdir))
    return api.load(workdir) if isinstance(config.resolve(settings).method, Generator) else None


def make_pairs(settings, output: str | PurePath = "") -> None:
    """Write pairs of noise and the teacher's image for it to a folder, by default settings.data.pairs."""
    output = output or config.resolve(settings).data.pairs
    if not output:
        raise ValueError("make_pairs needs a folder: pass output=, or set data.pairs in the config")
    commands.make_pairs(settings, io.path(output))


def encode_data(settings, output: str | PurePath) -> None:
    """Write a data set as latents and text embeddings to a folder: train with data.source "arrays" and its path."""
    commands.encode_data(settings, io.path(output))


def save(workdir: str | PurePath, output: str | PurePath, *, checkpoint: str = "latest", teacher=None) -> None:
    """Write the result of a run for other programs: a diffusers folder, *.stablehlo or *.onnx, a metric *.safetensors.

    checkpoint and teacher are as in `load`. Raises ValueError if there is no run, or the folder is not empty.
    """
    workdir = io.path(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} holds no run: train it first, with cddistill.fit(settings, {str(workdir)!r})")
    commands.export_run(api.moved_settings(workdir, teacher), workdir, str(output), checkpoint)


# ---- looking at a run


def evaluate(settings, workdir: str | PurePath, *, checkpoint: str = "latest") -> dict[str, dict[str, Any]]:
    """Score a run, or an untrained folder (config "pretrained"), on the test split; returns `scores(workdir)`."""
    commands.evaluate_run(settings, io.path(workdir), checkpoint)
    return scores(workdir)


def scores(workdir: str | PurePath) -> dict[str, dict[str, Any]]:
    """The last evaluation of a run, {"student, 4 steps": {"LPIPS-VGG": [0.195, 0.004]}}: means and standard errors.

    {} if there was none.
    """
    return {name: row["metrics"] for name, row in compare.read_scores(io.path(workdir)).items()}


def records(workdir: str | PurePath) -> list[dict[str, Any]]:
    """The logged metrics of a run, oldest first: {"step": 10, "student/loss": 0.1}; None for what was not finite."""
    return health.read(io.joined(io.path(workdir) / "metrics.jsonl"))


def alarms(workdir: str | PurePath) -> list[health.Alarm]:
    """The signs of a failing run in its metrics: step, name, and what to change in words; [] if there are none."""
    settings = io.read_json(io.path(workdir) / "config.json", "train first")
    return health.diagnose(records(workdir), config.resolve(settings).method.health_rules())


def examples(settings, n: int = 8, split: str = "test") -> dict[str, Any]:
    """The first examples of a run's data: "image" and "condition", if the task has one, float32 [n, h, w, c] in [0, 1];
    "label", int32 [n]; "caption", a list of n texts, for editing instructions.

    `sample` takes them: image=found["condition"]. Raises ValueError for data without images.
    """
    experiment = config.resolve(settings)
    found = data.examples(experiment.data, split, typed.fit(n, Count, "n"))
    if experiment.data.source.precomputed or "imageless" in found:
        raise ValueError(f"the data {experiment.data.source_name} holds no images to look at")
    shown = {"image": found["x0"] * np.float32(0.5) + np.float32(0.5), "condition": found.get("cond")}
    shown |= {"label": found["label"], "caption": found["caption"]}
    return {name: x for name, x in shown.items() if x is not None}


def grid(images, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """A picture of images [n, h, w, 1 or 3], floats in [0, 1] or uint8; of a dict of them, a labelled row for each.

    scale enlarges each pixel; by default images become about 96 px. Notebooks show the picture.
    """
    if isinstance(images, Mapping):
        return Image.fromarray(grids.side_by_side(images, scale))
    images = grids.to_uint8(images)
    return Image.fromarray(grids.grid(images, columns, scale or grids.enlargement(images.shape[1])))

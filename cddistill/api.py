"""cddistill in Python: load a trained run or a diffusers folder, and generate images with it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cddistill import commands, config, generate, io, sharding
from cddistill.data import TASKS, images
from cddistill.data.contracts import Task
from cddistill.evals import grids
from cddistill.generate import Student
from cddistill.method import Generator
from cddistill.methods import UNTRAINED
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline, of_run
from cddistill.train import cache_programs

STEPS = {"lcm": 4}  # of pretrained networks by sampler, where their scheduler names no timesteps; others: 50


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What `load` returns and `sample` takes."""

    name: str
    student: Student
    pipeline: Pipeline
    task: Task | None  # None: the condition is an image of the output's size
    shape: tuple[int, int, int]  # of x0
    null_label: int
    steps: int  # in which it samples unless told otherwise

    def __repr__(self) -> str:
        made = type(self.student.method).__name__
        return f"Model({self.name!r}, {made}, {'x'.join(map(str, self.shape))}, {self.steps} steps)"

    @property
    def size(self) -> int:
        """Height of its images in pixels."""
        x0 = jax.ShapeDtypeStruct((1, *self.shape), np.float32)
        return jax.eval_shape(Autoencoder.images, self.student.frozen["autoencoder"], x0).shape[1]


def load(path, *, checkpoint: str = "latest") -> Model:
    """A model that generates images: the workdir of a run, a diffusers folder, a Hub id or "emoji".

    checkpoint is that of a run, "latest", "best" or a step. Raises ValueError, in one sentence, for anything else.
    """
    workdir = Path(path)
    if (workdir / "checkpoints").is_dir():
        return load_run(workdir, checkpoint)
    return load_pipeline(Pipeline(str(path)), UNTRAINED(scheduler=str(path)))


def load_pipeline(pipeline: Pipeline, method) -> Model:
    """The networks of a folder, sampled by a method that trains nothing."""
    frozen = {"teacher": pipeline.denoiser, "autoencoder": pipeline.autoencoder}
    if pipeline.has("controlnet"):
        frozen["controlnet"] = pipeline.controlnet(pipeline.name)
    how = pipeline.sampling()
    steps = len(how.timesteps or ()) or STEPS.get(how.sampler, 50)
    student = Student(method, sharding.make_mesh(), frozen, {}, {})
    return Model(pipeline.name, student, pipeline, None, pipeline.x0_shape, pipeline.null_label, steps)


def load_run(workdir: Path, checkpoint: str, settings=None) -> Model:
    """The trained student of a run, whose config is by default that in its workdir."""
    settings = settings or io.read_json(workdir / "config.json")
    parts, state = commands.finished(settings, workdir, checkpoint)
    if not isinstance(parts.experiment.method, Generator):
        raise ValueError(f"the run in {workdir} trained no generator: its result is exported with --mode=export")
    student, data = generate.student_of(parts, state), parts.experiment.data
    shape, steps = generate.example(data)["x0"].shape[1:], max(parts.experiment.run.sample_steps)
    return Model(str(workdir), student, parts.pipeline, data.task, shape, data.num_classes, steps)


def sample(
    model: Model, *, prompt: str | Sequence[str] | None = None, label: int | Sequence[int] | None = None, image=None,
    n: int | None = None, steps: int | None = None, guidance: float | None = None, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Images, float32 [n, h, w, 3] in [0, 1].

    prompt, label and image are one or a list: texts, class labels, and conditions (a path, a PIL image or a uint8 array
    [h, w, c]). n images are generated if none of them is a list. The same seed gives the same images. Raises ValueError
    for inputs that the model does not take, or of different numbers.
    """
    given = {name: listed(x) for name, x in (("prompt", prompt), ("label", label), ("image", image)) if x is not None}
    n = max([n or 1, *map(len, given.values())])
    if wrong := [name for name, x in given.items() if len(x) not in (1, n)]:
        raise ValueError(f"{wrong[0]} has {len(given[wrong[0]])} entries for {n} images: give one, or as many")
    given = {name: x * n if len(x) == 1 else x for name, x in given.items()}
    batch = {"x0": np.zeros((n, *model.shape), np.float32), "index": np.arange(n, dtype=np.int32)}
    batch |= texts(model, given.get("prompt"), given.get("label"), n)
    conditional = "controlnet" in model.student.frozen or model.student.method.requires().condition
    if conditional and "image" not in given:
        raise ValueError(f"{model.name} generates from an image: pass image=, a path, a PIL image or an array")
    if "image" in given:
        batch["cond"] = np.stack([condition(model, source) for source in given["image"]])
    student = guided(model.student, guidance)
    batch = generate.with_latent_condition(student, model.pipeline, model.task or TASKS["none"](), batch)
    return generate.sample(student, batch, steps or model.steps, seed, task=model.task)


def listed(x) -> list:
    """One thing or several, as a list."""
    return list(x) if isinstance(x, list | tuple) or (isinstance(x, np.ndarray) and x.ndim == 1) else [x]


def texts(model: Model, prompts, labels, n: int) -> dict[str, Any]:
    """The text and null text of a batch."""
    encoders = model.pipeline.prompts
    if encoders is None and not getattr(model.student.frozen["teacher"].module, "conditional", True):
        if prompts is not None or labels is not None:
            raise ValueError(f"{model.name} is unconditional: it takes neither prompt nor label")
        return {"text": {}, "null": {}}
    if encoders is None:
        if prompts is not None:
            raise ValueError(f"{model.name} has no text encoder, so it takes no prompt: give a label, or nothing")
        null = np.full(n, model.null_label, np.int32)
        chosen = null if labels is None else np.asarray(labels, np.int32)
        if chosen.min() < 0 or chosen.max() > model.null_label:
            raise ValueError(f"labels of {model.name} are 0 to {model.null_label - 1}, not {chosen.tolist()}")
        return {"text": {"class_labels": chosen}, "null": {"class_labels": null}}
    if labels is not None:
        raise ValueError(f"{model.name} is conditioned on text, so it takes no label: give a prompt, or nothing")
    if model.student.method.requires().text_encoder:  # the student has one of its own
        ids = lambda texts: {"input_ids": encoders.tokenize(texts)[0]}
        return {"text": ids(prompts or [""] * n), "null": ids([""] * n)}
    sizes = {"target_size": (model.size, model.size)}
    null = encoders.null(n, **sizes)
    return {"text": null if prompts is None else encoders(prompts, **sizes), "null": null}


def condition(model: Model, source) -> np.ndarray:
    """The condition [h, w, c] in [0, 1] of a path, a PIL image or an array."""
    if isinstance(source, np.ndarray):
        source = images.from_array(source, "image")
    if model.task is not None:
        return model.task.read(source, model.size)
    return np.float32(images.fit(images.read(source), model.size)) / np.float32(255)


def guided(student: Student, guidance: float | None) -> Student:
    """The student with another guidance scale; ValueError if its method has none."""
    if guidance is None:
        return student
    if not hasattr(student.method, "guidance"):
        raise ValueError(f"{type(student.method).__name__} students have no guidance scale: leave guidance out")
    return student._replace(method=dataclasses.replace(student.method, guidance=float(guidance)))


def sample_prompts(settings, workdir: Path, prompts: Sequence[str], output: str, checkpoint: str = "latest") -> None:
    """--mode=sample --prompt: write one image, or a grid of one for each prompt, to a file.

    The student of the run in workdir or, for a method that trains nothing, config.teacher; no data is read.
    """
    experiment = config.resolve(settings)
    run, method = experiment.run, experiment.method
    if not isinstance(method, Generator):
        raise ValueError("this method generates no images: use --mode=evaluate or --mode=export")
    grids.image_suffix(output)
    io.ensure_writable(Path(output).parent, "--output")
    cache_programs()
    model = load_run(workdir, checkpoint, settings) if method.turns() else load_pipeline(of_run(run), method)
    steps = max(run.sample_steps)
    images = sample(model, prompt=list(prompts), steps=steps, seed=run.seed)
    grids.save_image(output, grids.to_uint8(images)[0] if len(images) == 1 else grids.grid(images))
    print(f"{len(images)} generated in {steps} steps ({method.nfe(steps)} network evaluations each): {output}")

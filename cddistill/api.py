"""cddistill in Python: load a trained run or a diffusers folder, and generate images with it."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from cddistill import commands, config, generate, io, models, sharding, typed
from cddistill.data import TASKS, images
from cddistill.data.contracts import Task
from cddistill.data.resample import to_float
from cddistill.evals import grids
from cddistill.generate import Student
from cddistill.methods import UNTRAINED
from cddistill.models import adapter, folders, schedulers
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline, of_run
from cddistill.train import INPUTS, cache_programs, read_inputs
from cddistill.typed import Count, SamplingSteps

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
    cond_shape: tuple[int, int, int] | None = None  # of a condition as the student takes it; None: an image's

    def __repr__(self) -> str:
        made = type(self.student.method).__name__
        return f"Model({self.name!r}, {made}, {'x'.join(map(str, self.shape))}, {self.steps} steps)"

    @property
    def size(self) -> int:
        """Height of its images in pixels."""
        x0 = jax.ShapeDtypeStruct((1, *self.shape), np.float32)
        return jax.eval_shape(Autoencoder.images, self.student.frozen["autoencoder"], x0).shape[1]


def load(path, *, checkpoint: str = "latest", teacher=None, task: str = "", lora="") -> Model:
    """A model that generates images: the workdir of a run, a diffusers folder, a Hub id or "emoji".

    checkpoint is that of a run, "latest", "best" or a step; teacher is where its config.teacher lies now, if it was
    moved. The data of a run is not needed. lora, a file or folder, is merged into a folder's network, and a scheduler/
    beside it says how to sample: load("pocket", lora="pocket_dmd2"). task, "edit" for InstructPix2Pix, says how a
    folder's network takes its image; without it images are taken as they are, at the output's size. Raises ValueError,
    in one sentence, for anything else.
    """
    path = os.path.expanduser(str(path))
    workdir = io.path(path)
    if (workdir / "checkpoints").is_dir():
        if task or lora:
            raise ValueError(f"task= and lora= are for a folder, and {path} is a run, which has its own: leave it out")
        return load_run(workdir, checkpoint, moved_settings(workdir, teacher))
    if teacher is not None:
        raise ValueError(f"teacher= is for the workdir of a run, and {path} has no checkpoints/: leave it out")
    if task and (task not in TASKS or not TASKS[task].conditional):
        known = ", ".join(name for name, kind in TASKS.items() if kind.conditional)
        raise ValueError(f"task={task!r} must be one of {known}")
    lora = os.path.expanduser(str(lora))
    beside = schedulers.scheduler_file(folders.shipped(lora) or Path(lora))
    scheduler = lora if lora and beside.is_file() else path
    model = load_pipeline(Pipeline(path, lora), UNTRAINED(scheduler=scheduler))
    if task and not takes_image(model):
        raise ValueError(f"task={task!r}, and the network of {path} takes no image: leave it out")
    return dataclasses.replace(model, task=TASKS[task]()) if task else model


def load_pipeline(pipeline: Pipeline, method, controlnet: str = "") -> Model:
    """The networks of a folder, sampled by a method that trains nothing; with a ControlNet of its own or a folder's."""
    frozen = {"teacher": pipeline.denoiser, "autoencoder": pipeline.autoencoder}
    if branch := pipeline.branch(controlnet):
        frozen["controlnet"] = branch
    how = Pipeline(method.scheduler or pipeline.name).sampling()
    steps = len(how.timesteps or ()) or STEPS.get(how.sampler, 50)
    student = Student(method, sharding.make_mesh(), frozen, {}, {})
    return Model(pipeline.name, student, pipeline, None, pipeline.x0_shape, pipeline.null_label, steps)


def load_run(workdir: PurePath, checkpoint: str, settings) -> Model:
    """The trained student of a run with this config."""
    commands.check_generates(config.resolve(settings).method)
    parts, state = commands.finished(settings, workdir, checkpoint, split=None)
    student, data = generate.student_of(parts, state), parts.experiment.data
    shape, steps = parts.batch["x0"].shape[1:], max(parts.experiment.run.sample_steps)
    cond = parts.batch["cond"].shape[1:] if "cond" in parts.batch else None
    return Model(str(workdir), student, parts.pipeline, data.task, shape, data.num_classes, steps, cond)


def moved_settings(workdir: PurePath, teacher=None) -> dict[str, Any]:
    """The config that a run has recorded, with the paths that are right here: that of `teacher` and, for relative paths
    of another working folder, absolute ones. Raises ValueError if the teacher is nowhere."""
    settings = io.read_json(workdir / "config.json", "restore it", teacher=str)
    try:
        config.resolve(settings)
    except ValueError as error:
        raise ValueError(f"{workdir / 'config.json'} is no config of this version: {error}") from error
    paths = read_inputs(workdir)["paths"] if (workdir / INPUTS).is_file() else {}
    for key, absolute in {key: x for key, x in paths.items() if key in io.flatten(settings)}.items():
        *groups, field = key.split(".")
        group = functools.reduce(dict.__getitem__, groups, settings)
        if not io.path(group[field]).exists() and Path(absolute).exists():
            group[field] = absolute
    if teacher is not None:
        settings["teacher"] = str(teacher)
    try:
        models.resolve(settings["teacher"])
    except ValueError as error:
        raise ValueError(f"{error}; if the teacher of {workdir} was moved, pass teacher=, its new place") from error
    return settings


def sample(
    model: Model, *, prompt: str | Sequence[str] | None = None, label: int | Sequence[int] | None = None, image=None,
    negative_prompt: str | Sequence[str] | None = None, n: int | None = None, steps: int | None = None,
    guidance: float | None = None, image_guidance: float | None = None, seed: int = 0, tiles: bool = False,
) -> np.ndarray:  # fmt: skip
    """Images, float32 [n, h, w, 3] in [0, 1].

    prompt, label and image are one or a list: texts, class labels, and conditions (a path, a PIL image, a uint8 array
    [h, w, c], or floats [h, w, c] in [0, 1] as `examples` has them, which are taken as they are). An array [n, h, w, c]
    is a list. n images are generated if none of them is a list. Guidance leads away from negative_prompt, one or a
    list, instead of from the empty prompt, and image_guidance away from no image (editing). The same seed gives the
    same images. With tiles=True images are generated at the size of their conditions, in overlapping tiles
    (super-resolution). Raises ValueError for inputs that the model does not take, or of different numbers or sizes.
    """
    given = {"prompt": prompt, "label": label, "image": image, "negative_prompt": negative_prompt}
    if tiles and image is None:
        raise ValueError("tiles=True is for image=: leave it out")
    images = sample_each(model, given, n, steps, guidance, image_guidance, seed, tiles)
    if len({x.shape for x in images}) > 1:
        raise ValueError("images of different sizes make no array: sample those of one size, or one at a time")
    return np.stack(images)


def sample_each(
    model: Model, given: dict[str, Any], n: int | None, steps: int | None, guidance: float | None = None,
    image_guidance: float | None = None, seed: int = 0, tiles: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """The images of `sample`, which may be of different sizes; given has its first four arguments."""
    n, steps, seed = number(n, Count, "n"), number(steps, SamplingSteps, "steps"), number(seed, config.Seed, "seed")
    given, n = aligned({name: listed(x) for name, x in given.items() if x is not None}, n or 1)
    check_instructions(model.task, given.get("prompt", ()))
    student = guided(guided(model.student, guidance), image_guidance, "image_guidance")
    if "negative_prompt" in given:
        check_guided(student.method, model.name)
    batch = {"x0": np.zeros((n, *model.shape), np.float32), "index": np.arange(n, dtype=np.int32)}
    batch |= texts(model, given.get("prompt"), given.get("label"), n, given.get("negative_prompt"))
    if takes_image(model) and "image" not in given:
        raise ValueError(f"{model.name} generates from an image: pass image=, a path, a PIL image or an array")
    if "image" not in given:
        return list(generate.sample(student, batch, steps or model.steps, seed))
    if not takes_image(model):
        raise ValueError(f"{model.name} takes no image: leave it out")
    task, conditions = model.task or TASKS["none"](), [condition(model, source, tiles) for source in given["image"]]
    how = model.size, steps or model.steps, seed
    return generate.sample_from(student, model.pipeline, task, batch, conditions, *how)


def number(value, kind, name: str):
    """An argument as the number that it must be, see `typed.fit`; None is none."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if value is None else typed.fit(value, kind, name)


def listed(x) -> list:
    """One thing or several, as a list."""
    return list(x) if isinstance(x, list | tuple) or (isinstance(x, np.ndarray) and x.ndim in (1, 4)) else [x]


def aligned(given: dict[str, list], n: int = 1) -> tuple[dict[str, list], int]:
    """(the lists with as many entries as the longest, or n; that number). ValueError for a list of another length that
    is not 1."""
    n = max([n, *map(len, given.values())])
    if wrong := [name for name, x in given.items() if len(x) not in (1, n)]:
        raise ValueError(f"{wrong[0]} has {len(given[wrong[0]])} entries for {n} images: give one, or as many")
    return {name: x * n if len(x) == 1 else x for name, x in given.items()}, n


def check_instructions(task: Task | None, prompts: Sequence[str]) -> None:
    """ValueError if an edit is asked for without words."""
    if isinstance(task, TASKS["edit"]) and not all(prompt.strip() for prompt in prompts):
        raise ValueError("the instruction is empty: say what to change, such as: make it blue")


def takes_image(model: Model) -> bool:
    """Whether a model generates from an image: by its method, a ControlNet, or input channels for one."""
    method, frozen = model.student.method, model.student.frozen
    kind = adapter.kind_of(frozen["teacher"], frozen.get("controlnet"), model.shape[-1])
    return bool(method.requires().condition or (not method.turns() and kind != "none"))


def texts(model: Model, prompts, labels, n: int, negatives=None) -> dict[str, Any]:
    """The text and null text of a batch; negative prompts are the null text."""
    encoders = model.pipeline.prompts
    if encoders is None and not getattr(model.student.frozen["teacher"].module, "conditional", True):
        if prompts is not None or labels is not None:
            raise ValueError(f"{model.name} is unconditional: it takes neither prompt nor label")
        return {"text": {}, "null": {}}
    if encoders is None:
        if prompts is not None or negatives is not None:
            raise ValueError(f"{model.name} has no text encoder, so it takes no prompt: give a label, or nothing")
        null = np.full(n, model.null_label, np.int32)
        chosen = null if labels is None else np.array([number(x, int, "label") for x in labels], np.int32)
        if chosen.min() < 0 or chosen.max() > model.null_label:
            raise ValueError(f"labels of {model.name} are 0 to {model.null_label - 1}, not {chosen.tolist()}")
        return {"text": {"class_labels": chosen}, "null": {"class_labels": null}}
    if labels is not None:
        raise ValueError(f"{model.name} is conditioned on text, so it takes no label: give a prompt, or nothing")
    if model.student.method.requires().text_encoder:  # the student has one of its own
        ids = lambda texts: {"input_ids": encoders.tokenize(texts)[0]}
        return {"text": ids(prompts or [""] * n), "null": ids(negatives or [""] * n)}
    sizes = {"target_size": (model.size, model.size)}
    empty = encoders.null(n, **sizes)
    text, null = (empty if x is None else encoders(x, **sizes) for x in (prompts, negatives))
    return {"text": text, "null": null}


def condition(model: Model, source, tiled: bool = False) -> np.ndarray:
    """The condition [h, w, c] in [0, 1] of a path, a PIL image or an array; if tiled, at its own size."""
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.dtype.kind == "f" and not tiled:
        return own_condition(model, source)
    if isinstance(source, np.ndarray):
        source = images.from_array(source, "image")
    elif isinstance(source, str | PurePath):
        source = io.local(source)
        if not source.exists():
            raise ValueError(f"the image {source} does not exist")
    if tiled:
        return (model.task or TASKS["none"]()).read_whole(source, model.size)
    if model.task is not None:
        return model.task.read(source, model.size)
    return to_float(images.fit(images.read(source), model.size))


def own_condition(model: Model, cond: np.ndarray) -> np.ndarray:
    """A condition [h, w, c] that was made already, as float32. ValueError unless it has the student's shape and is in
    [0, 1]."""
    shape = model.cond_shape or (model.size, model.size, 3)
    if cond.shape != shape:
        raise ValueError(f"image is {cond.dtype} {cond.shape}; {model.name} takes floats of shape {shape}, or uint8")
    if not (cond.min() >= 0 and cond.max() <= 1):
        raise ValueError("image has floats outside of [0, 1]: divide 8-bit values by 255, or pass them as uint8")
    return np.float32(cond)


def guided(student: Student, scale: float | None, name: str = "guidance") -> Student:
    """The student with another guidance scale, that of the text or of the image; ValueError if its method has none."""
    if scale is None:
        return student
    if not hasattr(student.method, name):
        raise ValueError(f"{type(student.method).__name__} students have no such guidance scale: leave {name} out")
    scale = typed.check_types(type(student.method), {name: number(scale, float, name)}, "")
    return student._replace(method=dataclasses.replace(student.method, **scale))


def check_guided(method, name: str) -> None:
    """ValueError if a negative prompt would have no effect on what this method generates."""
    if not hasattr(method, "guidance"):
        raise ValueError(f"{name} is sampled without guidance, so it takes no negative prompt: leave it out")
    if method.guidance == 1.0:
        raise ValueError(
            "a negative prompt has no effect at guidance scale 1: set guidance= (--config.method.guidance=), 5 or so"
        )


# ---- --mode=sample


def sample_run(
    settings, workdir: PurePath, output: str, checkpoint: str = "latest", prompts: Sequence[str] = (),
    labels: Sequence[int] = (), negative_prompt: str | None = None, n: int | None = None, source: str | None = None,
    tiles: bool = False,
) -> None:  # fmt: skip
    """`sample_prompts` for prompts and labels, and for an image without a task; else `commands.sample`."""
    experiment = config.resolve(settings)
    if n is not None and n < 1:
        raise ValueError(f"--n must be at least 1, not {n}")
    if tiles and source is None:
        raise ValueError("--tiles is for --input, an image that is larger than those of training: leave it out")
    bare = source is not None and not (experiment.method.turns() or experiment.data.task.conditional)
    if prompts or labels or negative_prompt is not None or bare:
        sample_prompts(settings, workdir, prompts, output, checkpoint, labels, negative_prompt, n or 1, source, tiles)
    else:
        commands.sample(settings, workdir, source, output, checkpoint, n, tiles)


def sample_prompts(
    settings, workdir: PurePath, prompts: Sequence[str], output: str, checkpoint: str = "latest",
    labels: Sequence[int] = (), negative_prompt: str | None = None, n: int = 1, source: str | None = None,
    tiles: bool = False,
) -> None:  # fmt: skip
    """Write n images for each prompt, label or input, in a row, to a file or, for a folder of inputs, one for each.

    The student of the run in workdir or, for a method that trains nothing, config.teacher; no data is read. Raises
    ValueError if the numbers of prompts, labels and inputs differ and are not 1.
    """
    run, method = (experiment := config.resolve(settings)).run, experiment.method
    commands.check_generates(method)
    if negative_prompt is not None:
        check_guided(method, "this student")
    inputs = commands.image_files(Path(source), experiment.data.task) if source else []
    outputs = grids.outputs(inputs, output, bool(source) and Path(source).is_dir())
    negative = [] if negative_prompt is None else [negative_prompt]
    given = {"prompt": list(prompts), "label": list(labels), "image": inputs, "negative_prompt": negative}
    given, number = aligned({name: x for name, x in given.items() if x})
    io.ensure_writable(outputs[0].parent, "--output")
    cache_programs(workdir)
    model = open_model(settings, workdir, checkpoint)
    if takes_image(model) and not inputs:
        raise ValueError(f"{model.name} generates from an image: pass --input, an image or a folder of images")
    if inputs and model.task and (note := commands.input_note(model.task, model.size, tiles)):
        commands.say(note)
    steps, given = max(run.sample_steps), {name: [x for x in xs for _ in range(n)] for name, xs in given.items()}
    commands.announce(number * n, steps)
    generated = sample_each(model, given, number * n, steps, seed=run.seed, tiles=tiles)
    commands.save_groups([path.name for path in inputs] if len(outputs) > 1 else [""], generated, outputs, n)
    commands.conclude(len(generated), steps, method, output)


def open_model(settings, workdir: PurePath, checkpoint: str) -> Model:
    """What a config samples: its trained student or, for a method that trains nothing, its teacher, with the config's
    task if it takes an image."""
    experiment = config.resolve(settings)
    if experiment.method.turns():
        return load_run(workdir, checkpoint, settings)
    model = load_pipeline(of_run(experiment.run), experiment.method, experiment.run.controlnet)
    task = experiment.data.task
    return dataclasses.replace(model, task=task) if takes_image(model) and task.conditional else model

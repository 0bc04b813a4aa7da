"""What can be done besides training: evaluate, sample and export a run, encode a data set, generate pairs."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cddistill import checkpoint, config, data, export, generate, io
from cddistill.build import Parts, build, open_checkpoints
from cddistill.data import images, listing
from cddistill.evals import compare, grids
from cddistill.method import Generator
from cddistill.precompute import encode, pairs
from cddistill.step import TrainState
from cddistill.train import cache_programs


def finished(settings, workdir: Path, which: str = "latest", split: str = "validation") -> tuple[Parts, TrainState]:
    """(parts, trained weights) of a run: of its "latest" or "best" checkpoint, or of the one of a step, "2000".

    split is the one that will be read.
    """
    experiment = config.resolve(settings)
    if not experiment.method.turns():  # nothing to train: the student came with config.teacher
        io.ensure_writable(workdir)
        parts = build(experiment, {split: "this mode reads it"})
        return parts, parts.init()
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} holds no run: train first, with --mode=train --workdir={workdir}")
    checkpoint.check_config(workdir, config.plain(settings), {*config.mutable_on_resume(experiment), "steps"})
    cache_programs()
    checkpoints = open_checkpoints(workdir, experiment, read_only=True)
    step = checkpoints.resolve(which)
    parts = build(experiment, {split: "this mode reads it"})
    return parts, checkpoints.restore_weights(parts.abstract, step=step)


def evaluate_run(settings, workdir: Path, which: str = "latest") -> None:
    """Score a checkpoint on the test split and write the report again."""
    parts, state = finished(settings, workdir, which, "test")
    compare.evaluate_and_report(parts, state, workdir, {}, config.plain(settings))


def export_run(settings, workdir: Path, output: str, which: str = "latest") -> None:
    """Write a checkpoint in a form for other programs: see `export.export`."""
    target = Path(output)
    file = target.suffix in export.FILES
    if not file and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{output} is not empty: choose another --output, or remove what is in it")
    parts, state = finished(settings, workdir, which)
    io.ensure_writable(target.parent if file else target, "--output")
    scores = workdir / "scores.json"
    scores = io.read_json(scores, "delete it") if scores.is_file() else {}
    found = export.export(parts, state, output, config.plain(settings), scores)
    print(f"exported to {output}; {found}")


def encode_data(settings, output: Path) -> None:
    """Write a data set as latents and text embeddings: see `encode.encode`."""
    prepare(encode.encode, settings, output)
    print(f"encoded to {output}: train with --config.data.source=arrays --config.data.path={output}")


def make_pairs(settings, output: Path) -> None:
    """Write pairs of noise and the teacher's x0: see `pairs.make_pairs`."""
    prepare(pairs.make_pairs, settings, output)
    print(f"pairs in {output}: use them with --config.data.pairs={output}")


def prepare(write: Callable, settings, output: Path) -> None:
    """write(experiment, output, config), once the output is known to be writable."""
    experiment = config.resolve(settings)
    io.ensure_writable(output, "--output")
    cache_programs()
    write(experiment, output, config.plain(settings))


# ---- sampling


def sample(settings, workdir: Path, source: str | None, output: str, which: str = "latest") -> None:
    """Generate images with a trained student: one for each image in `source` (its condition), or, for a student without
    a condition, a grid of 64."""
    task = config.resolve(settings).data.task
    paths = image_files(Path(source), task) if source else []
    outputs = grids.outputs(paths, output, bool(source) and Path(source).is_dir())
    parts, state = finished(settings, workdir, which)
    method, run = parts.experiment.method, parts.experiment.run
    if not isinstance(method, Generator):
        raise ValueError("this method generates no images: use --mode=evaluate or --mode=export")
    student, steps = generate.student_of(parts, state), max(run.sample_steps)
    if source is None:
        return sample_grid(parts, student, output, steps)
    batch = condition_on(parts, paths)
    generated = generate.sample(student, batch, steps, run.seed, task=task)
    drawn = [grids.to_uint8(image[None], path.name)[0] for path, image in zip(paths, generated, strict=True)]
    for path, image in zip(outputs, drawn, strict=True):
        grids.save_image(path, image)
    print(f"{len(paths)} generated in {steps} steps ({method.nfe(steps)} network evaluations each): {output}")
    return None


def sample_grid(parts: Parts, student: generate.Student, output: str, steps: int) -> None:
    """64 samples for the classes or prompts of validation examples, as one image."""
    examples = generate.arrays(data.examples(parts.experiment.data, "validation", 64))
    if "cond" in examples:
        raise ValueError("--mode=sample needs --input: an image, or a folder of images, to condition on")
    images = generate.sample(student, examples, steps, parts.experiment.run.seed)
    grids.save_image(output, grids.grid(images, scale=2))


def condition_on(parts: Parts, paths: list[Path]) -> dict:
    """A batch of null texts with the conditions in these files, as the run's task reads them."""
    task, size = parts.experiment.data.task, parts.experiment.data.size
    example = generate.example(parts.experiment.data)
    size = example["cond"].shape[1] if "cond" in example else size
    conditions = np.stack([task.read(path, size) for path in paths])
    if note := task.input_note(size):
        print(note)
    batch = {name: example[name] for name in ("x0", "null")}
    batch = jax.tree.map(lambda x: np.repeat(x[:1], len(paths), 0), batch)
    batch |= {"cond": conditions, "text": batch["null"]}
    return generate.batch_of(parts, batch)


def image_files(source: Path, task) -> list[Path]:
    """One input, or all in a folder that the task takes as inputs."""
    found = [source]
    if source.is_dir():
        found = task.input_files(
            sorted(p for p in source.iterdir() if images.is_image(p.name) and listing.visible(p.name))
        )
    if not found or not found[0].is_file():
        raise ValueError(f"--input={source} is neither an image nor a folder of images")
    return found

"""What can be done besides training: evaluate, sample and export a run, encode a data set, generate pairs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

import jax
import numpy as np

from cddistill import checkpoint, config, data, export, generate, hub, io, lock, page, plan, sharding, targets
from cddistill.build import Parts, build, in_frozen_dtype, of_one_host, open_checkpoints
from cddistill.data import listing
from cddistill.data.contracts import Task
from cddistill.evals import compare, grids, published
from cddistill.method import Generator
from cddistill.precompute import encode, pairs
from cddistill.step import TrainState
from cddistill.train import cache_programs, check_inputs


def finished(
    settings, workdir: PurePath, which: str = "latest", split: str | None = "validation"
) -> tuple[Parts, TrainState]:
    """(parts, trained weights) of a run: of its "latest" or "best" checkpoint, or of the one of a step, "2000".

    split is the one that will be read. With None, the example that training kept stands for data that is not there.
    Paths in the config may be others than in training, but not the weights that lie there.
    """
    experiment = config.resolve(settings)
    if not experiment.method.turns():  # nothing to train: the student came with config.teacher
        io.ensure_writable(workdir)
        parts = build(experiment, {split: "this mode reads it"} if split else {})
        return parts, parts.init()
    if not (workdir / "checkpoints").is_dir():
        absent = "" if workdir.is_dir() else " does not exist, so it"
        raise ValueError(f"{workdir}{absent} holds no run: train first, with --mode=train --workdir={workdir}")
    plain, paths = config.plain(settings), config.paths(experiment)
    checkpoint.check_config(workdir, plain, {*config.mutable_on_resume(experiment), *paths, "steps"})
    cache_programs(workdir)
    checkpoints = open_checkpoints(workdir, experiment, read_only=True)
    step = checkpoints.resolve(which)
    without_pairs = dataclasses.replace(experiment.data, pairs="")  # only training reads them
    read = without_pairs if split else checkpoint.data_or_example(workdir, without_pairs)
    parts = build(experiment._replace(data=read), {split: "this mode reads it"} if split else {}, training=False)
    check_inputs(workdir, parts, plain, {key for key in paths if not key.startswith("data.")})
    return parts, checkpoints.restore_weights(parts.abstract, step=step)


def evaluate_run(settings, workdir: PurePath, which: str = "latest") -> None:
    """Score a checkpoint on the test split and write the report again; or, by config.protocol, as a published paper."""
    if (run := config.resolve(settings).run).protocol:
        paired = published.of_run(run)[0].given == "pairs"
        parts, state = finished(settings, workdir, which, "test" if paired else None)
        published.evaluate(in_frozen_dtype(parts), state, workdir)
        return
    parts, state = finished(settings, workdir, which, "test")
    compare.evaluate_and_report(in_frozen_dtype(parts), state, workdir, {}, config.plain(settings))


def export_run(
    settings, workdir: PurePath, output: str, which: str = "latest", repository: str = "", space: bool = False,
    write: Callable | None = None, rank: int = 0,
) -> None:  # fmt: skip
    """Write a checkpoint in a form for other programs, whole or not at all: see `export.export`.

    Of several hosts all read it, and the first writes. A folder is then uploaded to a model repository of the hub,
    "user/name", if one is given; with `space` the folder is a Space, with an app.py, and so is the repository.
    write(parts, state, folder) writes a folder of another kind. A rank reduces the student to a LoRA of it.
    """
    target, first = io.path(output), sharding.is_host0()
    file = target.suffix in export.FILES
    if first and not file and target.is_dir() and any(listing.visible(p.name) for p in target.iterdir()):
        raise ValueError(f"{output} is not empty: choose another --output, or remove what is in it")
    for option, given in (("push_to_hub", repository), ("space", space), ("lora_rank", rank)):
        if given and file:
            raise ValueError(f"--{option} is for an export as a folder, and --output={output} is a file: leave one out")
    if repository and first:
        hub.check(repository)
    generates = isinstance(config.resolve(settings).method, Generator)
    parts, state = of_one_host(*finished(settings, workdir, which, None if generates else "train"))
    if not first:
        return
    io.ensure_writable(target.parent if file else target, "--output")
    if write is None:
        scores, plain = compare.read_scores(workdir), config.plain(settings)
        write = lambda parts, state, path: export.export(parts, state, str(path), plain, scores, space, rank)
    if file:
        with io.made_for(target.parent) as folder:
            found = write(parts, state, folder / target.name)
    else:
        with lock.held(target, "--output"), io.draft_of(target) as draft:
            found = write(parts, state, draft)
    print(f"exported to {output}; {found}", flush=True)
    if repository:
        print(f"uploaded to {hub.push(io.local(target), repository, 'Export of cddistill', space)}")


def export_page(settings, workdir: PurePath, output: str, which: str = "latest", runtime: str = "") -> None:
    """Write a page to play with a checkpoint, a folder: see `page.write`."""
    check_generates(config.resolve(settings).method)
    if io.path(output).suffix in export.FILES:
        raise ValueError(f"--page is a folder, and --output={output} names a file: choose another --output")
    export.check_onnx()
    write = lambda parts, state, folder: page.write(parts, state, folder, workdir.name, runtime)
    export_run(settings, workdir, output, which, write=write)


def encode_data(settings, output: PurePath) -> None:
    """Write a data set as latents and text embeddings: see `encode.encode`."""
    prepare(encode.encode, settings, output)
    say(f"encoded to {output}: train with --config.data.source=arrays --config.data.path={output}")


def make_pairs(settings, output: PurePath) -> None:
    """Write pairs of noise and the teacher's x0: see `pairs.make_pairs`."""
    prepare(pairs.make_pairs, settings, output)
    say(f"pairs in {output}: use them with --config.data.pairs={output}")


def plan_run(settings, topology: str, memory: str, output: str) -> None:
    """Print what a run would take of its devices, and write it as JSON: see `plan.plan`."""
    plan.plan_run(settings, targets.target(topology, memory), io.path(output))


def prepare(write: Callable, settings, output: PurePath) -> None:
    """write(experiment, output, config), once the output is known to be writable, and no other process writes it."""
    experiment = config.resolve(settings)
    io.ensure_writable(output, "--output")
    with lock.held(output, "--output", jax.process_index()), io.made_for(output, keep=True) as folder:
        cache_programs(output)
        write(experiment, folder, config.plain(settings))


# ---- sampling


def sample(
    settings, workdir: PurePath, source: str | None, output: str, which: str = "latest", n: int | None = None,
    tiled: bool = False,
) -> None:  # fmt: skip
    """Generate images with a trained student: for each image in `source`, its condition, n in a row (1) or, for a
    student without a condition, a grid of n (64). With `tiled`, images keep their own size. Several hosts generate them
    together, and the first writes them."""
    experiment = config.resolve(settings)
    check_generates(experiment.method)
    task = experiment.data.task
    paths = image_files(Path(source), task) if source else []
    outputs = grids.outputs(paths, output, bool(source) and Path(source).is_dir())
    parts, state = finished(settings, workdir, which, None if source else "validation")
    student, steps = generate.student_of(parts, state), max(parts.experiment.run.sample_steps)
    if source is None:
        images = sample_grid(parts, student, steps, n or 64)
        if sharding.is_host0():
            grids.save_image(output, grids.grid(images, scale=2))
    else:
        n = n or 1
        images = from_inputs(parts, student, steps, [path for path in paths for _ in range(n)], tiled)
        save_groups([path.name for path in paths], images, outputs, n)
    conclude(len(images), steps, student.method, output)


def sample_grid(parts: Parts, student: generate.Student, steps: int, n: int) -> np.ndarray:
    """Images [n, h, w, c] for the classes or prompts of the first n validation examples, or of as many as there are."""
    examples = generate.encoded(parts, data.examples(parts.experiment.data, "validation", n))
    if "cond" in examples:
        raise ValueError("--mode=sample needs --input: an image, or a folder of images, to condition on")
    announce(len(examples["x0"]), steps)
    return generate.sample(student, examples, steps, parts.experiment.run.seed)


def check_generates(method) -> None:
    """ValueError for a method whose result is no generator of images."""
    if not isinstance(method, Generator):
        raise ValueError("this method generates no images: use --mode=evaluate or --mode=export")


def say(text: str) -> None:
    """Print a line, on one host."""
    if sharding.is_host0():
        print(text)


def announce(n: int, steps: int) -> None:
    """A sign of life before the first image."""
    say(f"generating {n} image{'s' * (n > 1)} in {steps} steps; compiling comes first, minutes for a large network")


def conclude(n: int, steps: int, method: Generator, output: str) -> None:
    """What was written, and where."""
    say(f"{n} generated in {steps} steps ({method.nfe(steps)} network evaluations each): {output}")


def save_groups(names: list[str], images: Sequence[np.ndarray], outputs: list[PurePath], n: int) -> None:
    """Images [h, w, c], n of each kind, to files, an equal number in each: one as it is, several as a grid with a row
    for each kind. names are those of the files in messages. Those in one file must be of one size."""
    each = len(images) // len(outputs)
    groups = [np.stack(images[i : i + each]) for i in range(0, len(images), each)]
    pixels = [grids.to_uint8(group, name) for group, name in zip(groups, names, strict=True)]
    for path, group in zip(outputs, pixels, strict=True) if sharding.is_host0() else ():
        grids.save_image(path, group[0] if len(group) == 1 else grids.grid(group, columns=n if n > 1 else None))


def from_inputs(parts: Parts, student: generate.Student, steps: int, paths: list[Path], tiled: bool):
    """An image for each of these files, from its condition, as the run's task reads it, and the null text."""
    experiment, example = parts.experiment, generate.example(parts)
    size = example["cond"].shape[1] if "cond" in example else experiment.data.size
    task = experiment.data.task
    conditions = [(task.read_whole if tiled else task.read)(path, size) for path in paths]
    if note := input_note(task, size, tiled):
        say(note)
    announce(len(paths), steps)
    batch = jax.tree.map(lambda x: np.repeat(x[:1], len(paths), 0), {name: example[name] for name in ("x0", "null")})
    batch["text"] = batch["null"]
    return generate.sample_from(student, parts.pipeline, task, batch, conditions, size, steps, experiment.run.seed)


def input_note(task: Task, size: int, tiled: bool) -> str:
    """A sentence that says how an input is processed, or ""."""
    if tiled:
        return f"inputs keep their own size: they are generated in overlapping tiles of {size} x {size} px"
    return task.input_note(size)


def image_files(source: Path, task) -> list[Path]:
    """One input, or all in a folder that the task takes as inputs."""
    if not source.exists():
        raise ValueError(f"--input={source} does not exist: give an image, or a folder of images")
    found = [source]
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if listing.visible(p.name))
        found = task.input_files([p for p in files if p.name.lower().endswith(task.input_suffixes)])
    if not found or not found[0].is_file():
        known = f"*{', *'.join(task.input_suffixes)}"
        raise ValueError(f"--input={source} is neither an image nor a folder of images ({known})")
    return found

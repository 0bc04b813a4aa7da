"""Evaluate a trained run on the test split: student, teacher, baseline and references, as scores and a report."""

import dataclasses
import time
from pathlib import Path, PurePath

import jax
import numpy as np

from cddistill import clock, data, environment, generate, health, io, pipeline, sharding
from cddistill.build import Parts
from cddistill.evals import grids, regions, report, stored
from cddistill.evals.scores import RECONSTRUCTION, STUDENT, Row, Scores, evaluate, markdown, mean_and_error
from cddistill.generate import Student
from cddistill.method import Generator
from cddistill.step import TrainState

BASELINE = "fine-tuned, not distilled"
REPEATS = 8  # random draws averaged per image, for methods that are `Scored`


def evaluate_and_report(
    parts: Parts, state: TrainState, workdir: PurePath, timings: dict[str, float], config: dict
) -> list[Row]:
    """Score a trained run on the test split, print the table, write scores.json and report.html.

    Those of more images are kept: fewer are reported in scores-16-images.json and report-16-images.html.
    """
    began, examples = time.monotonic(), data.examples(parts.experiment.data, "test", parts.experiment.run.eval_images)
    score = compare if isinstance(parts.experiment.method, Generator) else measure
    rows, figures = score(parts, state, examples, timings)
    if not sharding.is_host0():
        return []
    timings |= {"evaluation, s": time.monotonic() - began}
    print(markdown(rows), flush=True)
    step, suffix = int(state.step), suffix_for(workdir, len(examples["x0"]))
    scores = {row.name: {"n": row.n, "nfe": row.nfe, "step": step, "metrics": row.metrics} for row in rows}
    io.write_json(workdir / f"scores{suffix}.json", scores)
    report.write_report(
        page := workdir / f"report{suffix}.html",
        title=" ".join([config["method"]["name"], config["data"]["source"], config["data"]["task"]]),
        grids=figures,
        rows=rows,
        metrics_path=path if (path := io.joined(workdir / "metrics.jsonl")).is_file() else None,
        config=config,
        timings=timings,
        times=clock.table(workdir),
        versions=environment.versions(),
        notes=[*notes(parts, step), *health_notes(workdir, parts.experiment.method.health_rules())],
    )
    print(f"report: {page}" + " (report.html, of more images, is kept)" * bool(suffix), flush=True)
    return rows


def suffix_for(workdir: PurePath, n: int) -> str:
    """What the names of a report of n images end in: nothing, unless the workdir has one of more images."""
    return f"-{n}-images" if any(row["n"] > n for row in read_scores(workdir).values()) else ""


def read_scores(workdir: PurePath) -> dict[str, dict]:
    """The rows of scores.json by name; {} if there is none. Raises ValueError if it is damaged."""
    path, remedy = workdir / "scores.json", "delete it, and evaluate again"
    rows = io.read_json(path, remedy) if path.is_file() else {}
    for name, row in rows.items():
        if not isinstance(row, dict) or type(row.get("n")) is not int or not isinstance(row.get("metrics"), dict):
            raise ValueError(f"{path} has {name} = {row!r:.60}, which are no scores: {remedy}")
    return rows


def compare(parts: Parts, state: TrainState, examples: dict, timings: dict[str, float]):
    """(rows, figures) of the student and what it is compared with; empty on all hosts but host 0."""
    run, task = parts.experiment.run, parts.experiment.data.task
    batch = generate.batch_of(parts, examples)
    truth = None if "imageless" in examples else generate.targets(parts, examples)
    paired, sets, nfe = "cond" in batch, {}, {}
    if paired:
        sets |= {name: np.asarray(x) for name, x in task.references(batch["cond"]).items()}
    if truth is not None and (reconstruction := generate.reconstruction(parts, batch)) is not None:
        sets[RECONSTRUCTION] = reconstruction
    for name, student, steps in contenders(parts, state):
        label, start = row_name(name, steps), time.monotonic()
        kept = stored.find(baseline_folder(run), student, batch, steps, run.seed) if name == BASELINE else None
        if kept is None:
            sets[label] = generate.sample(student, batch, steps, run.seed, task=task, what=f"sampling {label}")
        else:
            sets[label] = kept
        nfe[label] = student.method.nfe(steps)
        timings |= {f"{'sampling' if kept is None else 'reading'}: {label}, s": time.monotonic() - start}
    if not sharding.is_host0():
        return [], []
    best = row_name("teacher", max(run.teacher_steps)) if run.teacher_steps and not paired else ""
    rows = evaluate(sets, truth, nfe=nfe, paired=paired, teacher=best)
    if paired:
        own = task_scores(task, sets, truth, np.asarray(batch["cond"]))
        rows = [dataclasses.replace(row, metrics=row.metrics | own[row.name]) for row in rows]
    shown = {k: v[:12] for k, v in sets.items()} | ({"truth": truth[:12]} if paired else {})
    n = len(batch["index"])
    caption = f"The first {min(n, 12)} of {n} images of the held-out test split that were evaluated."
    return rows, [(caption, grids.side_by_side(shown))]


def task_scores(task, sets, truth, cond) -> dict[str, Scores]:
    """What only this task measures, by set: scores of regions, and the task's own measures."""
    found = regions.evaluate(sets, truth, task.regions(cond, truth))
    for name, images in sets.items():
        for measure, each in task.measures(images, truth, cond).items():
            found[name][measure] = mean_and_error(each)
    return found


def contenders(parts: Parts, state: TrainState) -> list[tuple[str, Student, int]]:
    """(name, network, steps) of every row that a network generates, in the order of the table."""
    run, student = parts.experiment.run, generate.student_of(parts, state)
    rows = []
    if run.baseline:
        baseline = load_baseline(parts)
        rows += [(BASELINE, baseline(steps), steps) for steps in run.baseline_steps]
    rows += [("teacher", generate.teacher_as_student(run, student), steps) for steps in run.teacher_steps]
    return rows + [(STUDENT, student, steps) for steps in run.sample_steps]


def measure(parts: Parts, state: TrainState, examples: dict, timings: dict[str, float]):
    """(rows, figures) of a `Scored` method: mean and standard error over images, each averaged over REPEATS draws."""
    batch, seed = generate.encoded(parts, examples), parts.experiment.run.seed
    student, n = generate.student_of(parts, state), len(examples["x0"])
    repeats = [generate.score(student, batch, seed + i) for i in range(REPEATS)]
    each = jax.tree.map(lambda *x: np.mean(x, 0, np.float64), *repeats)
    means = {name: mean_and_error(x) for name, x in each.items()}
    shown = generate.pictures(student, jax.tree.map(lambda x: x[:12], batch))
    figures = [("The first images of the held-out test split.", grids.side_by_side(shown))] if shown else []
    return [Row("metric", means, n)], figures


def row_name(name: str, steps: int) -> str:
    """ "student, 4 steps"."""
    return f"{name}, {steps} step{'s' * (steps > 1)}"


def baseline_folder(run) -> Path:
    """The folder of config.baseline, which may be the name of an embedded one."""
    return pipeline.Pipeline(run.baseline).root


def load_baseline(parts: Parts):
    """baseline(steps) -> Student: config.baseline, the network fine-tuned without distillation.

    For a number of steps in sample_steps it uses the student's timesteps, else evenly spaced ones. Raises ValueError if
    the folder does not hold a UNet and a ControlNet.
    """
    run, method = parts.experiment.run, parts.experiment.method
    if not parts.experiment.data.task.conditional:
        raise ValueError("config.baseline needs a conditioning image: set data.task, or baseline=''")
    folder = pipeline.Pipeline(run.baseline)
    unet, controlnet = folder.denoiser, folder.controlnet(run.baseline)
    student = Student(method, parts.mesh, parts.frozen, {}, {})

    def baseline(steps):
        sampling = method.sampling(unet.schedule, steps) if steps in run.sample_steps else None
        return generate.baseline_as_student(student, unet, controlnet, (sampling and sampling.timesteps) or ())

    return baseline


def notes(parts: Parts, step: int) -> list[str]:
    """Notes for the readers of the report, which is of the weights after `step` train steps."""
    run = parts.experiment.run
    lines = [f"The weights are those after {step} of {run.steps} planned steps."] * bool(
        parts.experiment.method.turns()
    )
    if not isinstance(parts.experiment.method, Generator):
        return [*lines, f"Random draws use seed {run.seed}; standard errors are over images, not over training seeds."]
    lines += [
        f"All rows use the same initial noise (seed {run.seed}); standard errors are over images, not training seeds."
    ]
    if run.baseline:
        lines.append(
            f"The fine-tuned network ({run.baseline}) has the same architecture and was trained as a conditional "
            "diffusion model, for its own number of updates; for the student's numbers of steps it uses the student's "
            "timesteps."
        )
    return lines + [parts.experiment.data.source.note] * bool(parts.experiment.data.source.note)


def health_notes(workdir: PurePath, rules: health.Rules) -> list[str]:
    """The alarms of the health rules in the run's metrics."""
    alarms = health.diagnose(records := health.read(io.joined(workdir / "metrics.jsonl")), rules)
    lines = [f"Health: {alarm.name} from step {alarm.step} on: {alarm.words}." for alarm in alarms]
    return lines or ["Health: no sign of a failing run in its metrics."] * bool(records)

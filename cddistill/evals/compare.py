"""Evaluate a trained run on the test split: student, teacher, baseline and references, as scores and a report."""

import dataclasses
import time
from pathlib import Path, PurePath

import jax
import numpy as np

from cddistill import clock, data, environment, generate, health, io, pipeline, sharding
from cddistill.build import Parts
from cddistill.evals import grids, regions, report, scores, stored
from cddistill.evals.scores import RECONSTRUCTION, STUDENT, Row, markdown, mean_and_error
from cddistill.generate import Student
from cddistill.method import Generator
from cddistill.step import TrainState

BASELINE = "fine-tuned, not distilled"
PART = 64  # images that are generated and measured before the next
SHOWN = 12  # images in the report
REPEATS = 8  # random draws averaged per image, for methods that are `Scored`


def evaluate_and_report(
    parts: Parts, state: TrainState, workdir: PurePath, timings: dict[str, float], config: dict
) -> list[Row]:
    """Score a trained run on the test split, print the table, write scores.json and report.html.

    Those of more images are kept: fewer are reported in scores-16-images.json and report-16-images.html.
    """
    began, there = time.monotonic(), len(data.load(parts.experiment.data, "test", augment=False))
    n = min(parts.experiment.run.eval_images or there, there)
    score = compare if isinstance(parts.experiment.method, Generator) else measure
    rows, figures = score(parts, state, n, timings)
    if not sharding.is_host0():
        return []
    timings |= {"evaluation, s": time.monotonic() - began}
    print(markdown(rows), flush=True)
    step, suffix = int(state.step), suffix_for(workdir, n)
    found = {row.name: {"n": row.n, "nfe": row.nfe, "step": step, "metrics": row.metrics} for row in rows}
    io.write_json(workdir / f"scores{suffix}.json", found)
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


def compare(parts: Parts, state: TrainState, n: int, timings: dict[str, float]):
    """(rows, figures) of the student and what it is compared with, on n images; empty on all hosts but host 0.

    Images are generated and measured a part at a time, by all hosts together: no set of images is ever in memory.
    """
    generating, found, shown = contenders(parts, state), [], {}
    kept = kept_images(parts, generating, n, timings)
    for numbers in cut(n, generate.at_a_time(parts.mesh)):
        sets, truth, cond = images_of(parts, generating, kept, numbers, n, timings)
        shown = shown or {k: x[:SHOWN] for k, x in (sets | ({} if cond is None else {"truth": truth})).items()}
        found.append(measured(parts, sets, truth, cond, numbers))
    if not sharding.is_host0():
        return [], []
    whole = scores.joined(found)
    rows = scores.table(whole, {row_name(name, steps): x.method.nfe(steps) for name, x, steps in generating})
    own = [regions.means({k: x for k, x in row.each.items() if k not in whole.columns}) for row in rows]
    rows = [dataclasses.replace(row, metrics=row.metrics | x) for row, x in zip(rows, own, strict=True)]
    caption = f"The first {min(n, SHOWN)} of {n} images of the held-out test split that were evaluated."
    return rows, [(caption, grids.side_by_side(shown))]


def measured(parts: Parts, sets, truth, cond, numbers: np.ndarray) -> scores.Measured:
    """What is measured of the images of these numbers, with the task's own measures; the same on all hosts, each of
    which measures its share."""
    run, task, paired = parts.experiment.run, parts.experiment.data.task, cond is not None
    for name, images in sets.items():
        scores.as_rgb(name, images, int(numbers[0]))  # so that what is wrong with one is said by all hosts
    mine = sharding.share(len(numbers))
    sets = {name: images[mine] for name, images in sets.items()}
    truth, cond = (None if x is None else x[mine] for x in (truth, cond))
    best = row_name("teacher", max(run.teacher_steps)) if run.teacher_steps and not paired else ""
    part = scores.measure(sets, truth, paired=paired, teacher=best, first=int(numbers[0]))
    own = regions.measure(sets, truth, task.regions(cond, truth)) if paired else {}
    own = {name: own[name] | task.measures(sets[name], truth, cond) for name in own}
    each = {name: x | own.get(name, {}) for name, x in part.each.items()}
    found, features = sharding.gathered((each, part.features), len(numbers))
    each = {name: {column: found[name][column] for column in x} for name, x in each.items()}  # JAX sorts the keys
    return part._replace(n=dict.fromkeys(part.n, len(numbers)), each=each, features=features)


def cut(n: int, at_once: int) -> list[np.ndarray]:
    """The numbers of n images, int32, in parts of about PART that programs for `at_once` images divide; the last part
    has up to twice as many, as fewer would need programs of their own."""
    size = max(PART // at_once, 1) * at_once
    return np.split(np.arange(n, dtype=np.int32), range(size, n - size + 1, size))


def images_of(parts: Parts, generating, kept, numbers: np.ndarray, n: int, timings: dict[str, float]):
    """({row: images}, targets, conditions) of the images of these numbers; the latter two None where there are none.

    Images are float [b, h, w, c] in [0, 1]; `generating` are contenders, of which `kept` are not generated again.
    """
    run, task = parts.experiment.run, parts.experiment.data.task
    examples = generate.examples_of(parts, "test", numbers)
    batch = generate.batch_of(parts, examples) | {"index": numbers}
    truth, cond = None if "imageless" in examples else generate.targets(parts, examples), batch.get("cond")
    sets = {} if cond is None else {name: np.asarray(x) for name, x in task.references(cond).items()}
    if truth is not None and (reconstruction := generate.reconstruction(parts, batch)) is not None:
        sets[RECONSTRUCTION] = reconstruction
    for name, student, steps in generating:
        label, start = row_name(name, steps), time.monotonic()
        if label in kept:
            sets[label] = kept[label][numbers]
            continue
        what = f"sampling {label}" + f", images {numbers[0]} to {numbers[-1]} of {n}" * (len(numbers) < n)
        sets[label] = generate.sample(student, batch, steps, run.seed, task=task, what=what)
        timing = f"sampling: {label}, s"
        timings[timing] = timings.get(timing, 0.0) + time.monotonic() - start
    return sets, truth, None if cond is None else np.asarray(cond)


def kept_images(parts: Parts, generating, n: int, timings: dict[str, float]) -> dict[str, np.ndarray]:
    """{row: n images} of the baseline that were stored before: see `stored`. What they are of is compared."""
    run, found = parts.experiment.run, {}
    for name, student, steps in generating:
        if name != BASELINE or stored.number(baseline_folder(run), steps) != n:
            continue
        start, batch = time.monotonic(), generate.batch_of(parts, data.examples(parts.experiment.data, "test", n))
        if (images := stored.find(baseline_folder(run), student, batch, steps, run.seed)) is not None:
            found[row_name(name, steps)] = images
            timings[f"reading: {row_name(name, steps)}, s"] = time.monotonic() - start
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


def measure(parts: Parts, state: TrainState, n: int, timings: dict[str, float]):
    """(rows, figures) of a `Scored` method: mean and standard error over images, each averaged over REPEATS draws."""
    seed, student, found, figures = parts.experiment.run.seed, generate.student_of(parts, state), [], []
    for numbers in cut(n, PART):
        batch = generate.encoded(parts, generate.examples_of(parts, "test", numbers)) | {"index": numbers}
        repeats = [generate.score(student, batch, seed + i) for i in range(REPEATS)]
        found.append(jax.tree.map(lambda *x: np.mean(x, 0, np.float64), *repeats))
        if len(found) == 1 and (shown := generate.pictures(student, jax.tree.map(lambda x: x[:SHOWN], batch))):
            figures = [("The first images of the held-out test split.", grids.side_by_side(shown))]
    means = {name: mean_and_error(np.concatenate([part[name] for part in found])) for name in found[0]}
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

"""Looking at a student: sample grids while it trains, the comparison with its baselines, the report, and single
pictures; and at a metric: how often it is right."""

import importlib.metadata
import json
import pathlib
import platform
import time

import jax
import numpy as np

import cddistill
from cddistill import data, evals, health, models, sharding
from cddistill.build import Parts, arrays, as_method, decoder, sampler, scorer
from cddistill.data import images, tasks
from cddistill.evals import grids, pairs
from cddistill.method import Generator
from cddistill.methods import METHODS
from cddistill.step import TrainState

DRAWS = 8  # of the random part of a metric's test, for each image


def preview(parts: Parts):
    """What is looked at now and then while training, see Preview and Validation."""
    return Preview(parts) if isinstance(parts.experiment.method, Generator) else Validation(parts)


class Preview:
    """A grid of fixed validation examples, drawn now and then while training."""

    def __init__(self, parts: Parts, n: int = 8):
        self.parts, self.n, self.batch, self.truth = parts, n, None, None
        self.sample = sampler(parts)

    def __call__(self, state, step: int, workdir: pathlib.Path, writer) -> dict[str, float]:
        """Write samples/<step>.png; of the last number of steps the validation PSNR or, without a truth, diversity."""
        if self.batch is None:
            self.batch = arrays(data.examples(self.parts.experiment.data, "validation", self.n))
            self.truth = decoder(self.parts)(self.batch["x0"]) if "cond" in self.batch else None
        run = self.parts.experiment.run
        students = {f"{k} steps": self.sample(state, self.batch, k, run.seed) for k in run.sample_steps}
        rows, drawn = students, list(students.values())[-1]
        if self.truth is not None:
            rows = {"input": self.batch["cond"]} | students | {"truth": self.truth}
            scores = {"val/psnr": float(np.mean(pairs.psnr(drawn, self.truth)))}
        else:
            others = self.sample(state, self.batch, run.sample_steps[-1], run.seed + 1)
            scores = {"val/diversity": diversity(drawn, others)}
        if sharding.is_host0():
            grids.save_png(workdir / "samples" / f"{step:06d}.png", grids.side_by_side(rows))
            writer.write_images(step, {"samples": np.concatenate([np.asarray(x)[..., :3] for x in rows.values()])})
            writer.write_scalars(step, scores)
        return scores


class Validation:
    """The scores of a metric on fixed validation images, now and then while training."""

    def __init__(self, parts: Parts, n: int = 256):
        self.parts, self.n, self.batch, self.score = parts, n, None, scorer(parts)

    def __call__(self, state, step: int, workdir: pathlib.Path, writer) -> dict[str, float]:
        """The mean of each score."""
        if self.batch is None:
            self.batch = arrays(data.examples(self.parts.experiment.data, "validation", self.n))
        each = self.score(state, self.batch, self.parts.experiment.run.seed)
        scores = {f"val/{name}": float(x.mean()) for name, x in each.items()}
        if sharding.is_host0():
            writer.write_scalars(step, scores)
        return scores


def diversity(a, b) -> float:
    """How much images [n, ...] change with the noise: the spread between two draws over that of all images, squared;
    0 if noise makes no difference, at most about 1."""
    return float(np.mean((a - b) ** 2) / max(2.0 * np.var(np.stack([a, b]), axis=(0, 1)).mean(), 1e-12))


def report(
    parts: Parts, state: TrainState, workdir: pathlib.Path, timings: dict[str, float], config: dict
) -> list[evals.Row]:
    """Score what was trained on the test split, print the table, write scores.json and report.html."""
    began, examples = time.monotonic(), data.examples(parts.experiment.data, "test", parts.experiment.run.eval_images)
    score = compare if isinstance(parts.experiment.method, Generator) else measure
    rows, figures = score(parts, state, examples, timings)
    if not sharding.is_host0():
        return []
    timings |= {"evaluation, s": time.monotonic() - began}
    print(evals.markdown(rows), flush=True)
    scores = {row.name: {"n": row.n, "nfe": row.nfe, "metrics": row.metrics} for row in rows}
    grids.replace(workdir / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
    evals.write_report(
        workdir / "report.html",
        title=" ".join([config["method"]["name"], config["data"]["source"], config["data"]["task"]]),
        grids=figures,
        rows=rows,
        metrics_path=path if (path := workdir / "metrics.jsonl").is_file() else None,
        config=config,
        timings=timings,
        versions=versions(),
        notes=[*notes(parts), *health_of(workdir)],
    )
    print(f"report: {workdir / 'report.html'}", flush=True)
    return rows


def compare(parts: Parts, state: TrainState, examples: dict, timings: dict[str, float]):
    """(rows, figures) of the student and what it is compared with; none but on host 0."""
    run, batch = parts.experiment.run, arrays(examples)
    truth, paired = None if "imageless" in examples else decoder(parts)(examples["x0"]), "cond" in batch
    sets, nfe = {}, {}
    if paired and parts.experiment.data.task == "sr":
        sets["bicubic"] = np.asarray(batch["cond"])
    compared = [("teacher", teacher(parts), state, steps) for steps in run.teacher_steps]
    compared += [("student", parts, state, steps) for steps in run.sample_steps]
    if run.baseline:
        nets = load_baseline(parts)
        compared = [("fine-tuned, not distilled", *nets(k), k) for k in run.baseline_steps] + compared
    for name, its_parts, its_state, steps in compared:
        label, start = label_of(name, steps), time.monotonic()
        sets[label] = sampler(its_parts)(its_state, batch, steps, run.seed)
        nfe[label] = its_parts.experiment.method.nfe(steps)
        timings |= {f"sampling: {label}, s": time.monotonic() - start}
    if not sharding.is_host0():
        return [], []
    best = label_of("teacher", max(run.teacher_steps)) if run.teacher_steps and not paired else ""
    rows = evals.evaluate(sets, truth, nfe=nfe, paired=paired, teacher=best)
    shown = {k: v[:12] for k, v in sets.items()} | ({"truth": truth[:12]} if paired else {})
    caption = f"The first of the test split, never seen in training ({len(batch['index'])} in all)."
    return rows, [(caption, grids.side_by_side(shown))]


def measure(parts: Parts, state: TrainState, examples: dict, timings: dict[str, float]):
    """(rows, figures) of a metric, which has none of these: the mean over images of what a few draws say on average."""
    score, batch, seed = scorer(parts), arrays(examples), parts.experiment.run.seed
    draws = [score(state, batch, seed + i) for i in range(DRAWS)]
    each = jax.tree.map(lambda *x: np.mean(x, 0, np.float64), *draws)
    n = len(batch["index"])
    means = {name: (x.mean(), x.std(ddof=1) / n**0.5 if n > 1 else np.nan) for name, x in each.items()}
    return [evals.Row("metric", means, n)], []


def label_of(name: str, steps: int) -> str:
    """The name of a row."""
    return f"{name}, {steps} step{'s' * (steps > 1)}"


def teacher(parts: Parts) -> Parts:
    """Parts whose student is the teacher itself."""
    method = as_method(parts.experiment.run, parts.frozen["teacher"].schedule)
    return parts._replace(experiment=parts.experiment._replace(method=method))


def load_baseline(parts: Parts):
    """steps -> (parts, state) of config.baseline, the network that was fine-tuned without distillation.

    At a number of steps that the student is sampled in too, it is sampled at the student's times, else at even ones.
    Raises ValueError if the folder does not hold a UNet and a ControlNet.
    """
    run, student = parts.experiment.run, parts.experiment.method
    if parts.experiment.data.task == "none":
        raise ValueError("config.baseline is a network with a condition: set data.task, or baseline=''")
    nets = {"backbone": models.load(run.baseline), "branch": models.load(run.baseline, subfolder="controlnet")}
    state = TrainState(np.int32(0), nets, nets, {})

    def at(steps):
        power = getattr(student, "grid_power", 1.0) if steps in run.sample_steps else 1.0
        method = METHODS["diffusion"](adapter="controlnet", grid_power=power)
        return parts._replace(experiment=parts.experiment._replace(method=method)), state

    return at


def notes(parts: Parts) -> list[str]:
    """What a reader of the report must know to judge it."""
    run = parts.experiment.run
    if not isinstance(parts.experiment.method, Generator):
        return [f"What is random follows seed {run.seed}; error bars are over images, not over training seeds."]
    lines = [
        f"All rows start from the same noise (seed {run.seed}); error bars are over images, not over training seeds."
    ]
    if run.baseline:
        lines.append(
            "The fine-tuned network is the same architecture, trained as a conditional diffusion model; where it takes "
            "as many steps as the student, it takes them at the student's times."
        )
    if run.baseline == "emoji_sr":
        lines.append("It ships with the package; configs/finetune_sr.py made it, with its own number of updates.")
    if parts.experiment.data.source == "emoji":
        lines.append("The networks are told the picture's group, as the teacher was; bicubic upscaling is not.")
    return lines


def health_of(workdir) -> list[str]:
    """What the run's metrics say about it."""
    alarms = health.diagnose(records := health.read(workdir / "metrics.jsonl"))
    said = [f"Health: {alarm.name} from step {alarm.step} on: {alarm.words}." for alarm in alarms]
    return said or ["Health: nothing in the metrics of this run calls for a remark."] * bool(records)


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    found = {"cddistill": cddistill.__version__} | {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "devices": f"{jax.device_count()} x {device.device_kind}"}


def pictures(source: pathlib.Path) -> list[pathlib.Path]:
    """One picture, or all of a folder."""
    found = [source]
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.suffix.lower() in images.SUFFIXES)
    if not found or not found[0].is_file():
        raise ValueError(f"--input={source} is neither a picture nor a folder of pictures")
    return found


def read_condition(path: pathlib.Path, size: int, scale: int) -> np.ndarray:
    """A low-resolution picture as the condition [size, size, 3] in [0, 1]; larger pictures are first made small."""
    return tasks.upsample(images.fit(images.read(path), size // scale), size)


def sample(parts: Parts, state: TrainState, source: str | None, output: str, steps: int | None = None) -> None:
    """Draw pictures with a trained student: one for each picture in `source` (its condition), or a sheet without
    one."""
    config, run = parts.experiment.data, parts.experiment.run
    if not isinstance(parts.experiment.method, Generator):
        raise ValueError("this method trains a metric and draws nothing: use --mode=evaluate or --mode=export")
    steps = steps or max(run.sample_steps)
    examples = arrays(data.examples(config, "validation", 64 if source is None else 1))
    if source is None and "cond" in examples:
        raise ValueError("--mode=sample needs --input: a picture, or a folder of pictures, to condition on")
    if source is None:
        return grids.save_png(output, grids.grid(sampler(parts)(state, examples, steps, run.seed), scale=2))
    if config.task != "sr":
        raise ValueError(f"--mode=sample with --input knows the task sr, not {config.task!r}")
    paths = pictures(pathlib.Path(source))
    size = examples["cond"].shape[1]
    small = size // config.scale
    print(f"{small} x {small} px become {size} x {size}; a larger picture is first reduced to that")
    conditions = np.stack([read_condition(path, size, config.scale) for path in paths])
    batch = jax.tree.map(lambda x: np.repeat(x[:1], len(paths), 0), examples)
    batch |= {"cond": conditions, "text": batch["null"], "index": np.arange(len(paths), dtype=np.int32)}
    drawn = sampler(parts)(state, batch, steps, run.seed)
    for path, image in zip(paths, drawn, strict=True):
        to = pathlib.Path(output) / f"{path.stem}.png" if pathlib.Path(source).is_dir() else pathlib.Path(output)
        grids.save_png(to, grids.to_uint8(image[None])[0])
    print(f"{len(paths)} drawn in {steps} steps ({parts.experiment.method.nfe(steps)} network calls each): {output}")
    return None

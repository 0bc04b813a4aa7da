"""Compare all methods with one teacher on one data set: quality against the cost of training and sampling.

    python benchmarks/methods.py --output=runs/methods --seconds=240 --seeds=3

Class-conditional emoji. Every method trains for the same wall time, which includes making the pairs of Diffusion2GAN
and excludes compilation, sampling and scoring. The cost is also counted in evaluations of the teacher's network on one
image: FLOPs of the compiled step over those of a forward pass. At every snapshot (a quarter of the time, a half ...)
the student generates images of the test split's classes. Writes methods.md and methods.png: the table has the scores
at the end of the time, and at the number of evaluations that all methods reached. Finished runs are kept in
snapshots_*.json and not repeated. To add a method, add it to METHODS.
"""

import argparse
import json
import pathlib
import runpy
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np
from compare import spread
from matplotlib.figure import Figure

from cddistill import config, data, generate
from cddistill.build import build
from cddistill.evals import preview, scores
from cddistill.precompute import pairs
from cddistill.step import active
from cddistill.train import cache_programs

ROOT = pathlib.Path(__file__).parents[1]
KID = "KID-EffLite0@64"
COLUMNS = (KID, "Recall-EffLite0", f"{KID} to the teacher", "LPIPS-VGG to the teacher", "diversity")


class Contender(NamedTuple):
    """A config file, its variant, changes to it, and the numbers of sampling steps of its student."""

    file: str
    variant: str = ""
    changes: dict = {}
    steps: tuple[int, ...] = (1,)


METHODS = {
    "CoDi": Contender("ccd_sr.py", steps=(1, 4), changes={
        "data.task": "none", "method.adapter": "none", "method.grid_power": 1.0, "optim.decay": "constant",
        "baseline": "",
        "teacher_steps": (50,), "teacher_guidance": 2.0, "batch_size": 8,
    }),
    "DMD2": Contender("dmd2_emoji.py"),
    "DMD2 four-step": Contender("dmd2_emoji.py", "four", steps=(4,)),
    "Diffusion2GAN": Contender("d2g_emoji.py", changes={"num_pairs": 512, "method.warmup": 100}),
}  # fmt: skip


class Snapshot(NamedTuple):
    """The scores of a student at some time of its training."""

    seconds: float
    evaluations: float  # of the network on one image, so far
    scores: dict[str, dict[str, float]]  # by number of steps


def settings_of(contender: Contender, seed: int, folder: pathlib.Path):
    """The contender's config."""
    get_config = runpy.run_path(ROOT / "configs" / contender.file)["get_config"]
    settings = get_config(contender.variant) if contender.variant else get_config()
    changes = {"seed": seed, "steps": 1_000_000, "sample_steps": contender.steps} | contender.changes
    if settings.data.pairs:
        changes["data.pairs"] = str(folder / f"pairs-{seed}")
    with settings.unlocked():
        settings.update_from_flattened_dict(changes)
    return settings


def flops(f, *args) -> float:
    """FLOPs of a jitted function."""
    return f.lower(*args).compile().cost_analysis()["flops"]


def train(contender: Contender, seed: int, args, reference: dict) -> list[Snapshot]:
    """The contender's snapshots. Making pairs counts as training time. For reference see `make_evaluator`."""
    settings = settings_of(contender, seed, args.output)
    clock, evaluations = make_pairs(settings) if settings.data.pairs else (0.0, 0.0)
    parts = build(config.resolve(settings))
    turns, size, driver = parts.experiment.method.turns(), parts.experiment.run.batch_size, parts.driver()
    stream = data.batches(parts.experiment.data, batch_size=size, seed=seed, rows=parts.rows)
    state, frozen = driver.put_state(parts.init()), driver.put_frozen(parts.frozen)
    batch = driver.put_batch(next(stream))
    forward = flops(jax.jit(lambda net, b: net(b["x0"], 500, b["text"]).x0), parts.frozen["teacher"], batch)
    evaluate, snapshots, cost, number = make_evaluator(parts, contender.steps, reference), [], {}, 0
    for share in args.snapshots:
        while clock < share * args.seconds:
            play = active(turns, number)
            if new := play not in cost:  # the step that compiles is not timed
                cost[play] = size * flops(driver.step, state, frozen, batch, play) / forward
            start = time.perf_counter()
            state, metrics = driver.step(state, frozen, driver.put_batch(next(stream)), play)
            jax.block_until_ready(metrics)
            clock += 0.0 if new else time.perf_counter() - start
            number, evaluations = number + 1, evaluations + cost[play]
        snapshots.append(Snapshot(clock, evaluations, evaluate(driver.get_state(state))))
        kid = ", ".join(f"KID {scores[KID]:.4g} in {k}" for k, scores in snapshots[-1].scores.items())
        print(f"{clock:6.0f} s, {number} steps, {evaluations:.3g} evaluations: {kid}", flush=True)
    return snapshots


def make_pairs(settings) -> tuple[float, float]:
    """Seconds and network evaluations that the pairs took; they are made once, and the seconds are stored with them."""
    folder, noted = pathlib.Path(settings.data.pairs), pathlib.Path(settings.data.pairs) / "seconds"
    if not noted.is_file():
        start = time.perf_counter()
        pairs.make_pairs(config.resolve(settings), folder, config.plain(settings))
        noted.write_text(f"{time.perf_counter() - start}")
    calls = settings.teacher_steps[-1] * (2 if settings.teacher_guidance != 1.0 else 1)
    return float(noted.read_text()), settings.num_pairs * calls


def make_evaluator(parts, steps, reference):
    """evaluate(state) -> by number of steps, the scores of images that the student generates for the test split.

    reference, {} at first, caches the teacher's images, which are the same for all methods: the noise is the same.
    """
    run, batch = parts.experiment.run, generate.arrays(data.examples(parts.experiment.data, "test"))
    truth, uncompiled = generate.decode(parts.frozen["autoencoder"], batch["x0"]), {*steps}

    def evaluate(state):
        student = generate.student_of(parts, state)
        if "teacher" not in reference:
            teacher = generate.teacher_as_student(run, student)
            reference["teacher"] = generate.sample(teacher, batch, run.teacher_steps[-1], run.seed)
        for k in uncompiled:  # compile
            generate.sample(student, batch, k, run.seed)
        uncompiled.clear()
        found_by_steps = {}
        for k in steps:
            start = time.perf_counter()
            images = generate.sample(student, batch, k, run.seed)
            latency = (time.perf_counter() - start) / len(images)
            _, row = scores.evaluate(reference | {"student": images}, truth, paired=False, teacher="teacher")
            found = {name: float(value[0]) for name, value in row.metrics.items() if value} | {"latency": latency}
            found["diversity"] = preview.diversity(images, generate.sample(student, batch, k, run.seed + 1))
            found_by_steps[str(k)] = found
        return found_by_steps

    return evaluate


def rows(results: dict[str, list[list[Snapshot]]]) -> dict[str, tuple[list[list[Snapshot]], str]]:
    """Every student with its snapshots by seed: name -> (snapshots, number of steps)."""
    return {
        f"{name}, {k} step{'s' * (k > 1)}": (by_seed, str(k))
        for name, by_seed in results.items()
        for k in METHODS[name].steps
    }


def at(snapshots: list[Snapshot], k: str, column: str, evaluations: float) -> float:
    """A score at some number of evaluations, interpolated between snapshots."""
    return float(np.interp(evaluations, [x.evaluations for x in snapshots], [x.scores[k][column] for x in snapshots]))


def table(results, args) -> str:
    """Means over seeds with standard errors, at the end of the time and at equal evaluations."""
    fewest = min(snapshots[-1].evaluations for by_seed in results.values() for snapshots in by_seed)
    lines = []
    for title, where in ((f"at {args.seconds:.0f} s", None), (f"at {fewest:.3g} evaluations", fewest)):
        lines += [f"| {title} | evaluations | ms an image |", "|---|---|---|"]
        lines[-2] += " ".join(f" {c} |" for c in COLUMNS)
        lines[-1] += "---|" * len(COLUMNS)
        for name, (by_seed, k) in rows(results).items():
            spent = [x[-1].evaluations if where is None else where for x in by_seed]
            latency = statistics.mean(x[-1].scores[k]["latency"] for x in by_seed)
            cells = [name, f"{statistics.mean(spent):.3g}", f"{1e3 * latency:.1f}"]
            for c in COLUMNS:
                values = [at(x, k, c, e) for x, e in zip(by_seed, spent, strict=True)]
                cells.append(spread(values))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def figure(results) -> Figure:
    """KID against training time and latency, diversity against training time; one line per student."""
    fig = Figure((13, 4), layout="constrained")
    axes = fig.subplots(1, 3)
    for name, (by_seed, k) in rows(results).items():
        mean = lambda value, by_seed=by_seed: np.mean([[value(x) for x in snapshots] for snapshots in by_seed], 0)
        seconds, kid = mean(lambda x: x.seconds), mean(lambda x, k=k: x.scores[k][KID])
        axes[0].plot(seconds, kid, "o-", label=name)
        axes[1].plot(1e3 * mean(lambda x, k=k: x.scores[k]["latency"])[-1:], kid[-1:], "o", label=name)
        axes[2].plot(seconds, mean(lambda x, k=k: x.scores[k]["diversity"]), "o-", label=name)
    for ax, x, y in zip(
        axes, ("training, s", "sampling, ms an image", "training, s"), (KID, KID, "diversity"), strict=True
    ):
        ax.set(xlabel=x, ylabel=y)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    return fig


def main():
    """Train, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/methods"))
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--snapshots", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="shares of the time")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    cache_programs()
    kept = args.output / f"snapshots_{args.seconds:.0f}s.json"
    results = {name: [] for name in args.only} | (json.loads(kept.read_text()) if kept.is_file() else {})
    for seed in range(args.seeds):
        reference = {}
        for name in args.only:
            if seed >= len(results[name]):
                print(f"{name}, seed {seed}", flush=True)
                results[name].append(train(METHODS[name], seed, args, reference))
                kept.write_text(json.dumps(results))
    results = {
        name: [[Snapshot(*x) for x in snapshots] for snapshots in results[name][: args.seeds]] for name in args.only
    }
    text = table(results, args)
    print(text)
    (args.output / "methods.md").write_text(text)
    figure(results).savefig(args.output / "methods.png", dpi=120)


if __name__ == "__main__":
    main()

"""Compare all methods with one teacher on one data set: quality against the cost of training and sampling.

    python -m cddistill.main --config=configs/dmd2_pocket.py:encode --mode=encode --output=runs/pocket_embedded
    python benchmarks/methods.py --output=runs/methods --seconds=1200 --seeds=3

Icons and scenes from prompts, on the latents of the embedded pocket pipeline. Every method trains for the same wall
time, which includes making the pairs of Diffusion2GAN and excludes compilation, sampling and scoring. The cost is also
counted in evaluations of the teacher's network on one image: FLOPs of the compiled step over those of a forward pass.
At every snapshot (a quarter of the time, a half ...) the student generates images of the test split's prompts. Writes
methods.md and methods.png: the table has the teacher, and the students' scores at the end of the time, and at the
number of evaluations that all methods reached. Finished runs are kept in snapshots_*.json and not repeated. To add a
method, add it to METHODS.
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


CONSTANT = {"optim.student.decay": "constant"}  # the number of updates is not known before
METHODS = {
    "CoDi": Contender("ccd_inpaint.py", "pocket", steps=(1, 4), changes={
        "data.task": "none", "method.adapter": "none", "optim.decay": "constant",
        "data.source": "arrays", "data.path": "runs/pocket_embedded", "teacher_steps": (50,), "teacher_guidance": 2.5,
    }),
    "DMD2": Contender("dmd2_pocket.py", changes=CONSTANT),
    "DMD2 four-step": Contender("dmd2_pocket.py", "four", changes=CONSTANT, steps=(4,)),
    "Diffusion2GAN": Contender("d2g_pocket.py", changes={"num_pairs": 256, "method.warmup": 150}),
}  # fmt: skip
TEACHER = "teacher"


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


def train(contender: Contender, seed: int, args, teacher: np.ndarray) -> list[Snapshot]:
    """The contender's snapshots, compared with the teacher's images. Making pairs counts as training time."""
    settings = settings_of(contender, seed, args.output)
    clock, evaluations = make_pairs(settings) if settings.data.pairs else (0.0, 0.0)
    parts = build(config.resolve(settings))
    turns, size, driver = parts.experiment.method.turns(), parts.experiment.run.batch_size, parts.driver()
    state, frozen = driver.put_state(parts.init()), driver.put_frozen(parts.frozen)
    stream = parts.batches(driver, frozen)
    batch = next(stream)
    forward = flops(jax.jit(lambda net, b: net(b["x0"], 500, b["text"]).x0), parts.frozen["teacher"], batch)
    snapshots, cost, number, test = [], {}, 0, test_set(parts, args.images)
    for share in args.snapshots:
        while clock < share * args.seconds:
            play = active(turns, number)
            if new := play not in cost:  # the step that compiles is not timed
                cost[play] = size * flops(driver.step, state, frozen, batch, play) / forward
            start = time.perf_counter()
            state, metrics = driver.step(state, frozen, next(stream), play)
            jax.block_until_ready(metrics)
            clock += 0.0 if new else time.perf_counter() - start
            number, evaluations = number + 1, evaluations + cost[play]
        student = generate.student_of(parts, driver.get_state(state))
        found = {k: score(student, k, test, seed, teacher)[0] for k in contender.steps}
        snapshots.append(Snapshot(clock, evaluations, {str(k): x for k, x in found.items()}))
        kid = ", ".join(f"KID {x[KID]:.4g} in {k}" for k, x in found.items())
        print(f"{clock:6.0f} s, {number} steps, {evaluations:.3g} evaluations: {kid}", flush=True)
    return snapshots


def sample_teacher(seed: int, args) -> list[Snapshot]:
    """The teacher's scores in as few steps as the students and in many, whose images are stored for the comparison with
    students from the same noise."""
    parts = build(config.resolve(settings_of(METHODS["DMD2"], seed, args.output)))
    run, student = parts.experiment.run, generate.student_of(parts, parts.init())
    teacher, test, found = generate.teacher_as_student(run, student), test_set(parts, args.images), {}
    for k in sorted({1, 4, *run.teacher_steps}):
        found[str(k)], images = score(teacher, k, test, seed)
        print(f"KID {found[str(k)][KID]:.4g} in {k}", flush=True)
    np.save(teacher_path(seed, args), images)  # of the most steps
    return [Snapshot(0.0, 0.0, found)]


def teacher_path(seed: int, args) -> pathlib.Path:
    """Where the teacher's images of this seed are stored."""
    return args.output / f"teacher-{seed}.npy"


def make_pairs(settings) -> tuple[float, float]:
    """Seconds and network evaluations that the pairs took; they are made once, and the seconds are stored with them."""
    folder, noted = pathlib.Path(settings.data.pairs), pathlib.Path(settings.data.pairs) / "seconds"
    if not noted.is_file():
        start = time.perf_counter()
        pairs.make_pairs(config.resolve(settings), folder, config.plain(settings))
        noted.write_text(f"{time.perf_counter() - start}")
    calls = settings.teacher_steps[-1] * (2 if settings.teacher_guidance != 1.0 else 1)
    return float(noted.read_text()), settings.num_pairs * calls


def test_set(parts, n: int):
    """(batch, its true images) of the first n examples of the test split."""
    batch = generate.batch_of(parts, data.examples(parts.experiment.data, "test", n))
    return batch, generate.decoded(parts.frozen["autoencoder"], batch["x0"])


def score(student, k: int, test, seed: int, teacher: np.ndarray | None = None) -> tuple[dict[str, float], np.ndarray]:
    """(scores, images) of a network in k steps for the prompts of `test_set`, compared with the teacher's images."""
    batch, truth = test
    few = jax.tree.map(lambda x: x[:64], batch)
    others = generate.sample(student, few, k, seed + 1)  # which also compiles the program
    start = time.perf_counter()
    images = generate.sample(student, batch, k, seed)
    latency = (time.perf_counter() - start) / len(images)
    sets = {} if teacher is None else {TEACHER: teacher}
    *_, row = scores.evaluate(sets | {"student": images}, truth, paired=False, teacher=next(iter(sets), ""))
    found = {name: float(value[0]) for name, value in row.metrics.items() if value}
    return found | {"latency": latency, "diversity": preview.diversity(images[:64], others)}, images


def rows(results: dict[str, list[list[Snapshot]]]) -> dict[str, tuple[list[list[Snapshot]], str]]:
    """Every student with its snapshots by seed: name -> (snapshots, number of steps)."""
    return {
        f"{name}, {k} step{'s' * (k != '1')}": (by_seed, k)
        for name, by_seed in results.items()
        for k in by_seed[0][-1].scores
    }


def at(snapshots: list[Snapshot], k: str, column: str, evaluations: float) -> float:
    """A score at some number of evaluations, interpolated between snapshots."""
    values = [x.scores[k].get(column, np.nan) for x in snapshots]
    return float(np.interp(evaluations, [x.evaluations for x in snapshots], values))


def table(results, args) -> str:
    """Means over seeds with standard errors, at the end of the time and at equal evaluations."""
    fewest = min(x[-1].evaluations for name, by_seed in results.items() if name != TEACHER for x in by_seed)
    lines = []
    for title, where in ((f"at {args.seconds:.0f} s", None), (f"at {fewest:.3g} evaluations", fewest)):
        lines += [f"| {title} | evaluations | ms an image |", "|---|---|---|"]
        lines[-2] += " ".join(f" {c} |" for c in COLUMNS)
        lines[-1] += "---|" * len(COLUMNS)
        for name, (by_seed, k) in rows(results).items():
            spent = [x[-1].evaluations if where is None or name.startswith(TEACHER) else where for x in by_seed]
            latency = statistics.mean(x[-1].scores[k]["latency"] for x in by_seed)
            cells = [name, f"{statistics.mean(spent):.3g}", f"{1e3 * latency:.1f}"]
            for c in COLUMNS:
                values = [at(x, k, c, e) for x, e in zip(by_seed, spent, strict=True)]
                cells.append("" if np.isnan(values).any() else spread(values))
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
        if name.startswith(TEACHER):
            axes[0].axhline(kid[-1], color="grey", linestyle=":" if k in ("1", "4") else "-", label=name)
            continue
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
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--snapshots", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="shares of the time")
    parser.add_argument("--images", type=int, default=500, help="prompts of the test split that are evaluated")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    cache_programs()
    kept = args.output / f"snapshots_{args.seconds:.0f}s_{args.images}.json"
    names = [TEACHER, *args.only]
    results = {name: [] for name in names} | (json.loads(kept.read_text()) if kept.is_file() else {})
    for seed in range(args.seeds):
        for name in names:
            if seed < len(results[name]):
                continue
            print(f"{name}, seed {seed}", flush=True)
            if name == TEACHER:
                snapshots = sample_teacher(seed, args)
            else:
                snapshots = train(METHODS[name], seed, args, np.load(teacher_path(seed, args)))
            results[name].append(snapshots)
            kept.write_text(json.dumps(results))
    results = {name: [[Snapshot(*x) for x in snapshots] for snapshots in results[name][: args.seeds]] for name in names}
    text = table(results, args)
    print(text)
    (args.output / "methods.md").write_text(text)
    figure(results).savefig(args.output / "methods.png", dpi=120)


if __name__ == "__main__":
    main()

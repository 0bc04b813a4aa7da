"""Compare methods, their ablations and undistilled baselines on the embedded data: one table, several seeds each.

    python benchmarks/compare.py sr --workdir=runs/compare --steps=3000 --seeds=3       CoDi, super-resolution
    python benchmarks/compare.py dmd2 --workdir=runs/compare --steps=1500 --seeds=3     DMD2, class-conditional
    python benchmarks/compare.py d2g --workdir=runs/compare --steps=500 --seeds=3       Diffusion2GAN, class-conditional
    python benchmarks/compare.py pocket_inpaint --workdir=runs/compare --steps=4000 --seeds=3       CoDi, LCM and the
        undistilled network by task on the pocket pipeline, and CoDi's ablations on inpainting: also pocket_edit,
        pocket_depth, pocket_canny, pocket_sr

Each run is `python -m cddistill.main` with the printed flags; finished runs are not repeated. --jobs runs that many at
once, each on its share of the cores. The table has means over seeds and standard errors over seeds; of a single seed,
over images.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
from typing import NamedTuple


class Study(NamedTuple):
    """What is compared: the training runs, how each student is evaluated (row suffix -> flags), and the columns."""

    variants: dict[str, list[str]]  # training flags
    variant_evals: dict[str, dict[str, list[str]]]  # evaluations of some variants
    default_evals: dict[str, list[str]]  # evaluations of all other variants
    common: list[str]  # flags of every run
    shared_rows: tuple[str, ...]  # rows that are the same for all variants: printed once
    columns: tuple[str, ...]
    prepare: tuple[str, ...] = ()  # flags of a command to run first
    exported: str = ""  # a variant whose run is exported to {exported}, which flags of later variants may name


SR, FINETUNE = "--config=configs/ccd_sr.py", "--config=configs/finetune_sr.py"
L2 = "--config.method.signal=l2"  # the paper's; the config's default is perceptual
ONE, FOUR = "--config=configs/dmd2_emoji.py", "--config=configs/dmd2_emoji.py:four"
NO_GAN = "--config.method.gan_weight=0."
PAIRS = "--config=configs/d2g_emoji.py"
PLAIN = "--config.method.augment=none"
NO_R1, NO_MIX = "--config.method.r1=none", "--config.method.mix_share=0."
ONE_SCALE, NO_NOISE = "--config.method.disc_scales=False", "--config.method.disc_noise=False"
LATENT_LPIPS = ("--config.method.signal=latent_lpips", "--config.method.metric=pocket")
CHOSEN, EVEN = "--config.method.grid_power=2.5", "--config.method.grid_power=1.0"  # sampling timesteps
ABLATIONS = {  # of CoDi; the paper's
    "CoDi, DDIM instead of PREv": ["--config.method.noise=predicted"],
    "CoDi without noise consistency": ["--config.method.consistency_weight=0.0"],
    "CoDi, frozen teacher's z_s (x0 space)": [
        "--config.method.ode=teacher", "--config.method.space=x0", "--config.method.noise=predicted",
    ],
    "CoDi, own z_s (x0 space)": ["--config.method.space=x0"],
    "CoDi, one t for the batch": ["--config.method.shared_t=True"],
}  # fmt: skip
TEACHER = ["--config.teacher={exported}"]  # which takes the condition as further input channels


def of_task(task: str, *columns: str, reference: str = "", pe: str = "pe", ablations: dict | None = None) -> Study:
    """What few steps cost without distillation and with it; `pe` is the variant of CoDi's config for PE-CoDi.

    "LatentLPIPS" measures CoDi's signal term by the pocket pipeline's LatentLPIPS instead of the squared distance.

    ablations of CoDi are {name: flags}.
    """
    codi = f"--config=configs/ccd_{task}.py:pocket"
    return Study(
        variants={
            "fine-tuned, not distilled": [f"--config=configs/finetune_pocket.py:{task}"],
            "LCM of the fine-tuned network": [f"--config=configs/lcm_pocket.py:{task}", *TEACHER],
            "PE-CoDi": [f"--config=configs/ccd_{task}.py:{pe}"],
            "CoDi": [codi],
            "CoDi, LatentLPIPS": [codi, *LATENT_LPIPS],
            "PE-CoDi, LatentLPIPS": [f"--config=configs/ccd_{task}.py:{pe}", *LATENT_LPIPS],
            **{name: [codi, *flags] for name, flags in (ablations or {}).items()},
        },
        variant_evals={
            "fine-tuned, not distilled": {
                "": ["--config.sample_steps=(4,8,50)"],
                ", placed timesteps": [CHOSEN, "--config.sample_steps=(4,)"],
                ", DPM-Solver++": ["--config.method.sampler=dpm_solver_pp", "--config.sample_steps=(4,)"],
            },
            "LCM of the fine-tuned network": {"": ["--config.sample_steps=(4,)"]},
            "PE-CoDi": {"": ["--config.sample_steps=(1,4)"]},
        },
        default_evals={"": ["--config.sample_steps=(1,2,4)"]},
        common=["--config.baseline="],
        shared_rows=(reference,) if reference else (),
        columns=("KID-EffLite0@64", "LPIPS-VGG", *columns),
        exported="fine-tuned, not distilled",
    )


STUDIES = {
    "pocket_inpaint": of_task("inpaint", "LPIPS-VGG in the hole", reference="grey hole", ablations=ABLATIONS),
    "pocket_edit": of_task(
        "edit", "PSNR in the changed region", "LPIPS-VGG in the changed region", "PSNR outside of it",
        reference="not edited",
    ),
    "pocket_depth": of_task("depth"),
    "pocket_canny": of_task("canny", "Edge F1"),
    "pocket_sr": of_task("sr", "PSNR", reference="bicubic", pe="pocket_pe"),
    "sr": Study(
        variants={
            "fine-tuned, not distilled": [FINETUNE],
            "CoDi": [SR, L2],
            "PE-CoDi": [f"{SR}:pe"],
            **{name: [SR, L2, *flags] for name, flags in ABLATIONS.items()},
        },
        variant_evals={
            "fine-tuned, not distilled": {"": [CHOSEN, "--config.sample_steps=(4,8)"],
                                          ", even timesteps": [EVEN, "--config.sample_steps=(4,8,50)"]},
            "CoDi": {"": [CHOSEN, "--config.sample_steps=(1,2,4)"],
                     ", even timesteps": [EVEN, "--config.sample_steps=(4,)"]},
        },
        default_evals={"": [CHOSEN, "--config.sample_steps=(1,2,4)"]},
        common=["--config.baseline="],
        shared_rows=("bicubic",),
        columns=("PSNR", "LPIPS-VGG", "LPIPS-Alex", "KID-EffLite0@64"),
    ),
    "dmd2": Study(  # tables 3 and 4 of the paper
        variants={
            "DM, no TTUR": [ONE, NO_GAN, "--config.method.ratio=1"],
            "DM, TTUR": [ONE, NO_GAN],
            "DMD2: DM, TTUR, GAN": [ONE],
            "GAN alone, TTUR": [ONE, "--config.method.dm_weight=0."],
            "four steps": [FOUR],
            "four steps, no backward simulation": [FOUR, "--config.method.backward_simulation=False"],
        },
        variant_evals={},
        default_evals={"": []},
        common=[],
        shared_rows=("teacher, 50 steps",),
        columns=("KID-EffLite0@64", "Precision-EffLite0", "Recall-EffLite0", "KID-EffLite0@64 to the teacher",
                 "Precision-EffLite0 to the teacher", "Recall-EffLite0 to the teacher"),
    ),
    "d2g": Study(  # the paper's ablations of the regression loss and of the discriminator
        variants={
            "MSE": [PAIRS, NO_GAN, PLAIN, "--config.method.regression=l2"],
            "pseudo-Huber": [PAIRS, NO_GAN, PLAIN, "--config.method.regression=pseudo_huber"],
            "LPIPS": [PAIRS, NO_GAN, PLAIN],
            "ensemble LPIPS": [PAIRS, NO_GAN],
            "+ diffusion discriminator": [PAIRS, NO_NOISE, NO_R1, ONE_SCALE, NO_MIX],
            "+ noise": [PAIRS, NO_R1, ONE_SCALE, NO_MIX],
            "+ R1": [PAIRS, ONE_SCALE, NO_MIX],
            "+ multi-scale": [PAIRS, NO_MIX],
            "+ mix-and-match": [PAIRS],
        },
        variant_evals={},
        default_evals={"": []},
        common=["--config.method.warmup=150"],
        shared_rows=("teacher, 50 steps",),
        columns=("KID-EffLite0@64", "Recall-EffLite0", "KID-EffLite0@64 to the teacher", "PSNR to the teacher",
                 "LPIPS-VGG to the teacher"),
        prepare=("--mode=pairs", PAIRS),
    ),
}  # fmt: skip


def workdir_of(args, name, seed) -> pathlib.Path:
    """Where a run is kept, by study: two studies may have variants of one name."""
    slug = "".join(c if c.isalnum() else "_" for c in name)
    return pathlib.Path(args.workdir) / args.study / f"{slug}-{seed}"


def run(study, name, seed, args, cores, earlier) -> dict:
    """The scores of one run: {row: {"nfe", "metrics": {metric: [mean, standard error]}}}.

    earlier is the future of the run that is exported, of the same seed.
    """
    workdir, exported = workdir_of(args, name, seed), workdir_of(args, study.exported, seed) / "exported"
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [flag.format(exported=exported) for flag in study.variants[name]]
    if command != study.variants[name]:
        earlier.result()
    command += [f"--workdir={workdir}", f"--config.seed={seed}", f"--config.steps={args.steps}", *study.common]
    command += ["--config.eval_every=1000000", "--config.keep=1", "--config.report=False"]
    scores, own_cores = {}, cores.get()
    try:
        if not (workdir / "checkpoints" / str(args.steps)).is_dir():
            call(command, own_cores, workdir)
        if name == study.exported and not exported.is_dir():
            call([*command, "--mode=export", f"--output={exported}"], own_cores, workdir)
        for label, more in study.variant_evals.get(name, study.default_evals).items():
            done = workdir / f"scores{label.replace(', ', '-').replace(' ', '-')}.done.json"
            if not done.exists():
                call([*command, *more, "--mode=evaluate"], own_cores, workdir)
                (workdir / "scores.json").replace(done)
            scores |= {f"{row}{label}": result for row, result in json.loads(done.read_text()).items()}
    finally:
        cores.put(own_cores)
    return scores


def call(flags, cores: str, workdir):
    """Run one command of the program on these cores; its output goes to a log next to the workdir."""
    print("python -m cddistill.main", *flags, flush=True)
    program = ["taskset", "--cpu-list", cores, sys.executable, "-m", "cddistill.main", *flags]
    with workdir.with_suffix(".log").open("a") as log:
        subprocess.run(program, check=True, stdout=log, stderr=log)


def main():
    """Do the missing runs, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--workdir", default="runs/compare")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="names of the table; all by default")
    args = parser.parse_args()
    study, cores, available = STUDIES[args.study], queue.Queue(), sorted(os.sched_getaffinity(0))
    if unknown := sorted(set(args.only or ()) - set(study.variants)):
        parser.error(f"{args.study} has no variant {unknown[0]!r}: known are {', '.join(map(repr, study.variants))}")
    variants = [name for name in study.variants if not args.only or name in args.only]
    for job in range(args.jobs):
        cores.put(",".join(map(str, available[job :: args.jobs])))
    if study.prepare:
        pathlib.Path(args.workdir).mkdir(parents=True, exist_ok=True)
        call(study.prepare, ",".join(map(str, available)), pathlib.Path(args.workdir) / "prepare")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:  # by seed, so that variants stay even if interrupted
        runs = {}
        for seed in range(args.seeds):
            for name in variants:
                earlier = runs.get((study.exported, seed))
                runs[name, seed] = pool.submit(run, study, name, seed, args, cores, earlier)
    scores = {name: [runs[name, seed].result() for seed in range(args.seeds)] for name in variants}
    print("| |", " | ".join(("network calls", *study.columns)), "|")
    print("|---" * (len(study.columns) + 2) + "|")
    for row in study.shared_rows:
        line(study, row, next(iter(scores.values())), row)
    for name, runs in scores.items():
        for row in runs[0]:
            if row not in study.shared_rows:
                line(study, f"{name}, {row.removeprefix('student, ')}", runs, row)


def line(study, label, runs, row):
    """One line of the table."""
    cells = [str(runs[0][row]["nfe"] or 0)]
    for metric in study.columns:
        values = [r[row]["metrics"][metric] for r in runs if metric in r[row]["metrics"]]
        cells.append(spread(values) if values else "")
    print("|", " | ".join((label, *cells)), "|")


def spread(values) -> str:
    """The mean of each seed's (mean, error over images), and its error: over seeds, or of a single seed over images."""
    means = [float(mean) for mean, _ in values]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else float(values[0][1])
    return f"{statistics.mean(means):.4g} ± {error:.2g}"


if __name__ == "__main__":
    main()

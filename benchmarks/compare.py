"""CoDi, its ablations and the undistilled baseline on embedded super-resolution, several seeds each, as one table.

    python benchmarks/compare_sr.py --workdir=runs/compare --steps=3000 --seeds=3

Each run is `python -m cddistill.main` with the flags printed; finished runs are not repeated. With --jobs, that many
run at once, each on its share of the cores. Means over seeds, with the standard error over seeds (not over images).
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

SR, FINETUNE = "--config=configs/ccd_sr.py", "--config=configs/finetune_sr.py"
VARIANTS = {
    "fine-tuned, not distilled": [FINETUNE],
    "CoDi": [SR],
    "PE-CoDi": [f"{SR}:pe"],
    "CoDi, DDIM instead of PREv": [SR, "--config.method.noise=predicted"],
    "CoDi without noise consistency": [SR, "--config.method.consistency_weight=0.0"],
    "CoDi, frozen teacher's z_s (x0 space)": [SR, "--config.method.ode=teacher", "--config.method.space=x0",
                                              "--config.method.noise=predicted"],
    "CoDi, own z_s (x0 space)": [SR, "--config.method.space=x0"],
    "CoDi, one t for the batch": [SR, "--config.method.shared_t=True"],
}  # fmt: skip
PLACED, EVEN = "--config.method.grid_power=2.5", "--config.method.grid_power=1.0"  # sampling times
LOOKS = {  # ways in which a student is sampled: label -> flags
    "fine-tuned, not distilled": {"": [PLACED, "--config.sample_steps=(4,8)"],
                                  ", even times": [EVEN, "--config.sample_steps=(4,8,50)"]},
    "CoDi": {"": [PLACED, "--config.sample_steps=(1,2,4)"], ", even times": [EVEN, "--config.sample_steps=(4,)"]},
}  # fmt: skip
LOOK = {"": [PLACED, "--config.sample_steps=(1,2,4)"]}
COLUMNS = ("PSNR", "LPIPS-VGG", "LPIPS-Alex", "KID-EffLite0@64")


def run(name, seed, args, cores) -> dict:
    """The scores of one run: {row: {"nfe", "metrics": {metric: [mean, standard error]}}}."""
    slug = "".join(c if c.isalnum() else "_" for c in name)
    workdir = pathlib.Path(args.workdir) / f"{slug}-{seed}"
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [*VARIANTS[name], f"--workdir={workdir}", f"--config.seed={seed}", f"--config.steps={args.steps}"]
    command += ["--config.baseline=", "--config.eval_every=1000000", "--config.keep=1", "--config.report=False"]
    scores, mine = {}, cores.get()
    try:
        if not (workdir / "checkpoints" / str(args.steps)).is_dir():
            call(command, mine, workdir)
        for label, more in LOOKS.get(name, LOOK).items():
            done = workdir / f"scores{label.replace(', ', '-').replace(' ', '-')}.done.json"
            if not done.exists():
                call([*command, *more, "--mode=evaluate"], mine, workdir)
                (workdir / "scores.json").replace(done)
            scores |= {f"{row}{label}": found for row, found in json.loads(done.read_text()).items()}
    finally:
        cores.put(mine)
    return scores


def call(flags, cores: str, workdir):
    """One command of the program on these cores; what it says goes to a log beside the workdir."""
    print("python -m cddistill.main", *flags, flush=True)
    program = ["taskset", "--cpu-list", cores, sys.executable, "-m", "cddistill.main", *flags]
    with workdir.with_suffix(".log").open("a") as log:
        subprocess.run(program, check=True, stdout=log, stderr=log)


def main():
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/compare")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    cores, available = queue.Queue(), sorted(os.sched_getaffinity(0))
    for job in range(args.jobs):
        cores.put(",".join(map(str, available[job :: args.jobs])))
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:  # by seed, so that an interruption leaves it even
        runs = {
            (name, seed): pool.submit(run, name, seed, args, cores) for seed in range(args.seeds) for name in VARIANTS
        }
    scores = {name: [runs[name, seed].result() for seed in range(args.seeds)] for name in VARIANTS}
    print("| |", " | ".join(("network calls", *COLUMNS)), "|")
    print("|---" * (len(COLUMNS) + 2) + "|")
    first = scores["CoDi"]
    line("bicubic", first, "bicubic")
    for name, runs in scores.items():
        for row in runs[0]:
            if not row.startswith("bicubic"):
                line(f"{name}, {row.removeprefix('student, ')}", runs, row)


def line(label, runs, row):
    """One line of the table."""
    cells = [str(runs[0][row]["nfe"] or 0)]
    for metric in COLUMNS:
        values = [r[row]["metrics"][metric][0] for r in runs]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        cells.append(f"{statistics.mean(values):.4g} ± {error:.2g}")
    print("|", " | ".join((label, *cells)), "|")


if __name__ == "__main__":
    main()

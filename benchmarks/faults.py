"""Check the health rules of DMD2: six injected faults must raise an alarm, three healthy seeds must raise none.

    python benchmarks/faults.py [--steps=250] [--jobs=2] [--output=runs/faults]     about 40 minutes on 2 CPU cores

Each line lists the alarms of a run in order, with their steps. A fault passes if at least one of its expected alarms is
raised within the run; a healthy run passes if none is. The exit status is 0 if all pass.
"""

import argparse
import concurrent.futures
import pathlib
import subprocess
import sys

from cddistill import health
from cddistill.methods import METHODS

RATE = 3e-4
FAULTS = {  # fault: (flags, expected alarms, of which one must be raised)
    "critic not training": (["optim.critic.lr=0."], {"critic frozen"}),
    "critic's learning rate x 100": ([f"optim.critic.lr={100 * RATE}"], {"critic too fast", "critic lost"}),
    "GAN weight x 100": (["method.gan_weight=0.3"], {"GAN dominates"}),
    "ratio 1 at 10 times the rate": (
        ["method.ratio=1", f"optim.student.lr={10 * RATE}"], {"critic lags", "brightness swings"},
    ),
    "guidance of 30": (["method.real_guidance=30."], {"guidance too high", "over-saturated"}),
    "student frozen": (["optim.student.lr=0."], {"student frozen"}),
}  # fmt: skip
HEALTHY = {f"healthy, seed {seed}": ([f"seed={seed}"], set()) for seed in range(3)}


def run(name, flags, args) -> list[health.Alarm]:
    """The alarms of one run, trained in its own process."""
    workdir = pathlib.Path(args.output) / "".join(c if c.isalnum() else "_" for c in name)
    common = [f"steps={args.steps}", "batch_size=8", f"optim.lr={RATE}", "report=False", "eval_every=100"]
    command = [sys.executable, "-m", "cddistill.main", "--config=configs/dmd2_emoji.py", f"--workdir={workdir}"]
    with (workdir.parent / f"{workdir.name}.log").open("w") as log:
        # a run that ends in NaN fails, but its metrics can still be read
        subprocess.run(command + [f"--config.{flag}" for flag in common + flags], stdout=log, stderr=log, check=False)
    rules = METHODS["dmd2"]().health_rules()
    return health.diagnose(health.read(workdir / "metrics.jsonl"), rules)


def main():
    """Train all runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", default="runs/faults")
    args = parser.parse_args()
    pathlib.Path(args.output).mkdir(parents=True, exist_ok=True)
    cases = HEALTHY | FAULTS
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(cases, pool.map(lambda c: run(c[0], c[1][0], args), cases.items()), strict=True))
    print(f"{args.steps} steps of batch 8; learning rate {RATE}; a record every 10 steps\n")
    print("| run | alarms, at step | |\n|---|---|---|")
    wrong = 0
    for name, (_, expected) in cases.items():
        right = bool({a.name for a in found[name]} & expected) if expected else not found[name]
        wrong += not right
        alarms = ", ".join(f"{a.name} {a.step}" for a in found[name]) or "none"
        print(f"| {name} | {alarms} | {'pass' if right else 'FAIL'} |")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

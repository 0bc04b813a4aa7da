"""The plans of all published configs: what each takes of its devices, as the table of docs/scale.md.

    python benchmarks/plans.py                                    all of CONFIGS, by arithmetic: minutes
    python benchmarks/plans.py --compile --only dmd2_imagenet64   also temporaries, peak and collectives: long
    python benchmarks/plans.py --write                            puts the table into docs/scale.md

Nothing runs, and no weights or data are needed. Devices are ours: eight GPUs or a slice of 64 TPUs.
"""

import argparse
import json
import time
from pathlib import Path

from cddistill import config, main, plan, targets

ROOT = Path(__file__).parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "scale.md", "<!-- plans: begin -->\n", "<!-- plans: end -->\n"
CONFIGS = {  # config: devices
    "ccd_canny:sd21": "h100:8", "ccd_depth:sd21": "h100:8", "ccd_edit:sd15": "h100:8", "ccd_inpaint:sd15": "h100:8",
    "ccd_sr:sd21": "h100:8", "d2g_sd15": "v5p:4x4x4", "d2g_sdxl": "v5p:4x4x4", "dmd2_imagenet64": "h100:8",
    "dmd2_sd15": "v5p:4x4x4", "dmd2_sdxl": "v5p:4x4x4", "dmd2_sdxl:one": "v5p:4x4x4", "dmd2_sdxl:lora": "v5p:4x4x4",
    "gd_sr:sd15": "h100:8", "latent_lpips_sd15": "h100:8", "latent_lpips_sd15:judge": "h100:8",
}  # fmt: skip
HEADER = (
    "| config | devices | trained, M | weights | EMA | optimiser | frozen | gradients | sum | TFLOP a step | step, s | "
    "hours | chip-hours |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def found(name: str, topology: str, compile: bool) -> dict:
    """The plan of a config, "dmd2_sdxl:one"."""
    file, _, variant = name.partition(":")
    settings = main.load_config(f"{ROOT}/configs/{file}.py{f':{variant}' * bool(variant)}")
    experiment = config.resolve(settings)
    trained = {net for turn in experiment.method.turns().values() for net in turn.moves}
    made = plan.plan(experiment, targets.target(topology), compile)
    return made | {"config": name, "trained": sum(n for net, n in made["weights"].items() if net in trained)}


def row(made: dict) -> str:
    """A plan as a row of the table."""
    gb = lambda n: f"{n / 1e9:.2f}"
    held, device = made["held"], made["device"]
    frozen = sum(size for name, size in held.items() if name.startswith("frozen"))
    gradients = max(x["gradients"] for x in made["programs"])
    whole = [sum(x["runs"] * x["flops"] for x in made["programs"]) / made["steps"]]  # mean over steps
    step = f"{made['hours'] * 3600 / made['steps']:.2f}"
    cells = [
        made["config"], f"{device['number']} {device['kind']}, fsdp {device['fsdp']}", f"{made['trained'] / 1e6:,.0f}",
        gb(held["trained weights"]), gb(held["EMA"]), gb(held["optimiser"]), gb(frozen), gb(gradients),
        gb(sum(held.values()) + gradients), f"{whole[0] * device['number'] / 1e12:,.0f}", step,
        f"{made['hours']:,.0f}", f"{made['chip_hours']:,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def write(table: str) -> None:
    """Put the table into the page, between its marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


def run():
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*CONFIGS])
    parser.add_argument("--topology", help="instead of those in CONFIGS")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", type=Path, help="a folder for the plans")
    args = parser.parse_args()
    if not (args.compile and args.topology):  # as many as the largest needs, before there are any
        targets.target("cpu:64")
    table = HEADER
    print(table, end="", flush=True)
    for name in args.only:
        start = time.monotonic()
        made = found(name, args.topology or CONFIGS[name], args.compile)
        table += row(made)
        print(row(made), end="", flush=True)
        if args.compile:
            print(plan.described(made), flush=True)
        if args.json:
            args.json.mkdir(parents=True, exist_ok=True)
            (args.json / f"{name.replace(':', '-')}.json").write_text(json.dumps(made, indent=2))
        print(f"<!-- {time.monotonic() - start:.0f} s -->", flush=True)
    if args.write:
        write(table)


if __name__ == "__main__":
    run()

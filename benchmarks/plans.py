"""The plans of all published configs: what each takes of its devices, as the table of docs/scale.md.

    python benchmarks/plans.py --depth bytes                      all of CONFIGS: weights, optimiser; minutes
    python benchmarks/plans.py                                    also FLOPs and hours: minutes for each on a CPU
    python benchmarks/plans.py --depth compiled --only dmd2_sd15  also temporaries, peak and collectives: long
    python benchmarks/plans.py --write --json plans               puts the table, with plans that are in the folder
                                                                  plans already, into docs/scale.md

Nothing runs, and no weights or data are needed. Devices are ours: eight GPUs or a slice of 64 TPUs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from cddistill import config, config_files, plan, targets

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


def found(name: str, topology: str, depth: str) -> dict:
    """The plan of a config, "dmd2_sdxl:one"."""
    file, _, variant = name.partition(":")
    settings = config_files.load_config(f"{ROOT}/configs/{file}.py{f':{variant}' * bool(variant)}")
    experiment = config.resolve(settings)
    trained = {net for turn in experiment.method.turns().values() for net in turn.moves}
    made = plan.plan(experiment, targets.target(topology), depth)
    return made | {"config": name, "trained": sum(n for net, n in made["weights"].items() if net in trained)}


def row(made: dict) -> str:
    """A plan as a row of the table."""
    gb = lambda n: f"{n / 1e9:.2f}"
    held, device = made["held"], made["device"]
    frozen = sum(size for name, size in held.items() if name.startswith("frozen"))
    gradients, cost = made["gradients"], [""] * 4
    if made["programs"]:
        flops = sum(x["runs"] * x["flops"] for x in made["programs"]) / made["steps"]  # the mean over steps
        cost = [f"{flops * device['number'] / 1e12:,.0f}", f"{made['hours'] * 3600 / made['steps']:.2f}",
                f"{made['hours']:,.0f}", f"{made['chip_hours']:,.0f}"]  # fmt: skip
    cells = [
        made["config"], f"{device['number']} {device['kind']}, fsdp {device['fsdp']}", f"{made['trained'] / 1e6:,.0f}",
        gb(held["trained weights"]), gb(held["EMA"]), gb(held["optimiser"]), gb(frozen), gb(gradients),
        gb(sum(held.values()) + gradients), *cost,
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
    parser.add_argument("--depth", choices=("bytes", "flops", "compiled"), default="flops")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", type=Path, help="a folder for the plans")
    args = parser.parse_args()
    if not (args.depth == "compiled" and args.topology):  # as many as the largest needs, before there are any
        targets.target("cpu:64")
    table = HEADER
    print(table, end="", flush=True)
    for name in args.only:
        start = time.monotonic()
        file = args.json and args.json / f"{name.replace(':', '-')}.json"
        known = file and file.is_file()
        made = json.loads(file.read_text()) if known else found(name, args.topology or CONFIGS[name], args.depth)
        table += row(made)
        print(row(made), end="", flush=True)
        if args.depth == "compiled":
            print(plan.described(made), flush=True)
        if file:
            args.json.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(made, indent=2))
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if args.write:
        write(table)


if __name__ == "__main__":
    run()

#!/usr/bin/env bash
# What four steps cost without distillation and with it, on every task of the embedded pocket pipeline, and CoDi's ablations on
# inpainting: one table each in runs/compare, three seeds, for one accelerator. What is finished is skipped; after a stop, the
# same command resumes. Arguments go to benchmarks/compare.py: --steps=500 --seeds=1 is a trial.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p runs/compare
for study in inpaint sr edit depth canny; do
    python benchmarks/compare.py "pocket_$study" --workdir=runs/compare --steps=4000 --seeds=3 "$@" | tee "runs/compare/pocket_$study.md"
done
python benchmarks/depth_error.py train --network=runs/depth.safetensors
for name in CoDi PE_CoDi; do
    python benchmarks/depth_error.py measure --network=runs/depth.safetensors --workdir="runs/compare/pocket_depth/$name-0" --steps 1 4
done

#!/usr/bin/env bash
# Distill the embedded pocket pipeline with DMD2 (one and four steps) and Diffusion2GAN, seeds 0, 1 and 2, each with its
# report, for one accelerator. What is finished is skipped; after a stop, the same command resumes. Arguments go to the
# training commands: --config.batch_size=128 suits a GPU, on which the defaults, for a CPU, are small.
set -euo pipefail
cd "$(dirname "$0")/.."

cddistill() { python -m cddistill.main "$@"; }
train() { # WORKDIR FLAGS; a run that was stopped has no report
    [ -f "runs/$1/report.html" ] || cddistill --workdir="runs/$1" "${@:2}"
    [ -f "runs/$1/report.html" ] || exit 0
}

cddistill --config=configs/dmd2_pocket.py:encode --mode=encode --output=runs/pocket_embedded
for seed in 0 1 2; do
    train "dmd2_pocket-$seed" --config=configs/dmd2_pocket.py --config.seed=$seed "$@"
    train "dmd2_pocket-four-$seed" --config=configs/dmd2_pocket.py:four --config.seed=$seed "$@"
    pairs="--config.data.pairs=runs/pairs_pocket-$seed"
    cddistill --mode=pairs --config=configs/d2g_pocket.py --config.seed=$seed "$pairs"
    train "d2g_pocket-$seed" --config=configs/d2g_pocket.py --config.seed=$seed "$pairs" "$@"
done

#!/usr/bin/env bash
# Train the pocket pipeline from random weights: its VAE, then UNet and text encoder on latents. What is finished is
# skipped; after a stop, the same command resumes. Arguments go to the training commands.
set -euo pipefail
cd "$(dirname "$0")/.."

cddistill() { python -m cddistill.main "$@"; }
train() { # NAME FLAGS: configs/NAME.py; a run that was stopped has no report
    [ -f "runs/$1/report.html" ] || cddistill --config="configs/$1.py" "${@:2}"
    [ -f "runs/$1/report.html" ] || exit 0
}

train autoencoder_pocket "$@"
[ -d runs/pocket_vae ] || cddistill --config=configs/autoencoder_pocket.py --mode=export --output=runs/pocket_vae
[ -d runs/pocket_start ] || python -m cddistill.precompute.make_pocket runs/pocket_vae runs/pocket_start
cddistill --config=configs/teacher_pocket.py:encode --mode=encode --output=runs/pocket_latents
train teacher_pocket "$@"
[ -d runs/pocket ] || cddistill --config=configs/teacher_pocket.py --mode=export --output=runs/pocket

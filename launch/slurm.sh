#!/usr/bin/env bash
#SBATCH --job-name=cddistill --nodes=2 --ntasks-per-node=1 --gres=gpu:8 --time=24:00:00 --signal=TERM@120 --requeue
# sbatch launch/slurm.sh --config=configs/ccd_sr.py:sd21 --workdir=/shared/run
# SIGTERM two minutes before the end writes a checkpoint; the requeued job goes on from it.
set -euo pipefail
export CDDISTILL_COORDINATOR=auto
srun python -m cddistill.main "$@"

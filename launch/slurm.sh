#!/usr/bin/env bash
#SBATCH --job-name=cddistill --nodes=2 --ntasks-per-node=1 --gres=gpu:8 --time=24:00:00 --signal=TERM@120 --requeue
# Two nodes under Slurm: sbatch launch/slurm.sh --config=configs/ccd_sr.py:sd21 --workdir=/shared/run
# Slurm sends SIGTERM two minutes before the time limit: the run writes a checkpoint and exits, and the requeued job resumes from it.
set -euo pipefail
export CDDISTILL_COORDINATOR=auto
srun python -m cddistill.main "$@"

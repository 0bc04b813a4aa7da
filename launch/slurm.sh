#!/usr/bin/env bash
#SBATCH --job-name=cddistill --nodes=2 --ntasks-per-node=1 --gres=gpu:8 --time=24:00:00 --signal=TERM@120 --requeue
#SBATCH --open-mode=append
# Slurm: nodes with NVIDIA GPUs, one task for each node, which drives all of its GPUs.
#
#   sbatch launch/slurm.sh -- --config=configs/ccd_sr.py:sd21 --workdir=/shared/run
#   sbatch --nodes=4 --ntasks-per-node=8 launch/slurm.sh -- ...    # one task for each GPU
#
# Submit it in the folder of this checkout; the workdir must be seen by all nodes. Slurm sends SIGTERM two minutes before the
# time limit: the run writes a checkpoint and ends with status 143, and the job is put into the queue again. Slurm's own
# --requeue does that only for jobs that Slurm itself ends. A job that is cancelled, or fails, is not.
#
# --env=NAME=VALUE    for the program; again for several
# --dry-run           print the commands, and run none
#
# Environment: PYTHON (.venv/bin/python if there is one, else python); MAX_RESTARTS (1000); XLA_FLAGS instead of those in
# flags.sh; CDDISTILL_GRACE (100) seconds that compiling may go on after SIGTERM.
# Status: the program's.
set -euo pipefail
HERE=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/launch} # Slurm runs a copy of this file
[ -f "${HERE:-}/common.sh" ] || HERE=$(cd "$(dirname "$0")" && pwd)
[ -f "$HERE/common.sh" ] || { echo "slurm.sh: submit it in the folder that holds launch/" >&2 && exit 2; }
source "$HERE/common.sh"
source "$HERE/flags.sh"

parse "" "$@"
[ ${#words[@]} -eq 0 ] || die "unexpected argument ${words[0]}: the program's options go after --"
need_flags
cd "$HERE/.."
settings gpu
python=${PYTHON:-python} && [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python

# JAX gives a task of Slurm the one GPU with the number of the task on its node, unless it is told otherwise.
TASK='[ "$((SLURM_NTASKS / SLURM_NNODES))" != 1 ] || export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
exec "$@"'
status=0
run srun --kill-on-bad-exit=0 env CDDISTILL_COORDINATOR=auto "CDDISTILL_GRACE=${CDDISTILL_GRACE:-100}" "${env[@]}" \
    bash -c "$TASK" task "$python" -m cddistill.main "${flags[@]}" || status=$?

again() { # whether Slurm still counts the job as running: scancel sends SIGTERM too
    local now
    now=$(run squeue --noheader --job="$SLURM_JOB_ID" --format=%T 2> /dev/null) || return 0
    [ "$now" = RUNNING ] || [ -n "$dry_run" ]
}

[ -z "$dry_run" ] || status=143 SLURM_JOB_ID=${SLURM_JOB_ID:-JOB}
if [ "$status" = 143 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-1000}" ] && again; then
    say "preempted at restart ${SLURM_RESTART_COUNT:-0}: back into the queue"
    retry scontrol requeue "$SLURM_JOB_ID" || say "requeue it by hand: scontrol requeue $SLURM_JOB_ID"
fi
[ -z "$dry_run" ] || status=0
exit "$status"

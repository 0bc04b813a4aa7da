#!/usr/bin/env bash
# docker run with all NVIDIA GPUs of this machine.
#
#   launch/docker.sh --image=cddistill -- --config=configs/ccd_sr.py:sd21 --workdir=runs/sr
#
# The current folder is the container's, so configs/, data and runs/ are those here, and files belong to you.
#
# --image=I           the image: cddistill and the extra gpu must be installed in it
# --mount=PATH        another folder, at the same place in the container
# --env=NAME=VALUE    for the program; again for several
# --dry-run           print the command, and run nothing
#
# Environment: XLA_FLAGS instead of those in flags.sh; STOP_SECONDS (120) from SIGTERM to SIGKILL in `docker stop`.
# Status: the program's: 143 if it was preempted.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/common.sh"
source "$HERE/flags.sh"

image='' mount=''
parse "image= mount=" "$@"
[ ${#words[@]} -eq 0 ] || die "unexpected argument ${words[0]}: the program's options go after --"
need image
need_flags
settings gpu
options=()
for pair in "CDDISTILL_IMAGE=$image" "HOME=$PWD/runs" "${env[@]}"; do options+=("--env=$pair"); done
[ -z "$mount" ] || options+=("--volume=$mount:$mount")
# --init: signals reach the program. --ipc, --ulimit: NCCL's shared and pinned memory.
run docker run --rm --init --gpus=all --ipc=host --ulimit=memlock=-1 --ulimit=stack=67108864 \
    "--stop-timeout=${STOP_SECONDS:-120}" "--user=$(id -u):$(id -g)" "--volume=$PWD:$PWD" "--workdir=$PWD" \
    "${options[@]}" "$image" python -m cddistill.main "${flags[@]}"

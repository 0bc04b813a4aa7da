#!/usr/bin/env bash
# TPUs of a GKE cluster, by XPK: a JobSet that starts again when it was preempted.
#
#   launch/xpk.sh sr --cluster=mine --zone=us-east5-a --type=v6e-64 --image=REGISTRY/cddistill -- \
#       --config=configs/ccd_sr.py:sd21 --workdir=/mnt/mine/sr
#
# launch/xpk.sh NAME OPTIONS -- the program's options
# --cluster=C         the GKE cluster
# --zone=Z            its zone
# --type=v6e-64       type of the accelerator
# --image=I           container image: cddistill and the extra tpu must be installed in it
# --slices=2          several slices as one run (multislice)
# --project=P         else gcloud's default
# --restarts=20       so often at most. XPK restarts after status 42 and 127 to 255: 143 is a preempted run, 134 one that
#                     lost a host; a mistake in the config is 2, after which it stops
# --grace=120         seconds from SIGTERM to SIGKILL
# --env=NAME=VALUE    for the program; again for several
# --dry-run           print every command, and run none
#
# Look and stop: xpk workload list --cluster=C; xpk workload delete --workload=NAME --cluster=C.
# Environment: LIBTPU_INIT_ARGS instead of those in flags.sh; TRIES and PAUSE as in common.sh.
# Status: 2 for a mistake in the options, else XPK's.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/common.sh"
source "$HERE/flags.sh"

cluster='' zone='' type='' image='' slices=1 project='' restarts=20 grace=120
parse "cluster= zone= type= image= slices= project= restarts= grace=" "$@"
[ ${#words[@]} -eq 1 ] || die "give one NAME of the run, such as: sr --cluster=mine"
need cluster zone type image
number slices restarts grace
need_flags
gen=$(generation "$type")
settings "$gen"
options=()
[ -z "$project" ] || options+=("--project=$project")
for pair in CDDISTILL_COORDINATOR=auto "CDDISTILL_IMAGE=$image" "${env[@]}"; do options+=(--env "$pair"); done
retry xpk workload create "--workload=${words[0]}" "--cluster=$cluster" "--zone=$zone" "--device-type=$type" \
    "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$restarts" \
    "--termination-grace-period-seconds=$grace" "${options[@]}" --command "python -m cddistill.main $(quoted "${flags[@]}")"

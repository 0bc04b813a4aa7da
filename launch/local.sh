#!/usr/bin/env bash
# Run several processes on this machine as if they were hosts: launch/local.sh 2 --config=configs/ccd_sr.py --workdir=/tmp/run
set -euo pipefail
n=$1
shift
export CDDISTILL_COORDINATOR=127.0.0.1:${PORT:-12321} CDDISTILL_PROCESSES=$n
for ((i = 1; i < n; i++)); do CDDISTILL_PROCESS_ID=$i python -m cddistill.main "$@" & done
CDDISTILL_PROCESS_ID=0 python -m cddistill.main "$@"
wait

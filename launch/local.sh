#!/usr/bin/env bash
# This machine: one process drives all of its GPUs.
#
#   launch/local.sh -- --config=configs/ccd_sr.py:sd21 --workdir=runs/sr
#   launch/local.sh --devices=0,1 -- --config=configs/ccd_sr.py    # two of the GPUs
#   launch/local.sh --processes=2 -- --config=configs/ccd_sr.py    # as two hosts, which see all devices each: for tests on CPUs
#
# --devices=0,1       numbers of the GPUs, else all
# --processes=2       several processes, as if they were hosts
# --env=NAME=VALUE    for the program; again for several
# --dry-run           print the commands, and run none
#
# Environment: PYTHON (.venv/bin/python if there is one, else python); PORT (12321) of the first process; XLA_FLAGS instead of
# those in flags.sh, which are used where there is an NVIDIA driver.
# Status: the program's, with several processes the largest; 143 if SIGTERM stopped it, after a checkpoint.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/common.sh"
source "$HERE/flags.sh"

devices='' processes=1
parse "devices= processes=" "$@"
[ ${#words[@]} -eq 0 ] || die "unexpected argument ${words[0]}: the program's options go after --"
number processes
[ "$processes" -gt 0 ] || die "--processes=0 runs nothing: give at least 1"
need_flags
[ ! -e /proc/driver/nvidia ] || settings gpu
[ -z "$devices" ] || env=("CUDA_VISIBLE_DEVICES=$devices" ${env[@]+"${env[@]}"})
python=${PYTHON:-python} && [ -n "${PYTHON:-}" ] || [ ! -x "$HERE/../.venv/bin/python" ] || python=$HERE/../.venv/bin/python

program=("$python" -m cddistill.main "${flags[@]}")
if [ "$processes" = 1 ]; then
    run exec env ${env[@]+"${env[@]}"} "${program[@]}"
    exit
fi
children=()
for ((i = 0; i < processes; i++)); do
    host=("CDDISTILL_COORDINATOR=127.0.0.1:${PORT:-12321}" "CDDISTILL_PROCESSES=$processes" "CDDISTILL_PROCESS_ID=$i")
    command=(env "${host[@]}" ${env[@]+"${env[@]}"} "${program[@]}")
    if [ -n "$dry_run" ]; then
        run "${command[@]}"
    else
        "${command[@]}" & # not by `run`: a function in the background is a shell, which would get the signals
        children+=($!)
    fi
done
[ -z "$dry_run" ] || exit 0
trap 'kill -TERM "${children[@]}" 2> /dev/null || true' TERM # they end in good order, then this script
most=0
for child in "${children[@]}"; do
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2> /dev/null; do # the signal ended the wait, not the process
        status=0
        wait "$child" || status=$?
    done
    [ "$status" -le "$most" ] || most=$status
done
exit "$most"

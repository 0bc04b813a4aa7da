#!/usr/bin/env bash
# Run one process on every worker of a Cloud TPU slice; the hosts discover each other. All of them must see the workdir.
#   launch/tpu_pod.sh NAME ZONE --config=configs/ccd_sr.py:sd21 --workdir=/mnt/shared/run
# Install once: gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="git clone REPO && cd cddistill &&
#   python3.12 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[tpu]'"   (the system Python is too old)
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd cddistill && CDDISTILL_COORDINATOR=auto .venv/bin/python -m cddistill.main $(printf '%q ' "$@")"

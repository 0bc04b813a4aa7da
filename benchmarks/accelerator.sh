#!/usr/bin/env bash
# Install the wheels of accelerator-wheels.txt from a folder, without network, and measure:
#   benchmarks/accelerator.sh WHEELS [arguments of accelerator.py]
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d "${1:-}" ] || { echo "usage: $0 WHEELS [arguments of accelerator.py]: WHEELS is a folder of *.whl" >&2; exit 2; }
site=$(mktemp -d)
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$1"/*.whl
PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 python3 benchmarks/accelerator.py "${@:2}"

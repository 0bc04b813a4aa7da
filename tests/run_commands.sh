#!/usr/bin/env bash
# The commands of README and docs in a small size, one after the other: minutes. For the nightly run; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
exec pytest -n 0 -s -m slow tests/test_commands.py "$@"

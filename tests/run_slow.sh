#!/usr/bin/env bash
# All tests, also those marked slow: every method on every layout of devices and over two processes, every recorded
# network, every notebook (extra notebooks), the sizes of all published models. Takes over an hour on two cores; arguments go to
# pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
exec pytest -m 'not weights and not device' --timeout=14400 "$@"

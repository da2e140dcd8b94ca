#!/usr/bin/env bash
# Pass every test: scripts/test.sh [pytest's arguments]. A skip fails, unless its reason says
# which hardware is missing (tests/conftest.py).
set -euo pipefail
cd "$(dirname "$0")/.."

# Two engines side by side must not spin at each other's cost.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
workers=$(nproc)
exec .venv/bin/pytest --numprocesses "$((workers > 2 ? workers : 2))" --dist worksteal "$@"

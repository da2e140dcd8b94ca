#!/usr/bin/env bash
# Everything a reviewer would otherwise have to say: format, lint, types, import contracts. All
# four run, whatever the first ones find.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
failed=()

check() {
    printf '== %s\n' "$*"
    "$bin/$@" || failed+=("$1")
}

check ruff format --check .
check ruff check .
check mypy
check lint-imports --no-logo

((${#failed[@]} == 0)) || { printf 'check: failed: %s\n' "${failed[*]}" >&2; exit 1; }

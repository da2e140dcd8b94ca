#!/usr/bin/env bash
# Everything a reviewer would otherwise have to say: format, lint, types, import contracts.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/lint-imports" --no-logo

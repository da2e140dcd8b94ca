#!/usr/bin/env bash
# Fuzz the parsers that read what strangers wrote: so many executions of each target, then a
# line for each. New inputs that reach new code go to .fuzz/<target>/; a finding stops the run
# and is written to .fuzz/.
#
#   scripts/fuzz.sh [EXECUTIONS [TARGET…]]    default: 1,000,000 of every target
set -euo pipefail
cd "$(dirname "$0")/.."

runs=${1:-1000000}
shift || true
targets=("$@")
((${#targets[@]})) || mapfile -t targets < <(ls tests/fuzz/corpus)
total=0
for target in "${targets[@]}"; do
    mkdir -p ".fuzz/$target"
    log=".fuzz/$target.log"
    if ! .venv/bin/python tests/fuzz/fuzz.py "$target" "-runs=$runs" -max_len=8192 \
        -artifact_prefix=.fuzz/ ".fuzz/$target" "tests/fuzz/corpus/$target" 2>"$log"; then
        tail -n 40 "$log" >&2
        printf 'fuzz: %s: a finding, see %s and .fuzz/crash-*\n' "$target" "$log" >&2
        exit 1
    fi
    printf '%-20s %s\n' "$target" "$(grep -o 'Done .*' "$log")"
    total=$((total + runs))
done
printf 'fuzz: %d executions, nothing found\n' "$total"

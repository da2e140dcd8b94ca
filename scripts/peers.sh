#!/usr/bin/env bash
# Build the environments of the loaders that bench/load.py measures beside ours, one each under
# .venvs/. What is there is left alone; a peer that cannot be installed leaves its reason in
# .venvs/NAME.log, which the benchmark prints in its row.
#
#   scripts/peers.sh [NAME…]    only these, such as: safetensors tensorizer
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A packages=(
    [torch]=""
    [safetensors]="safetensors"
    [runai]="runai-model-streamer==0.17.0"
    [tensorizer]="tensorizer==2.12.1"
    [fastsafetensors]="fastsafetensors==0.5.0"
    [instanttensor]="instanttensor==0.2.2"
    [transformers]="transformers accelerate"
)
order=(torch safetensors runai tensorizer fastsafetensors instanttensor transformers)
wheels=.venvs/wheels

# By pip, because a folder of wheels that pip is told of may hold a build of torch for CPUs. From
# here uv links it into every environment, so that seven of them take the space of one.
fetch_torch() {
    compgen -G "$wheels/torch-*.whl" >/dev/null && return
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
        --constraint constraints.txt --dest "$wheels" torch
}

build() {
    local name=$1 environment=.venvs/$1 stamp
    stamp="$PWD ${packages[$name]} $(sha256sum <constraints.txt)"
    [[ -f $environment/.stamp && $(<"$environment/.stamp") == "$stamp" ]] && return
    echo "peers: building $environment" >&2
    fetch_torch
    rm -rf "$environment"
    .venv/bin/uv venv --quiet --python .venv/bin/python "$environment"
    # shellcheck disable=SC2086 # several packages, one word each
    .venv/bin/uv pip install --quiet --python "$environment/bin/python" --find-links "$wheels" \
        --constraint constraints.txt torch numpy ${packages[$name]}
    printf '%s' "$stamp" >"$environment/.stamp"
}

mkdir -p .venvs
names=("$@")
((${#names[@]})) || names=("${order[@]}")
for name in "${names[@]}"; do
    [[ -v packages[$name] ]] || { echo "peers: no such peer: $name (${order[*]})" >&2; exit 2; }
    set +e # in a subshell with its own, which a condition would switch off
    (set -e && build "$name") 2>".venvs/$name.log"
    status=$?
    set -e
    if ((status)); then
        echo "peers: no $name: $(tail -n 1 ".venvs/$name.log")" >&2
        rm -rf ".venvs/$name"
    fi
done

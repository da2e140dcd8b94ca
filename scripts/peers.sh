#!/usr/bin/env bash
# Build the environments of what bench/load.py (loaders) and bench/edge.py (routers) measure beside
# ours, one each under .venvs/. What is there is left alone; a peer that cannot be installed leaves its reason in
# .venvs/NAME.log, which the benchmark prints in its row.
#
#   scripts/peers.sh [NAME…]    only these, such as: safetensors vllm-router
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
    [vllm-router]="vllm-router==0.1.17"
    [sglang-router]="sglang-router==0.3.2"
    [litellm]="litellm[proxy]==1.106.2"
    [aiohttp]="aiohttp uvicorn uvloop httptools"
)
loaders=(torch safetensors runai tensorizer fastsafetensors instanttensor transformers)
routers=(vllm-router sglang-router litellm aiohttp)
order=("${loaders[@]}" "${routers[@]}")
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
    rm -rf "$environment"
    .venv/bin/uv venv --quiet --python .venv/bin/python "$environment"
    local install=(.venv/bin/uv pip install --quiet --python "$environment/bin/python")
    if [[ " ${loaders[*]} " == *" $name "* ]]; then
        fetch_torch
        install+=(--find-links "$wheels" --constraint constraints.txt torch numpy)
    fi
    # shellcheck disable=SC2086 # several packages, one word each
    "${install[@]}" ${packages[$name]}
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

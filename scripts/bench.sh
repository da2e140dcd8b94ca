#!/usr/bin/env bash
# Run the benchmarks, one after the other; results land in bench/results/.
#
#   scripts/bench.sh [NAME…]    only these, such as: edge cold_start
#
# The edge's benchmark measures nginx and HAProxy in the same run, with a mock server and a load
# program in C; the loader's measures fio: things that only a distribution has. As root they are
# installed by apt-get. Other loaders and routers come from the package index, each into its own
# .venvs/NAME.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
command -v nginx >/dev/null 2>&1 || [[ -x /usr/sbin/nginx ]] || missing+=(nginx-light)
command -v haproxy >/dev/null 2>&1 || [[ -x /usr/sbin/haproxy ]] || missing+=(haproxy)
command -v fio >/dev/null 2>&1 || missing+=(fio)
command -v cc >/dev/null 2>&1 || missing+=(gcc libc6-dev)
if ((${#missing[@]})); then
    if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null 2>&1; then
        echo "bench: installing ${missing[*]} by apt-get" >&2
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
    else
        echo "bench: this machine lacks ${missing[*]}; run: sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
fi

mkdir -p bench/results
names=("$@")
((${#names[@]})) || names=(cold_start warm_request load convert workers soak edge)
[[ " ${names[*]} " != *" load "* ]] ||
    scripts/peers.sh torch safetensors runai tensorizer fastsafetensors instanttensor transformers
[[ " ${names[*]} " != *" edge "* ]] || scripts/peers.sh vllm-router sglang-router litellm aiohttp
for name in "${names[@]}"; do
    echo "== $name"
    .venv/bin/python -m "bench.$name" | tee "bench/results/$name.txt"
done

#!/usr/bin/env bash
# Ask a server for what its OpenAPI document allows and forbids, thousands of times, and hold each
# answer to the document: no 500, no answer that the document does not have, nothing refused that
# it allows, nothing taken that it forbids.
#
#   scripts/schemathesis.sh                          starts `sllm serve` with a fake model
#   scripts/schemathesis.sh --max-examples 200       schemathesis' own arguments
#   SLLM_URL=http://… SLLM_API_KEY=… scripts/schemathesis.sh    a server that has a model `fake`
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.venvs/schemathesis
wanted="$PWD $(sha256sum <tests/schemathesis/requirements.txt)"
if [[ ! -f $environment/.stamp || $(<"$environment/.stamp") != "$wanted" ]]; then
    echo "schemathesis: building $environment" >&2
    rm -rf "$environment"
    mkdir -p .venvs
    .venv/bin/uv venv --quiet --python .venv/bin/python "$environment"
    .venv/bin/uv pip install --quiet --python "$environment/bin/python" \
        -r tests/schemathesis/requirements.txt
    printf '%s' "$wanted" >"$environment/.stamp"
fi
[[ ${1:-} != --only-install ]] || exit 0

if [[ -z ${SLLM_URL:-} ]]; then
    folder=$(mktemp -d)
    trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
    export SLLM_API_KEY=key-of-this-run
    # No hub: what is pulled from there has to fail, and soon.
    HF_ENDPOINT=http://127.0.0.1:9 .venv/bin/sllm serve --port 0 --data-dir "$folder" \
        --set orchestrator.on_demand_sources= --set ingest.sources.tries=1 \
        --set orchestrator.api_key_sha256="$(printf %s "$SLLM_API_KEY" | sha256sum | cut -c1-64)" \
        >"$folder/out" 2>"$folder/log" &
    server=$!
    touch "$folder/out"
    for _ in $(seq 240); do
        SLLM_URL=$(grep -ohE 'http://127.0.0.1:[0-9]+ \(stop' "$folder/out" | cut -d' ' -f1) && break
        kill -0 "$server" || { cat "$folder/log" >&2; exit 1; }
        sleep 0.25
    done
    curl --silent --fail --output "$folder/made" "$SLLM_URL/api/models" \
        -H "authorization: Bearer $SLLM_API_KEY" \
        -d '{"model":"fake","backend":"fake","keep_alive_s":-1}'
fi

run="$PWD/$environment/bin/schemathesis"
cd tests/schemathesis
PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 "$run" --config-file schemathesis.toml run "$SLLM_URL/openapi.json" \
    --no-color "$@"

#!/usr/bin/env bash
# Install the clients that must work unchanged, for the tests: those of Python in .venvs/clients,
# those of Node in tests/clients/node/node_modules; a browser for the page of the API, and
# schemathesis in .venvs/schemathesis. Nothing to do: returns in milliseconds.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'clients: %s\n' "$*" >&2; }

apt_install() {
    if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null 2>&1; then
        say "installing $* by apt-get"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    else
        say "error: this machine lacks: $*"
        say "run: sudo apt-get install $*"
        exit 1
    fi
}

python_clients() {
    local environment=.venvs/clients wanted
    wanted="$PWD $(sha256sum <tests/clients/python/requirements.txt)"
    [[ -f $environment/.stamp && $(<"$environment/.stamp") == "$wanted" ]] && return
    say "building $environment"
    rm -rf "$environment"
    mkdir -p .venvs
    .venv/bin/uv venv --quiet --python .venv/bin/python "$environment"
    .venv/bin/uv pip install --quiet --python "$environment/bin/python" \
        -r tests/clients/python/requirements.txt
    printf '%s' "$wanted" >"$environment/.stamp"
}

node_clients() {
    local folder=tests/clients/node wanted
    wanted=$(sha256sum <$folder/package-lock.json)
    [[ -f $folder/node_modules/.stamp && $(<$folder/node_modules/.stamp) == "$wanted" ]] && return
    command -v node >/dev/null && command -v npm >/dev/null || apt_install nodejs npm
    say "building $folder/node_modules"
    npm ci --prefix $folder --silent --no-progress --no-audit --no-fund >&2
    printf '%s' "$wanted" >$folder/node_modules/.stamp
}

browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    apt_install chromium
}

python_clients
node_clients
browser
scripts/schemathesis.sh --only-install

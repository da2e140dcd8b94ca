"""The routers that are compared: how each is started before the mock, alone on 127.0.0.1."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from bench.edges.process import ROOT, free_port, need

KEY = "sk-sllm-0Jx9mQvT2bKc7LdRw5ZsEyH8uNaPf4GiXo3CtVk6MqU"
"""Of routers that ask for one; not a secret."""

_NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
_HAPROXY = """
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 120s
  timeout server 120s
  timeout http-keep-alive 60s
  option http-keep-alive
  http-reuse always
frontend front
  bind 127.0.0.1:{port}
  default_backend mock
backend mock
  server mock 127.0.0.1:{upstream}
"""
_LITELLM = """
model_list:
  - model_name: mock
    litellm_params:
      model: openai/mock
      api_base: http://127.0.0.1:{upstream}/v1
      api_key: none
general_settings:
  master_key: {key}
  disable_spend_logs: true
litellm_settings:
  telemetry: false
"""


class Peer(msgspec.Struct, frozen=True):
    """A router: its name, and the command that runs it in a folder of its own."""

    name: str
    command: Callable[[Path, int, int], list[str]]
    """(folder, its port, the mock's port) → command."""
    rate_max: int | None = None
    """Requests a second that it can take at all: an open loop above this tells nothing."""


def _nginx(folder: Path, port: int, upstream: int) -> list[str]:
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, port=port, upstream=upstream))
    return [need("nginx", "nginx-light"), "-c", str(config), "-e", str(folder / "error.log")]


def _haproxy(folder: Path, port: int, upstream: int) -> list[str]:
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, upstream=upstream))
    return [need("haproxy", "haproxy"), "-db", "-f", str(config)]


def _in_environment(name: str, program: str) -> str:
    """A program of an environment that scripts/peers.sh builds.

    Raises:
        FileNotFoundError: it is not there; says why and what to do.
    """
    path = ROOT / ".venvs" / name / "bin" / program
    if not path.exists():
        raise FileNotFoundError(f"not installed: scripts/peers.sh {name}")
    return str(path)


def _vllm_router(folder: Path, port: int, upstream: int) -> list[str]:  # noqa: ARG001 - a Peer's
    program = _in_environment("vllm-router", "vllm-router")
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [
        *(program, *address, "--worker-urls", f"http://127.0.0.1:{upstream}"),
        *("--policy", "round_robin", "--prometheus-port", str(free_port())),
    ]


def _sglang_router(folder: Path, port: int, upstream: int) -> list[str]:  # noqa: ARG001 - a Peer's
    program = _in_environment("sglang-router", "sglang-router")
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [
        *(program, "launch", *address, "--worker-urls", f"http://127.0.0.1:{upstream}"),
        *("--policy", "round_robin", "--prometheus-port", str(free_port())),
    ]


def _litellm(folder: Path, port: int, upstream: int) -> list[str]:
    program = _in_environment("litellm", "litellm")
    config = folder / "litellm.yaml"
    config.write_text(_LITELLM.format(upstream=upstream, key=KEY))
    return [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


def _reference(folder: Path, port: int, upstream: int) -> list[str]:  # noqa: ARG001 - a Peer's
    python = _in_environment("aiohttp", "python")
    script = Path(__file__).with_name("reference.py")
    return [python, str(script), str(port), str(upstream)]


def _edge(folder: Path, port: int, upstream: int) -> list[str]:  # noqa: ARG001 - a Peer's
    return [sys.executable, "-m", "bench.edges.proxy", str(port), str(upstream)]


def _orchestrator(folder: Path, port: int, upstream: int) -> list[str]:  # noqa: ARG001 - a Peer's
    return [sys.executable, "-m", "bench.orchestrator", str(port), str(upstream), "--key", KEY]


PEERS = (
    Peer("nginx", _nginx),
    Peer("haproxy", _haproxy),
    Peer("vllm-router", _vllm_router),
    Peer("sglang-router", _sglang_router),
    Peer("uvicorn+aiohttp", _reference),
    Peer("litellm", _litellm, rate_max=50),
    Peer("edge", _edge),
    Peer("orchestrator", _orchestrator),
)
RUST = ("vllm-router", "sglang-router")
"""Whose better one is the bound."""

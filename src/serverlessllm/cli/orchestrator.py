"""`sllm orchestrator`: the front door alone, for agents that run apart."""

from __future__ import annotations

from serverlessllm.cli import server


def _main() -> server.Main:
    from serverlessllm.bootstrap import serve_orchestrator

    return serve_orchestrator


orchestrator = server.front_door(_main, "Serve OpenAI clients; agents are other processes.")

"""`sllm serve`: the whole system in one process."""

from __future__ import annotations

from serverlessllm.cli import server


def _main() -> server.Main:
    from serverlessllm.bootstrap import serve

    return serve


serve = server.front_door(_main, "Serve OpenAI clients: everything in one process.")

"""`sllm orchestrator`: the front door alone, for agents that run apart."""

from __future__ import annotations

from serverlessllm.cli import options
from serverlessllm.cli.serve import AllowRemote, Host, Port


def orchestrator(
    host: Host = None,
    port: Port = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    overrides: options.Set = None,
    allow_remote: AllowRemote = None,
) -> None:
    """Serve OpenAI clients; agents are other processes."""
    from serverlessllm.cli import server

    loaded = server.settings(host, port, data_dir, config, overrides, allow_remote)
    from serverlessllm import bootstrap

    server.run(loaded, bootstrap.serve_orchestrator)

"""`sllm agent`: one node's daemon."""

from __future__ import annotations

from typing import Annotated

import typer

from serverlessllm.cli import options


def agent(
    name: Annotated[
        str | None,
        typer.Option("--id", help="Its name in the cluster. [default: the host's name]"),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            help="host:port for orchestrators. [default: a unix socket, for those of this machine]"
        ),
    ] = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    overrides: options.Set = None,
    allow_remote: options.AllowRemote = None,
) -> None:
    """Run models on this machine for orchestrators."""
    from serverlessllm.cli import server

    loaded = options.settings(
        config,
        data_dir,
        overrides,
        agent__id=name,
        agent__listen=listen,
        orchestrator__allow_public_without_key=allow_remote or None,
    )
    from serverlessllm import bootstrap

    server.run(loaded, bootstrap.serve_agent, free_port="--listen 127.0.0.1:0")

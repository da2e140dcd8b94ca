"""`sllm serve`: the whole system in one process."""

from __future__ import annotations

from typing import Annotated

import typer

from serverlessllm.cli import options

Host = Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")]
Port = Annotated[
    int | None,
    typer.Option(help="Port to listen on; 0 takes a free one. [default: 8000]", min=0, max=65535),
]
AllowRemote = Annotated[
    bool | None,
    typer.Option(
        "--allow-remote",
        help="Listen where other machines can connect although no API key is set: whoever "
        "reaches the port may use and change everything.",
        show_default=False,
    ),
]


def serve(
    host: Host = None,
    port: Port = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    overrides: options.Set = None,
    allow_remote: AllowRemote = None,
) -> None:
    """Serve OpenAI clients: everything in one process."""
    from serverlessllm.cli import server

    loaded = server.settings(host, port, data_dir, config, overrides, allow_remote)
    from serverlessllm import bootstrap

    server.run(loaded, bootstrap.serve)

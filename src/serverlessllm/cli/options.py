"""Options that several verbs share, and the settings they lead to."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.config.load import Loaded

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Configuration file (TOML). [default: SLLM_CONFIG, ./serverlessllm.toml, "
        "~/.config/serverlessllm/serverlessllm.toml]",
        show_default=False,
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        help="Where everything that survives a restart lies. "
        "[default: ~/.local/share/serverlessllm]",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override one setting, such as loader.dram_budget_bytes=8GiB; repeatable.",
        show_default=False,
    ),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")]
Port = Annotated[
    int | None,
    typer.Option(help="Port to listen on; 0 takes a free one. [default: 8000]", min=0, max=65535),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes that serve the port together, 0 for one a core. [default: 1, which serves "
        "alone]",
        min=0,
        show_default=False,
    ),
]
Grpc = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Serve gRPC there too, such as 127.0.0.1:8001.",
        show_default=False,
    ),
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
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Url = Annotated[
    str | None,
    typer.Option(
        help="The server to ask. [default: SLLM_URL, else where `sllm serve` listens]",
        show_default=False,
    ),
]
Model = Annotated[str, typer.Argument(help="A model's name, as `sllm ls` shows it, or an alias.")]


CA_FILE: ContextVar[Path | None] = ContextVar("ca", default=None)
"""What `--ca` says, which stands before the verb and so is none of its parameters."""


def settings(
    config: Path | None = None,
    data_dir: str | None = None,
    overrides: list[str] | None = None,
    **keys: object,
) -> Loaded:
    """The settings under these options; a keyword is a key with `__` for its dots.

    Raises:
        Failure: they are wrong.
    """
    from serverlessllm.config.load import ConfigError, load

    values: dict[str, object] = {"data_dir": data_dir}
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    for text in overrides or ():
        key, separator, value = text.partition("=")
        if not separator:
            raise Failure(f"--set {text}: write KEY=VALUE", exit_status=2)
        values[key.strip()] = value
    try:
        return load(path=config, overrides=values)
    except ConfigError as error:
        raise Failure(
            str(error), "`sllm config example` explains every setting", exit_status=2
        ) from error

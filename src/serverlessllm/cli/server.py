"""What the verbs that serve share: the listen address, the announcement, the exit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.bootstrap import Control
    from serverlessllm.config.load import Loaded
    from serverlessllm.core.ids import Address

    OnReady = Callable[[Address], None]
    Main = Callable[[Loaded, Control, OnReady], Awaitable[None]]


def front_door(find_main: Callable[[], Main], text: str) -> Callable[..., None]:
    """A verb that listens for clients; `find_main` imports what it runs, `text` is its help."""

    def verb(
        host: options.Host = None,
        port: options.Port = None,
        workers: options.Workers = None,
        grpc: options.Grpc = None,
        data_dir: options.DataDir = None,
        config: options.Config = None,
        overrides: options.Set = None,
        allow_remote: options.AllowRemote = None,
    ) -> None:
        chosen: dict[str, object] = {
            "orchestrator__allow_public_without_key": allow_remote or None,
            "orchestrator__workers": workers,
            "orchestrator__grpc_listen": grpc,
        }
        loaded = _settings(host, port, data_dir, config, overrides, chosen)
        run(loaded, find_main(), free_port="--port 0 (gRPC: --grpc 127.0.0.1:0)")

    verb.__doc__ = text
    return verb


def run(loaded: Loaded, main: Main, *, free_port: str) -> None:
    """Serve until a signal; what keeps it from starting is a failure with its cure.

    `free_port` is how this verb is told to take any port.
    """
    from serverlessllm.cli import signals
    from serverlessllm.core.errors import Conflict, SLLMError

    def announce(address: Address) -> None:
        from serverlessllm.cli.output import print_if_read

        print_if_read(f"ready on {address} (stop: Ctrl-C)")

    try:
        signals.run(lambda control: main(loaded, control, announce))
    except OSError as error:
        raise Failure(_what(error), _cure(error, free_port)) from error
    except Conflict as error:
        raise Failure(
            error.message, "stop that one; or name this one by --set agent.id=NAME"
        ) from error
    except SLLMError as error:
        raise Failure(error.message, "`sllm doctor` looks at what this machine lacks") from error
    except ValueError as error:
        cure = "`sllm config example` explains every setting"
        raise Failure(str(error), cure, exit_status=2) from error


def _what(error: OSError) -> str:
    """The error in words, with the path or the address it is about, without its number."""
    import os
    import re

    reason = error.strerror or str(error)
    if error.filename:
        return f"{error.filename}: {reason}"
    # asyncio says it in Python's words: `… on address ('127.0.0.1', 8000): …`
    address = re.search(r"address \('(.+?)', (\d+)", reason)
    if address is None or error.errno is None:
        return reason
    what = "gRPC on " if reason.startswith("gRPC") else ""
    return f"{what}{address[1]}:{address[2]}: {os.strerror(error.errno).lower()}"


def _cure(error: OSError, free_port: str) -> str:
    import errno
    import socket

    if isinstance(error, socket.gaierror):
        return "listen on an address of this machine, such as 127.0.0.1"
    match error.errno:
        case errno.EADDRINUSE:
            return f"another server listens there: stop it, or take a free port with {free_port}"
        case errno.EADDRNOTAVAIL:
            return "listen on an address of this machine, such as 127.0.0.1"
        case errno.EACCES | errno.EPERM:
            return "use a port over 1023 and a --data-dir of yours"
        case errno.ENOENT | errno.EEXIST | errno.ENOTDIR | errno.EROFS:
            return "name a directory that can be made or is yours: --data-dir, SLLM_DATA_DIR"
        case errno.ENOSPC | errno.EDQUOT:
            return "free space, or put --data-dir on another disk"
    return ""


def _settings(
    host: str | None,
    port: int | None,
    data_dir: str | None,
    config: Path | None,
    overrides: list[str] | None,
    chosen: dict[str, object],
) -> Loaded:
    """The settings of a process that listens where `--host` and `--port` say."""
    loaded = options.settings(config, data_dir, overrides, **chosen)
    if host is None and port is None:
        return loaded
    was_host, _, was_port = loaded.settings.orchestrator.listen.removeprefix("http://").rpartition(
        ":"
    )
    listen = f"{host or was_host or '127.0.0.1'}:{was_port if port is None else port}"
    return options.settings(config, data_dir, overrides, **chosen, orchestrator__listen=listen)

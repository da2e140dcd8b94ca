"""What the verbs that serve share: the listen address, the announcement, the exit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.bootstrap import Stop
    from serverlessllm.config.load import Loaded
    from serverlessllm.core.ids import Address

    OnReady = Callable[[Address], None]
    Main = Callable[[Loaded, Stop, OnReady], Awaitable[None]]


def settings(
    host: str | None,
    port: int | None,
    data_dir: str | None,
    config: Path | None,
    overrides: list[str] | None,
    allow_remote: bool | None,
) -> Loaded:
    """The settings of a process that listens where `--host` and `--port` say."""
    loaded = options.settings(
        config,
        data_dir,
        overrides,
        orchestrator__allow_public_without_key=allow_remote or None,
    )
    if host is None and port is None:
        return loaded
    was_host, _, was_port = loaded.settings.orchestrator.listen.removeprefix("http://").rpartition(
        ":"
    )
    listen = f"{host or was_host or '127.0.0.1'}:{was_port if port is None else port}"
    return options.settings(
        config,
        data_dir,
        overrides,
        orchestrator__allow_public_without_key=allow_remote or None,
        orchestrator__listen=listen,
    )


def run(loaded: Loaded, main: Main) -> None:
    """Serve until a signal; what keeps it from starting is a failure with its cure."""
    import errno

    from serverlessllm.cli import signals
    from serverlessllm.core.errors import SLLMError

    def announce(address: Address) -> None:
        print(f"ready on {address} (stop: Ctrl-C)", flush=True)

    try:
        signals.run(lambda stop: main(loaded, stop, announce))
    except OSError as error:
        cure = ""
        if error.errno == errno.EADDRINUSE:
            cure = "another server listens there: stop it, or take a free port with --port 0"
        elif error.errno in {errno.EACCES, errno.EPERM}:
            cure = "use a port over 1023 and a --data-dir of yours"
        elif error.errno == errno.ENOSPC:
            cure = "free space, or put --data-dir on another disk"
        raise Failure(str(error), cure) from error
    except SLLMError as error:
        raise Failure(error.message, "sllm doctor") from error
    except ValueError as error:
        raise Failure(str(error), exit_status=2) from error

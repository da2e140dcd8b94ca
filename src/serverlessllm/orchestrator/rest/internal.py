"""uvicorn behind the edge: an ASGI application on a unix socket of our own."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import anyio
import uvicorn
from starlette.applications import Starlette

from serverlessllm.core.ids import Address

_numbers = itertools.count(1)


class _Server(uvicorn.Server):
    """Leaves the process's signals alone, says when it listens, and waits where the library's looks
    ten times a second whether it should end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._ending = asyncio.Event()

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    def end(self) -> None:
        """Close; `serve` returns then."""
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._ending.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class InternalServer:
    """Serves one application until `close`."""

    def __init__(self, app: Starlette, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / f"api-{os.getpid()}-{next(_numbers)}.sock"
        self._server = _Server(
            uvicorn.Config(
                app,
                uds=str(self._path),
                lifespan="off",
                access_log=False,
                date_header=False,
                log_config=None,
                log_level="warning",
                timeout_graceful_shutdown=1,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Address:
        """Return when it listens; raises what kept it from that."""
        _sweep(self._run_dir)
        anyio.get_current_task()  # its back end, 60 ms of imports, must not wait for a request
        self._task = asyncio.ensure_future(self._server.serve())
        listening = asyncio.ensure_future(self._server.listening.wait())
        await asyncio.wait((self._task, listening), return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            listening.cancel()
            await self._task
        return Address(f"unix:{self._path}")

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._server.end()
            await self._task
            self._task = None
        self._path.unlink(missing_ok=True)


def _sweep(run_dir: Path) -> None:
    """Remove the sockets of processes that were killed."""
    for path in (*run_dir.glob("api-*-*.sock"), *run_dir.glob("front-*-*.sock")):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            path.unlink(missing_ok=True)

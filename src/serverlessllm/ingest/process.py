"""The converter process as the service sees it: started, listened to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from types import TracebackType
from typing import Self

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.ingest.messages import Proceed, Report, WorkRequest

_REPORTS: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
_LOG_TAIL_BYTES = 4096
_READ_BYTES = 65536


class WorkerGone(Exception):
    """The worker ended, was killed or fell silent before it said how it went.

    `log_tail` is the end of what it wrote to stderr.
    """

    def __init__(self, how: str, log_tail: str) -> None:
        super().__init__(how)
        self.how = how
        self.log_tail = log_tail


class WorkerProcess:
    """`async with WorkerProcess(request, clock) as worker:` ends it, and all it started."""

    def __init__(self, request: WorkRequest, clock: Clock) -> None:
        self._request = request
        self._clock = clock
        self._process: Process | None = None
        self._drain: asyncio.Task[None] | None = None
        self._log_tail = b""

    async def __aenter__(self) -> Self:
        settings = self._request.settings
        environment = dict(os.environ)  # the hub's library reads its own variables
        if settings.hub_endpoint is not None:
            environment["HF_ENDPOINT"] = settings.hub_endpoint
        environment["HF_HUB_DISABLE_TELEMETRY"] = "1"
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serverlessllm.ingest.worker",
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=environment,
            start_new_session=True,  # its own group, in the spelling that uvloop knows too
        )
        self._drain = asyncio.create_task(self._keep_log_tail(), name="ingest worker's log")
        await self._send(self._request)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        process, drain = self._process, self._drain
        if process is None or drain is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await drain
        if process.stdin is not None:
            process.stdin.close()

    @property
    def pid(self) -> int:
        """Its process id, and that of its process group."""
        assert self._process is not None
        return self._process.pid

    async def proceed(self, folder: str) -> None:
        """Let it convert."""
        await self._send(Proceed(folder=folder))

    async def report(self) -> Report:
        """Its next report.

        Raises:
            WorkerGone: it died, or said nothing for `worker_silence_s_max`.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        line = asyncio.ensure_future(self._process.stdout.readline())
        limit = asyncio.ensure_future(
            self._clock.sleep(self._request.settings.worker_silence_s_max)
        )
        try:
            await asyncio.wait({line, limit}, return_when=asyncio.FIRST_COMPLETED)
            if not line.done():
                raise WorkerGone("fell silent", self._tail())
            if line.result().endswith(b"\n"):
                return _REPORTS.decode(line.result())
            await self._process.wait()
            if self._drain is not None:
                await self._drain
            raise WorkerGone(f"ended with status {self._process.returncode}", self._tail())
        finally:
            for task in (line, limit):
                task.cancel()
            await asyncio.gather(line, limit, return_exceptions=True)

    async def _send(self, message: msgspec.Struct) -> None:
        """Tell it, unless it is gone: the next report says so."""
        assert self._process is not None
        assert self._process.stdin is not None
        if self._process.stdin.is_closing():  # uvloop's pipe refuses what asyncio's only drops
            return
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            await self._process.stdin.drain()

    async def _keep_log_tail(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(_READ_BYTES):
            self._log_tail = (self._log_tail + data)[-_LOG_TAIL_BYTES:]

    def _tail(self) -> str:
        return self._log_tail.decode(errors="replace")

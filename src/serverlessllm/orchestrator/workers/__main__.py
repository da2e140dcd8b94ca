"""A worker's own process: `python -m serverlessllm.orchestrator.workers CHANNEL PARENT`.

CHANNEL is the inherited descriptor of its end of the channel, PARENT the main process's id.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys

import msgspec
import uvloop

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.parent import die_with
from serverlessllm.orchestrator.workers.channel import Channel
from serverlessllm.orchestrator.workers.messages import (
    CannotStart,
    Drain,
    Leaving,
    Listening,
    Start,
    ToWorker,
)
from serverlessllm.orchestrator.workers.worker import Worker
from serverlessllm.telemetry import configure, log

_log = log("worker")
_CANNOT_START = 2
_decoder = msgspec.msgpack.Decoder(ToWorker)


class _Process:
    """From the first message to the exit status."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.channel: Channel[ToWorker] = Channel(_decoder, self._hear, self._channel_ended)
        self._stop = asyncio.Event()
        self._told_to = False
        """By the main process, which waits for the end."""
        self._ended = asyncio.Event()
        self._start: asyncio.Future[Start] = loop.create_future()
        self._worker: Worker | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)

    async def run(self, descriptor: int) -> int:
        await self.channel.open(socket.socket(fileno=descriptor))
        start = await self._start
        try:
            assert self._worker is not None
            await self._worker.start()
        except (OSError, ValueError) as error:
            _log.error("cannot start", worker=start.number, reason=str(error))
            self.channel.send(CannotStart(reason=str(error)))
            self._stop.set()
            await self._close_channel()
            return _CANNOT_START
        # What start-up made stays for ever: the collector need never look at it again.
        gc.collect()
        gc.freeze()
        self.channel.send(Listening())
        await self._stop.wait()
        if not self._told_to:
            self.channel.send(Leaving())
        _log.info("draining", worker=start.number)
        await self._worker.drain()
        await self._close_channel()
        return 0

    async def _close_channel(self) -> None:
        """Once what was said has been sent."""
        self.channel.close()
        await self._ended.wait()

    def _hear(self, message: ToWorker) -> None:
        if isinstance(message, Start):
            configure(message.telemetry)
            self._worker = Worker(message, SystemClock(), self.channel.send)
            self._start.set_result(message)
        elif isinstance(message, Drain):
            self._told_to = True
            self._stop.set()
        elif self._worker is not None:
            self._worker.hear(message)

    def _channel_ended(self) -> None:
        """Without the main process there is nothing to serve: what runs is cut off."""
        self._ended.set()
        if not self._stop.is_set():
            os._exit(1)


def main() -> None:
    descriptor, parent = map(int, sys.argv[1:])
    die_with(parent)
    # For the main process, which tells workers; who sends it by name reaches both.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(_run(descriptor))
    sys.exit(status)


async def _run(descriptor: int) -> int:
    return await _Process().run(descriptor)


if __name__ == "__main__":
    main()

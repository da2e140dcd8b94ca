"""One clock tick for every deadline: no timer a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from serverlessllm.core.clock import Clock

_log: Final = structlog.get_logger(__name__)


class Sweeper:
    """Calls `sweep(now_s)` once an interval until it is closed.

    `now_s` is the time of the last tick: a coarse clock that costs an attribute to read.
    """

    def __init__(self, sweep: Callable[[float], None], interval_s: float, clock: Clock) -> None:
        self._sweep = sweep
        self._interval_s = interval_s
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self.now_s = clock.now_s()

    def start(self) -> None:
        """Begin to tick, once."""
        if self._task is None:
            self.now_s = self._clock.now_s()
            self._task = asyncio.get_running_loop().create_task(self._run(), name="edge-sweeper")

    async def close(self) -> None:
        """Stop ticking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(self._interval_s)
            self.now_s = self._clock.now_s()
            try:
                self._sweep(self.now_s)
            except Exception:  # noqa: BLE001 - the boundary of a tick: the next one must come
                _log.exception("sweep failed")

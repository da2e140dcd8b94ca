"""A clock that moves only when told: time-outs and leases are tested in no time."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class VirtualClock:
    """A `Clock` at `now_s`; sleepers wake, in order, when `advance` passes their deadline."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._now_s = now_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_s(self) -> float:
        return self._now_s

    async def sleep(self, delay_s: float) -> None:
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + delay_s, next(self._order), wake))
        await wake

    @property
    def sleepers(self) -> int:
        """How many wait now: lets a test know that its subject has gone to sleep."""
        return sum(not wake.done() for _, _, wake in self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move on, waking each sleeper at its own moment and letting it run."""
        end_s = self._now_s + seconds
        while self._sleepers and self._sleepers[0][0] <= end_s:
            self._now_s, _, wake = heapq.heappop(self._sleepers)
            if not wake.done():
                wake.set_result(None)
            await self._settle()
        self._now_s = end_s
        await self._settle()

    @staticmethod
    async def _settle() -> None:
        """Let everything that became runnable run, and what that made runnable."""
        for _ in range(20):
            await asyncio.sleep(0)

"""The bounded queue before the loader: who waits for a request goes before who prefetches."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter

from serverlessllm.agent.settings import AgentSettings
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import TooManyRequests
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.arrivals import OnArriving
from serverlessllm.loader.progress import Report
from serverlessllm.loader.references import Resident
from serverlessllm.loader.service import Loader


class Downloads:
    """`loads_max` checkpoints at once. Those who want one that moves already join it at once: the
    loader shares the copy, and ends it only when the last of them has left."""

    def __init__(self, loader: Loader, settings: AgentSettings, clock: Clock) -> None:
        self._loader = loader
        self._settings = settings
        self._clock = clock
        self._active: Counter[CheckpointId] = Counter()
        self._order = itertools.count()
        self._queue: list[tuple[bool, int, CheckpointId, asyncio.Future[None]]] = []

    @property
    def queued(self) -> int:
        """How many wait for their turn."""
        return sum(not turn.done() for *_, turn in self._queue)

    async def load(
        self,
        ref: CheckpointRef,
        level: CacheLevel,
        report: Report | None,
        *,
        urgent: bool,
        on_arriving: OnArriving | None = None,
    ) -> tuple[Resident, float]:
        """What `Loader.load` returns, and the seconds waited for the turn.

        Raises:
            TooManyRequests: too many wait already.
            SLLMError: what `Loader.load` raises.
        """
        asked_s = self._clock.now_s()
        await self._turn(ref.id, urgent)
        try:
            waited_s = self._clock.now_s() - asked_s
            return await self._loader.load(ref, level, report, on_arriving), waited_s
        finally:
            self._leave(ref.id)

    async def _turn(self, checkpoint: CheckpointId, urgent: bool) -> None:
        """Wait for a place; the place is counted when this returns."""
        if checkpoint in self._active or len(self._active) < self._settings.loads_max:
            self._active[checkpoint] += 1
            return
        if self.queued >= self._settings.loads_queued_max:
            raise TooManyRequests("too many loads wait on this agent", retry_after_s=5.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (not urgent, next(self._order), checkpoint, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(checkpoint)
            raise

    def _leave(self, checkpoint: CheckpointId) -> None:
        self._active[checkpoint] -= 1
        if not self._active[checkpoint]:
            del self._active[checkpoint]
            self._give_place()

    def _give_place(self) -> None:
        """The place is the first one's in the queue, and of all who want the same."""
        while self._queue and len(self._active) < self._settings.loads_max:
            *_, checkpoint, turn = heapq.heappop(self._queue)
            if turn.done():
                continue
            joining = [other for *_, wanted, other in self._queue if wanted == checkpoint]
            for each in (turn, *joining):
                if not each.done():
                    self._active[checkpoint] += 1
                    each.set_result(None)

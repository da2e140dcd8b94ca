"""One running load for everybody who wants it: shared, counted, ended by the last one to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import Draining
from serverlessllm.loader.arrivals import Arriving, OnArriving
from serverlessllm.loader.progress import LoadProgress, Report
from serverlessllm.loader.workers import outlast


class Releasable(Protocol):
    """A result that is given back."""

    def release(self) -> None: ...


T = TypeVar("T", bound=Releasable)
S = TypeVar("S")


class Flight(Generic[T]):
    """A load to `level` and its waiters. It holds the result until the last waiter has left, so
    that each can take a reference of its own."""

    def __init__(
        self, level: CacheLevel, run: Callable[[Report, OnArriving], Coroutine[Any, Any, T]]
    ) -> None:
        self.level = level
        self._listeners: list[Report] = []
        self._last: LoadProgress | None = None
        self._early: list[OnArriving] = []
        self._arriving: Arriving | None = None
        self._waiters = 0
        self.task = asyncio.create_task(run(self._report, self._arrives), name="loader.flight")

    @property
    def joinable(self) -> bool:
        """False once it has ended, or its last waiter has left."""
        return not self.task.done() and not self.task.cancelling()

    async def join(
        self,
        take: Callable[[T], S],
        on_progress: Report | None,
        on_arriving: OnArriving | None,
    ) -> S:
        """Wait for the result and take from it; several may, each gets the same error.

        Raises:
            Draining: the loader was closed.
        """
        self._waiters += 1
        if on_arriving is not None:
            self._early.append(on_arriving)
            if self._arriving is not None and not self._arriving.ended:
                on_arriving(self._arriving)
        if on_progress is not None:
            self._listeners.append(on_progress)
            if self._last is not None:
                on_progress(self._last)
        try:
            await asyncio.wait((self.task,))
            if self.task.cancelled():
                raise Draining("the agent is shutting down; ask another")
            return take(self.task.result())
        finally:
            if on_progress is not None:
                self._listeners.remove(on_progress)
            if on_arriving is not None:
                self._early.remove(on_arriving)
            self._waiters -= 1
            if not self._waiters:
                await self._end()

    async def _end(self) -> None:
        """Nobody waits any more: stop, and give back what was reached."""
        self.task.cancel()
        await outlast(self.task)
        if not self.task.cancelled() and self.task.exception() is None:
            self.task.result().release()

    def _report(self, progress: LoadProgress) -> None:
        self._last = progress
        for listener in tuple(self._listeners):
            listener(progress)

    def _arrives(self, arriving: Arriving) -> None:
        self._arriving = arriving
        for listener in tuple(self._early):
            listener(arriving)

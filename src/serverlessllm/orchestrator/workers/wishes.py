"""Loads that a worker wishes for: the main process's waiting room has one place for each."""

from __future__ import annotations

import asyncio
from collections import Counter

from serverlessllm.core.errors import SLLMError
from serverlessllm.core.failures import record_of
from serverlessllm.core.ids import ModelId
from serverlessllm.orchestrator.coldstart import Waiter, WaitingRoom
from serverlessllm.orchestrator.view import ClusterView, ready_agents
from serverlessllm.orchestrator.workers.messages import (
    LoadFailed,
    LoadGoes,
    LoadReady,
    Unwished,
    Wish,
)
from serverlessllm.orchestrator.workers.process import WorkerProcess
from serverlessllm.telemetry.logs import log

_log = log("workers")


class Wishes:
    """Owns a task for each wish that is not yet fulfilled; `close` ends them."""

    def __init__(self, view: ClusterView, room: WaitingRoom) -> None:
        self._view = view
        self._room = room
        self._tasks: dict[tuple[WorkerProcess, int], asyncio.Task[None]] = {}
        self._waiting: Counter[ModelId] = Counter()

    def waiting_for(self, model: ModelId) -> int:
        """Places in the room that are no request's: those are counted where they wait."""
        return self._waiting[model]

    def begin(self, worker: WorkerProcess, wish: Wish) -> None:
        """Have it loaded, unless it has just been, and the worker told how it goes."""
        last = self._room.last_load(wish.model)
        ready = frozenset() if wish.elsewhere else ready_agents(self._view, wish.model)
        if last is not None and last.agent in ready:
            worker.tell(LoadReady(wish=wish.wish, loaded=last, whole=True))
            return
        key = (worker, wish.wish)
        task = asyncio.create_task(self._fulfil(worker, wish), name=f"load {wish.model}")
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def end(self, worker: WorkerProcess, wish: Unwished) -> None:
        """Nobody there waits any more."""
        task = self._tasks.get((worker, wish.wish))
        if task is not None:
            task.cancel()

    def end_all(self, worker: WorkerProcess) -> None:
        """It has ended."""
        for (owner, _), task in tuple(self._tasks.items()):
            if owner is worker:
                task.cancel()

    async def close(self) -> None:
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fulfil(self, worker: WorkerProcess, wish: Wish) -> None:
        self._waiting[wish.model] += 1
        try:
            with self._room.enter(wish.model, elsewhere=wish.elsewhere) as waiter:
                await self._follow(worker, wish, waiter)
        except SLLMError as error:
            self._fail(worker, wish, error)
        except Exception:  # noqa: BLE001 - boundary of a task: the worker must hear of a bug
            _log.error("a wish ended by a bug", exc_info=True, model=wish.model)
            self._fail(worker, wish, SLLMError())
        finally:
            self._waiting[wish.model] -= 1
            self._waiting += Counter()  # drops what is zero

    async def _follow(self, worker: WorkerProcess, wish: Wish, waiter: Waiter) -> None:
        told = None
        ready = False
        while True:
            if waiter.done.done() and not ready:
                ready = True
                loaded, whole = waiter.loaded(), not waiter.incomplete
                worker.tell(LoadReady(wish=wish.wish, loaded=loaded, whole=whole))
            elif waiter.progress is not told:
                told = waiter.progress
                worker.tell(LoadGoes(wish=wish.wish, event=told))
            if not waiter.incomplete:
                break
            await waiter.moved()
        if not whole:
            worker.tell(LoadReady(wish=wish.wish, loaded=loaded, whole=True))

    @staticmethod
    def _fail(worker: WorkerProcess, wish: Wish, error: SLLMError) -> None:
        worker.tell(
            LoadFailed(
                wish=wish.wish,
                error=record_of(error),
                param=error.param,
                retry_after_s=error.retry_after_s,
            )
        )

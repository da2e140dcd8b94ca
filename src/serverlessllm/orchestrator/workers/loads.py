"""A worker's loads are the main process's: one for all workers, and each follows it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.clock import Clock
from serverlessllm.core.failures import error_of
from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.orchestrator.coldstart import BringsUp, Fleet, Loaded, WaitingRoom
from serverlessllm.orchestrator.loads import fleet_of
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.workers.messages import (
    FromWorker,
    LoadFailed,
    LoadGoes,
    LoadReady,
    NotReady,
    ToWorker,
    Unwished,
    Wish,
)

Tell = Callable[[FromWorker], None]


class _Wished:
    """A load that somebody here waits for."""

    def __init__(
        self, publish: Callable[[LoadEvent], None], became_ready: Callable[[Loaded], None]
    ) -> None:
        self.publish = publish
        self.became_ready = became_ready
        self.outcome: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()


class WishedLoads:
    """`coldstart.BringsUp` by asking the main process."""

    def __init__(self, view: ClusterView, tell: Tell) -> None:
        self._view = view
        self._tell = tell
        self._numbers = itertools.count(1)
        self._wished: dict[int, _Wished] = {}

    def fleet(self) -> Fleet:
        return fleet_of(self._view)

    async def bring_up(
        self,
        model: ModelId,
        elsewhere: bool,
        publish: Callable[[LoadEvent], None],
        became_ready: Callable[[Loaded], None],
    ) -> Loaded:
        number = next(self._numbers)
        wished = self._wished[number] = _Wished(publish, became_ready)
        self._tell(Wish(wish=number, model=model, elsewhere=elsewhere))
        try:
            return await wished.outcome
        finally:
            del self._wished[number]
            self._tell(Unwished(wish=number))

    def hear(self, message: ToWorker) -> bool:
        """Whether the message was about a load."""
        match message:
            case LoadGoes(wish=number, event=event) if number in self._wished:
                self._wished[number].publish(event)
            case LoadReady(wish=number, loaded=loaded, whole=whole) if number in self._wished:
                self._ready(self._wished[number], loaded, whole)
            case LoadFailed(wish=number) if number in self._wished:
                self._fail(self._wished[number], message)
            case LoadGoes() | LoadReady() | LoadFailed():
                pass  # nobody waits any more
            case _:
                return False
        return True

    @staticmethod
    def _ready(wished: _Wished, loaded: Loaded, whole: bool) -> None:
        if not whole:
            wished.became_ready(loaded)
        elif not wished.outcome.done():
            wished.outcome.set_result(loaded)

    @staticmethod
    def _fail(wished: _Wished, failed: LoadFailed) -> None:
        error = error_of(failed.error)
        error.param = failed.param
        error.retry_after_s = failed.retry_after_s
        if not wished.outcome.done():
            wished.outcome.set_exception(error)


class WorkerRoom(WaitingRoom):
    """A worker's waiting room: the main process hears what requests find out about a load."""

    def __init__(
        self, loads: BringsUp, settings: OrchestratorSettings, clock: Clock, tell: Tell
    ) -> None:
        super().__init__(loads, settings, clock)
        self._tell = tell

    def not_ready(self, model: ModelId, agent: AgentId) -> None:
        super().not_ready(model, agent)
        self._tell(NotReady(agent=agent, model=model))

"""A request whose model is ready nowhere: it waits for a load, and its client is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import NoCapacity
from serverlessllm.edge.server import Request
from serverlessllm.openai.sse import EVENT_STREAM_HEADERS
from serverlessllm.orchestrator.coldstart import Waiter, WaitingRoom
from serverlessllm.orchestrator.listeners import LISTENER_HEADER, Listener
from serverlessllm.orchestrator.rest.call import Call
from serverlessllm.orchestrator.rest.loading import Narrator, StillLoading, wait_budget_s
from serverlessllm.orchestrator.router import Lease, Router
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView, ready_agents
from serverlessllm.orchestrator.waits import settled

_OK = 200


class ColdStarts:
    """What a request does in the waiting room."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        view: ClusterView,
        router: Router,
        room: WaitingRoom,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._view = view
        self._router = router
        self._room = room
        self._clock = clock

    async def lease(self, call: Call) -> tuple[Lease, Waiter]:
        """Wait for a load of the model; a lease on the agent that has it then, and the load, whose
        bytes may still move."""
        began_s = self._clock.now_s()
        elsewhere = bool(call.refused)
        if elsewhere and not self._can_scale_out(call):
            raise call.error or NoCapacity()
        with self._room.enter(call.model, elsewhere=elsewhere) as waiter:
            await self.wait(call, waiter, waiter.done)
        loaded = waiter.loaded()
        call.timing.loaded = loaded
        call.timing.waited_s += self._clock.now_s() - began_s
        lease = self._router.lease_on(loaded.agent, call.model, loaded.predicted_s)
        if lease is None:
            raise NoCapacity(f"the agent that loaded {call.model} has gone", retry_after_s=1.0)
        return lease, waiter

    async def beside(self, call: Call, waiter: Waiter, forward: Coroutine[Any, Any, bool]) -> bool:
        """What `forward` returns, which asks an instance that waits for bytes: until its answer
        begins, the client is in the hands of the load."""
        begun = call.begun = asyncio.get_running_loop().create_future()

        async def answered() -> bool:
            try:
                return await forward
            finally:
                call.begin()

        answer = asyncio.ensure_future(answered())
        try:
            await self.wait(call, waiter, begun)
            return await answer
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            forward.close()  # if it never ran
            call.begun = None

    async def wait(self, call: Call, waiter: Waiter, done: asyncio.Future[Any]) -> None:
        """Until `done`, telling who streams, or listens, how far the load is. What is whole and
        ready is waited for without a budget.

        Raises:
            StillLoading: the client's budget is over. The load goes on.
        """
        settings, stream, told = self._settings, call.parsed.stream, call.request.started
        if not call.waits_until_s:
            budget_s = wait_budget_s(call.wishes, settings, stream=stream)
            call.waits_until_s = self._clock.now_s() + budget_s
        tell = self._teller(call)
        pause_s = settings.wait_budget_s_max
        if tell is not None:
            pause_s = settings.comment_interval_s if told else settings.stream_grace_s
        while stream or waiter.incomplete:
            left_s = call.waits_until_s - self._clock.now_s() if waiter.incomplete else pause_s
            if await settled(self._clock, done, min(pause_s, left_s)):
                return
            if waiter.incomplete and self._clock.now_s() >= call.waits_until_s:
                waiter.promise()
                raise StillLoading(call.model, waiter.progress)
            if tell is not None:
                await tell(waiter.progress)
                pause_s = settings.comment_interval_s

    def _teller(self, call: Call) -> Listener | None:
        """How who waits is told, if at all."""
        request = call.request
        if call.parsed.stream:
            if call.narrator is None:
                call.narrator = Narrator(call.wishes, request.path, call.parsed.model)
            return partial(_tell, request, call.narrator)
        return self._room.listeners.named(request.headers.get(LISTENER_HEADER))

    def _can_scale_out(self, call: Call) -> bool:
        """Whether an agent that has not refused could load the model too."""
        record = self._view.models.get(call.model)
        if record is None:
            return False
        avoid = {*ready_agents(self._view, call.model), *call.avoid}
        return self._router.place(record, avoid) is not None


async def _tell(request: Request, narrator: Narrator, progress: LoadEvent) -> None:
    if not request.started:
        request.start(_OK, EVENT_STREAM_HEADERS)
    await request.write(narrator.tell(progress))

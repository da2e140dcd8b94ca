"""Requests on an agent that stopped without a reset must not wait for ever.

Silence has no event, so a timer looks for it. Heartbeats may be late, and a lease may run out,
because the metadata store is away; therefore the agent itself is asked before it is given up.
"""

from __future__ import annotations

import asyncio

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import Address, AgentId
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import AgentSeen, ClusterView
from serverlessllm.telemetry.logs import log

_log = log("orchestrator")


class Vigil:
    """Watches over the agents that hold requests of ours."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        view: ClusterView,
        router: Router,
        upstreams: Upstreams,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._view = view
        self._router = router
        self._upstreams = upstreams
        self._clock = clock

    async def run(self) -> None:
        """For as long as the orchestrator lives; ends by cancellation only."""
        pause_s = self._settings.agent_probe_after_s / 4
        while True:
            slept_from_s = self._clock.now_s()
            await self._clock.sleep(pause_s)
            # Who overslept has been kept from reading heartbeats too: they come first.
            if self._clock.now_s() - slept_from_s < 2 * pause_s:
                await self.look()

    async def look(self) -> None:
        """Once: take its requests from each agent that is silent in every way."""
        old_s = self._clock.now_s() - self._settings.agent_probe_after_s
        async with asyncio.TaskGroup() as group:
            for agent, address in self._router.agents_held().items():
                seen = self._view.agents.get(agent)
                if seen is None or seen.seen_s < old_s:  # None: its lease has run out
                    group.create_task(self._probe(agent, address, seen))

    async def _probe(self, agent: AgentId, address: Address, seen: AgentSeen | None) -> None:
        try:
            async with self._upstreams.send(
                address, "GET", "/livez", timeout_s=self._settings.agent_probe_s_max
            ):
                return
        except SLLMError:
            if self._view.agents.get(agent) is seen:  # no heartbeat has come meanwhile
                self._lose(agent, address)

    def _lose(self, agent: AgentId, address: Address) -> None:
        _log.warning("agent is silent, its requests go elsewhere", agent=agent)
        self._view.failed(agent)
        self._upstreams.cut(address)

"""The agent's place in the cluster: a lease, a record a second, and an epoch that may be fenced."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.waits import first
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import AgentRecord
from serverlessllm.core.errors import Fenced, MetadataUnavailable, Unavailable
from serverlessllm.core.ids import AgentId, Epoch
from serverlessllm.metadata.base import LeaseLost
from serverlessllm.metadata.registry import Registration, Registry
from serverlessllm.telemetry import log
from serverlessllm.telemetry.table import HEARTBEATS

_log = log("agent")


class Heartbeat:
    """Registers, writes the record, and registers again when the lease was lost.

    While the metadata store is away nothing changes for those who are served. When another
    registration of the same id has fenced this one, `on_fenced(True)` is called, nothing is
    written until that other one is gone, and then this agent comes back with a new epoch and
    `on_fenced(False)`.
    """

    def __init__(
        self,
        registry: Registry,
        agent: AgentId,
        settings: AgentSettings,
        clock: Clock,
        *,
        record: Callable[[], AgentRecord],
        on_fenced: Callable[[bool], None],
    ) -> None:
        self._registry = registry
        self._agent = agent
        self._settings = settings
        self._clock = clock
        self._record = record
        self._on_fenced = on_fenced
        self._registration: Registration | None = None
        self._changed = asyncio.Event()
        self._fenced = False
        self.tried = asyncio.Event()
        """Set after the first attempt to register, however it went."""

    @property
    def epoch(self) -> Epoch:
        """Of the last registration; 0: not registered yet."""
        return Epoch(0) if self._registration is None else self._registration.epoch

    def changed(self) -> None:
        """The state changed: beat at once."""
        self._changed.set()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            pause_s = await self._beat()
            await self._pause(pause_s)

    async def leave(self) -> None:
        """Give the lease back; a store that is away will find it expired."""
        if self._registration is not None and not self._fenced:
            with contextlib.suppress(MetadataUnavailable):
                await self._registry.deregister(self._registration)

    async def _beat(self) -> float:
        """One heartbeat; the seconds until the next."""
        self._changed.clear()
        try:
            if self._fenced and not await self._place_is_free():
                return self._settings.lease_ttl_s
            if self._registration is None:
                self._registration = await self._registry.register_agent(
                    self._agent, self._settings.lease_ttl_s
                )
                if self._fenced:
                    self._fenced = False
                    self._on_fenced(False)
            await self._registry.write_agent(self._registration, self._record())
        except LeaseLost:
            return self._lost("lease_lost")
        except Fenced:
            _log.error("fenced: another agent registered this id", agent=self._agent)
            self._fenced = True
            self._on_fenced(True)
            self._lost("fenced")
            return self._settings.lease_ttl_s
        except Unavailable:
            HEARTBEATS.inc("unavailable")
            self.tried.set()
            return random.uniform(0.1, self._settings.reconnect_s_max)  # noqa: S311 - jitter
        HEARTBEATS.inc("ok")
        self.tried.set()
        return self._settings.heartbeat_s

    def _lost(self, outcome: str) -> float:
        """Register again, at once."""
        HEARTBEATS.inc(outcome)
        self._registration = None
        return 0.0

    async def _place_is_free(self) -> bool:
        return all(each.agent != self._agent for each in await self._registry.list_agents())

    async def _pause(self, pause_s: float) -> None:
        """Until the next beat is due, or something has changed (once registered and well)."""
        if self._registration is not None and pause_s == self._settings.heartbeat_s:
            await first(self._changed.wait(), self._clock.sleep(pause_s))
        else:
            await self._clock.sleep(pause_s)

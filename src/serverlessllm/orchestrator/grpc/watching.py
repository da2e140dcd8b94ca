"""The status of a model as it changes. Whoever watches wakes no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel, JobStage, ModelOnAgent
from serverlessllm.core.ids import ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.loads import ingest_event
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView, is_ready

COLD = "cold"
DELETED = "deleted"
INGESTING = "ingesting"
READY = "ready"
_ON_THE_WAY = (
    InstanceState.STARTING,
    InstanceState.LOADING,
    InstanceState.QUEUED,
    InstanceState.DRAINING,
)
"""What is told of a model without a ready instance: the first of these that an agent reports."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model now."""

    model: ModelId
    state: str
    stage: str = ""
    bytes_done: int = 0
    bytes_total: int | None = None
    eta_s: float | None = None
    agents_ready: int = 0
    cache_level: str = ""
    """The nearest tier that holds its bytes; empty: nobody has them yet."""


class Watching:
    """Looks at the view and at the waiting room, when one of them says that something is new."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        view: ClusterView,
        room: WaitingRoom,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._view = view
        self._room = room
        self._clock = clock

    async def changes(self, model: ModelId) -> AsyncIterator[Status]:
        """The status now and whenever it is another one, until the model is deleted. What changes
        faster than `grpc_watch_interval_s` is told of in its latest state."""
        last: Status | None = None
        while True:
            version, (_, progressed) = self._view.version, self._room.under_way(model)
            status = self.status(model)
            if status != last:
                last = status
                yield status
                if status.state == DELETED:
                    return
                await self._clock.sleep(self._settings.grpc_watch_interval_s)
            else:
                await self._news(version, progressed)

    async def _news(self, version: int, progressed: asyncio.Future[None]) -> None:
        changed = asyncio.ensure_future(
            self._view.changed(version, self._clock, self._settings.list_interval_s)
        )
        try:
            await asyncio.wait((changed, progressed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    def status(self, model: ModelId) -> Status:
        """What is known of a model."""
        record = self._view.models.get(model)
        on_agents = [
            on for seen in self._view.agents.values() if (on := seen.models.get(model)) is not None
        ]
        if record is None:
            return Status(model=model, state=DELETED)
        known = Status(
            model=model,
            state=READY,
            agents_ready=sum(is_ready(on) for on in on_agents),
            cache_level=_nearest(on_agents, stored=record.checkpoint is not None),
        )
        return known if known.agents_ready else self._not_ready(known, on_agents)

    def _not_ready(self, known: Status, on_agents: list[ModelOnAgent]) -> Status:
        event, _ = self._room.under_way(known.model)
        job = self._view.jobs.get(known.model)
        ingesting = job is not None and job.stage not in {JobStage.DONE, JobStage.FAILED}
        if job is not None and ingesting:
            event = ingest_event(job)
        if event is None or event.state in {"ready", "failed"}:
            states = {on.state for on in on_agents}
            # One that is ready here has bytes that still move.
            moving = {InstanceState.LOADING} if InstanceState.READY in states else states
            state = next((str(state) for state in _ON_THE_WAY if state in moving), COLD)
            return msgspec.structs.replace(known, state=state)
        return msgspec.structs.replace(
            known,
            state=INGESTING if ingesting else event.state,
            stage=event.stage,
            bytes_done=event.bytes_done,
            bytes_total=event.bytes_total,
            eta_s=event.eta_s,
        )


def _nearest(on_agents: list[ModelOnAgent], *, stored: bool) -> str:
    level = min((on.cache_level for on in on_agents), default=CacheLevel.STORE)
    return level.tier if stored or level is not CacheLevel.STORE else ""

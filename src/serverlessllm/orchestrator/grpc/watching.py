"""The status of a model as it changes. Whoever watches wakes no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import ModelId
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.status import DELETED, Status, status_of
from serverlessllm.orchestrator.view import ClusterView


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
        return status_of(model, self._view, self._room)

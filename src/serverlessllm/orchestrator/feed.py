"""The one task that writes the view: list, then watch, then list again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import MetadataUnavailable, SLLMError
from serverlessllm.metadata.base import Revision
from serverlessllm.metadata.registry import (
    AgentChanged,
    AgentLeft,
    ApiKeyChanged,
    ApiKeyGone,
    JobChanged,
    ModelChanged,
    ModelDeleted,
    Registry,
    RegistryChange,
    Resync,
    Snapshot,
)
from serverlessllm.metadata.registry.keys import API_KEYS
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.waits import settled
from serverlessllm.telemetry.logs import log

_log = log("orchestrator")
_RECONNECT_S_MIN = 0.1


class Feed:
    """Keeps `view` near the metadata store; while that is away the view stays as it is."""

    def __init__(
        self, view: ClusterView, registry: Registry, settings: OrchestratorSettings, clock: Clock
    ) -> None:
        self._view = view
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._revision = 0
        self.available = False
        """Whether the metadata store answered the last time it was asked."""
        self._listed = asyncio.Event()

    async def first_list(self) -> None:
        """Return when the view has been filled once, or has been empty for long enough."""
        listed = asyncio.ensure_future(self._listed.wait())
        try:
            await settled(self._clock, listed, self._settings.list_timeout_s)
        finally:
            listed.cancel()

    async def run(self) -> None:
        """For as long as the orchestrator lives; ends by cancellation only."""
        pause_s = _RECONNECT_S_MIN
        while True:
            try:
                snapshot = await self._registry.snapshot()
                self._apply_snapshot(snapshot)
                pause_s = _RECONNECT_S_MIN
                await self._follow(snapshot.revision)
            except SLLMError as error:
                if self.available or not isinstance(error, MetadataUnavailable):
                    _log.warning("metadata is away, serving what is known", code=error.code)
                self.available = False
                # Full jitter: a fleet of orchestrators must not come back at once.
                await self._clock.sleep(random.uniform(0, pause_s))  # noqa: S311 - not a secret
                pause_s = min(pause_s * 2, self._settings.reconnect_s_max)

    async def _follow(self, revision: Revision) -> None:
        """Apply changes until it is time for the next list, or changes were missed."""
        list_at_s = self._clock.now_s() + self._settings.list_interval_s
        async with aclosing(self._registry.watch(revision)) as changes:
            while True:
                change = await self._next(changes, list_at_s - self._clock.now_s())
                if change is None or isinstance(change, Resync):
                    return
                self._apply(change)

    async def _next(
        self, changes: AsyncIterator[RegistryChange], timeout_s: float
    ) -> RegistryChange | None:
        """The next change, or None when it is time to list again (or the watch has ended)."""
        coming = asyncio.ensure_future(_anext(changes))
        try:
            if await settled(self._clock, coming, timeout_s):
                return coming.result()
            return None
        finally:
            if not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError):
                    await coming

    def _apply(self, change: RegistryChange) -> None:
        view = self._view
        self._revision = max(self._revision, change.revision)
        match change:
            case ModelChanged(model=stored):
                view.put_model(stored.record)
            case ModelDeleted(model=model):
                view.drop_model(model)
            case AgentChanged(agent=record, revision=revision):
                view.put_agent(record, revision, self._clock.now_s())
            case AgentLeft(agent=agent):
                view.drop_agent(agent)
            case JobChanged(model=model, job=None):
                view.drop_job(model)
            case JobChanged(job=job) if job is not None:
                view.put_job(job)
            case ApiKeyChanged(api_key=key):
                view.put_api_key(key)
            case ApiKeyGone(id=key_id):
                view.drop_api_key(key_id)

    def _apply_snapshot(self, snapshot: Snapshot) -> None:
        now_s = self._clock.now_s()
        for stored in snapshot.models:
            self._view.put_model(stored.record)
        for agent in snapshot.agents:
            self._view.list_agent(agent, snapshot.revision, now_s)
        for job in snapshot.jobs:
            self._view.put_job(job)
        for key in snapshot.api_keys:
            self._view.put_api_key(key)
        if any(entry.startswith(API_KEYS) for entry in snapshot.unreadable):
            self._view.ask_for_keys()
        # A store that went back, or has records we cannot read, proves nobody's absence.
        if snapshot.revision >= self._revision and not snapshot.unreadable:
            self._view.keep_only(
                models=[stored.record.spec.model for stored in snapshot.models],
                agents=[agent.agent for agent in snapshot.agents],
                jobs=[job.model for job in snapshot.jobs],
                api_keys=[key.id for key in snapshot.api_keys],
            )
        self._revision = snapshot.revision
        self.available = True
        self._view.is_listed()
        self._listed.set()


async def _anext(changes: AsyncIterator[RegistryChange]) -> RegistryChange | None:
    return await anext(changes, None)

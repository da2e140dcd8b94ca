"""What an operator can have done: models created, pulled, loaded, unloaded, deleted; keys made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec

from serverlessllm.core.agentapi import LoadEvent, LoadRequest, UnloadRequest
from serverlessllm.core.apikeys import ApiKey, NewApiKey
from serverlessllm.core.cluster import CacheLevel, JobRecord, JobStage
from serverlessllm.core.errors import Conflict, ModelNotFound, SLLMError
from serverlessllm.core.failures import record_of
from serverlessllm.core.ids import AgentId, Epoch, ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.metadata.base import ABSENT
from serverlessllm.metadata.registry import Registry
from serverlessllm.orchestrator.agents import AgentClient
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.loads import AgentLost, on_demand_spec, unknown_model
from serverlessllm.orchestrator.seams import DeletesCheckpoints, Ingests
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import AgentSeen, ClusterView
from serverlessllm.telemetry.logs import log

_log = log("orchestrator")


class Operations:
    """Changes go to the registry and to agents; the view hears of them and is told at once."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        view: ClusterView,
        room: WaitingRoom,
        agents: AgentClient,
        registry: Registry,
        ingestion: Ingests,
        store: DeletesCheckpoints,
    ) -> None:
        self._settings = settings
        self._view = view
        self._room = room
        self._agents = agents
        self._registry = registry
        self._ingestion = ingestion
        self._store = store

    async def create(self, spec: ModelSpec) -> ModelRecord:
        """Register a model.

        Raises:
            Conflict: a name of it is taken.
            MetadataUnavailable: nothing was changed.
        """
        stored = await self._registry.put_model(ModelRecord(spec=spec), expect_revision=ABSENT)
        self._room.forget(spec.model)
        self._view.put_model(stored.record)
        return stored.record

    def record(self, model: ModelId) -> ModelRecord:
        """A registered model's record; raises `ModelNotFound`."""
        found = self._view.models.get(model)
        if found is None:
            raise ModelNotFound(unknown_model(model, self._settings, self._view), param="model")
        return found

    async def load(self, model: ModelId, keep_alive_s: float | None) -> AsyncIterator[LoadEvent]:
        """Make a model ready; the load goes on whoever listens. Ends with `ready` or `failed`.

        Raises (before the first event):
            SLLMError: it cannot even begin.
        """
        if model not in self._view.models:
            on_demand_spec(model, self._settings, self._view)
        with self._room.enter(model) as waiter:
            waiter.promise()
            yield waiter.progress
            while (loaded := await waiter.ready(0)) is None:
                event = await waiter.progressed(self._settings.comment_interval_s)
                if event.state not in {"ready", "failed"}:
                    yield event
        record = self._view.models.get(model)
        seen = self._view.agents.get(loaded.agent)
        if keep_alive_s is not None and record is not None and seen is not None:
            request = LoadRequest(
                spec=record.spec, checkpoint=record.checkpoint, keep_alive_s=keep_alive_s
            )
            await self._agents.load(seen.address, request, lambda _: None)
        yield LoadEvent(state="ready", hops=loaded.hops)

    async def pull(
        self, model: ModelId, source: str | None, backend: str | None
    ) -> AsyncIterator[JobRecord]:
        """Register a model if it is new, and have its checkpoint in the store. A new name that
        can have none is forgotten again.

        Raises:
            Conflict: it is registered with another source.
            SLLMError: why it could not be ingested.
        """
        record = self._view.models.get(model)
        new = record is None
        if record is None:
            spec = ModelSpec(model=model, source=source or f"hf://{model}", backend=backend)
            record = await self.create(spec)
        elif source is not None and source != record.spec.source:
            raise Conflict(f"{model} is registered with another source", param="source")
        self._room.forget(model)
        last = JobRecord(model=model, owner="", epoch=Epoch(0), stage=JobStage.RESOLVING)
        if record.spec.source is not None:
            try:
                async for last in self._ingest(model, record.spec):
                    yield last
            except SLLMError as error:
                if new and error.permanent:
                    with suppress(SLLMError):
                        await self.delete(model)
                raise
            record = self._view.models.get(model, record)
        size_bytes = record.checkpoint.size_bytes if record.checkpoint else last.bytes_done
        yield msgspec.structs.replace(
            last, stage=JobStage.DONE, bytes_done=size_bytes, bytes_total=size_bytes
        )

    async def _ingest(self, model: ModelId, spec: ModelSpec) -> AsyncIterator[JobRecord]:
        """The job's progress; leaving ends it unless somebody else wants it."""
        news: asyncio.Queue[JobRecord | None] = asyncio.Queue(maxsize=1)

        def progress(job: JobRecord) -> None:
            while not news.empty():  # only the latest counts
                news.get_nowait()
            news.put_nowait(job)

        async def run() -> ModelRecord:
            try:
                return await self._ingestion.ensure(model, spec, progress)
            finally:
                await news.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (job := await news.get()) is not None:
                if job.stage not in {JobStage.DONE, JobStage.FAILED}:
                    yield job
            self._view.put_model(await task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def unload(
        self, model: ModelId, level: CacheLevel, *, force: bool
    ) -> tuple[AgentId, ...]:
        """Stop its instances everywhere and keep its bytes at `level` at most.

        Raises:
            SLLMError: an agent refused; the others have done it.
        """
        self._room.release(model)
        holders = [
            seen
            for seen in self._view.agents.values()
            if (on := seen.models.get(model)) is not None
            and (on.cache_level < level or on.state is not None)
        ]
        request = UnloadRequest(model=model, cache_level=level, force=force)
        errors = await asyncio.gather(*(self._unload_on(seen, request) for seen in holders))
        for error in errors:
            if error is not None:
                raise error
        return tuple(seen.agent for seen in holders)

    async def _unload_on(self, seen: AgentSeen, request: UnloadRequest) -> SLLMError | None:
        try:
            await self._agents.unload(seen.address, request)
        except AgentLost:
            self._view.failed(seen.agent)  # with it went the instances
        except SLLMError as error:
            return error
        self._view.lost(seen.agent, request.model)
        return None

    async def delete(self, model: ModelId) -> int:
        """Forget a model and its bytes; bytes freed in the store.

        The registry first: from then on nobody loads it. Whatever fails afterwards leaves bytes
        that a new model of that name finds again, never a name without its bytes.

        Raises:
            ModelNotFound: there is none.
            MetadataUnavailable: nothing was changed.
            SLLMError: the name is gone, but some bytes are left.
        """
        stored = await self._registry.get_model(model)
        if stored is None:
            self.record(model)  # the view may know better for a moment
        await self._registry.delete_model(model)
        self._view.drop_model(model)
        self._room.stop(model)
        self._room.forget(model)
        refusal: SLLMError | None = None
        try:
            await self.unload(model, CacheLevel.STORE, force=True)
        except SLLMError as error:
            _log.warning("unload of a deleted model refused", model=model, code=error.code)
            refusal = error
        checkpoint = stored.record.checkpoint if stored is not None else None
        if checkpoint is None or self._shared(checkpoint.prefix):
            freed = 0
        else:
            await self._store.delete(checkpoint.prefix)
            freed = checkpoint.size_bytes
        if refusal is not None:
            raise refusal
        return freed

    async def create_key(self, wanted: NewApiKey) -> tuple[ApiKey, str]:
        """A new API key, in force here at once, and its text.

        Raises:
            InvalidRequest, Conflict: it cannot be.
            MetadataUnavailable: it was not made.
        """
        key, text = await self._registry.create_api_key(wanted)
        self._view.put_api_key(key)
        return key, text

    async def revoke_key(self, name: str) -> ApiKey:
        """End an API key, named by its id or name; here at once.

        Raises:
            RouteNotFound, Conflict: which key is meant?
            MetadataUnavailable: nothing was changed.
        """
        key = await self._registry.revoke_api_key(name)
        self._view.put_api_key(key)
        return key

    def _shared(self, prefix: str) -> bool:
        """Whether another model has the same checkpoint."""
        return any(
            record.checkpoint is not None and record.checkpoint.prefix == prefix
            for record in self._view.models.values()
        )


def failed_event(error: SLLMError) -> LoadEvent:
    """The last line of a load's stream that failed."""
    return LoadEvent(state="failed", error=record_of(error))

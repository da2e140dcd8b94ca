"""All parts of the registry in one, and what is true of them together."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.cluster import AgentRecord, JobRecord
from serverlessllm.core.ids import AgentId, KeyId, ModelId
from serverlessllm.metadata.base import Change, Entry, Metadata, Revision
from serverlessllm.metadata.registry.agents import Agents
from serverlessllm.metadata.registry.apikeys import ApiKeys
from serverlessllm.metadata.registry.changes import (
    AgentChanged,
    AgentLeft,
    ApiKeyChanged,
    ApiKeyGone,
    JobChanged,
    ModelChanged,
    ModelDeleted,
    RegistryChange,
    Resync,
    Snapshot,
    StoredModel,
)
from serverlessllm.metadata.registry.jobs import Jobs
from serverlessllm.metadata.registry.keys import AGENTS, API_KEYS, JOBS, MODELS
from serverlessllm.metadata.registry.models import readable_model
from serverlessllm.metadata.registry.records import readable
from serverlessllm.metadata.settings import MetadataSettings


class Registry(Jobs, Agents, ApiKeys):
    """The typed view of a metadata store. Every call may raise `MetadataUnavailable`."""

    def __init__(self, metadata: Metadata, settings: MetadataSettings | None = None) -> None:
        super().__init__(metadata, settings or MetadataSettings())

    async def snapshot(self) -> Snapshot:
        """All that is registered, at one revision."""
        listing = await self._metadata.list("")
        models: list[StoredModel] = []
        agents: list[AgentRecord] = []
        jobs: list[JobRecord] = []
        api_keys: list[ApiKey] = []
        unreadable: list[str] = []
        for entry in listing.entries:
            change = _changed(entry)
            if change is None:
                if entry.key.startswith((MODELS, AGENTS, JOBS, API_KEYS)):
                    unreadable.append(entry.key)
            elif isinstance(change, ModelChanged):
                models.append(change.model)
            elif isinstance(change, AgentChanged):
                agents.append(change.agent)
            elif isinstance(change, ApiKeyChanged):
                api_keys.append(change.api_key)
            elif change.job is not None:
                jobs.append(change.job)
        return Snapshot(
            models=tuple(models),
            agents=tuple(agents),
            jobs=tuple(jobs),
            api_keys=tuple(api_keys),
            revision=listing.revision,
            unreadable=tuple(unreadable),
        )

    async def watch(self, from_revision: Revision) -> AsyncGenerator[RegistryChange, None]:
        """Every change after `from_revision` (a snapshot's), in order, until it is closed.

        A record that this version cannot read is passed over: nothing is forgotten because of it.
        Close it with `contextlib.aclosing`.
        """
        async with aclosing(self._metadata.watch("", from_revision)) as changes:
            async for change in changes:
                typed = _typed(change)
                if typed is not None:
                    yield typed


def _typed(change: Change) -> RegistryChange | None:
    if change.key == "":
        return Resync(revision=change.revision)
    if change.value is None:
        return _deleted(change.key, change.revision)
    return _changed(Entry(key=change.key, value=change.value, revision=change.revision))


def _deleted(key: str, revision: Revision) -> RegistryChange | None:
    if key.startswith(MODELS):
        return ModelDeleted(model=ModelId(key.removeprefix(MODELS)), revision=revision)
    if key.startswith(AGENTS):
        return AgentLeft(agent=AgentId(key.removeprefix(AGENTS)), revision=revision)
    if key.startswith(JOBS):
        model = ModelId(key.removeprefix(JOBS))
        return JobChanged(model=model, job=None, revision=revision)
    if key.startswith(API_KEYS):
        return ApiKeyGone(id=KeyId(key.removeprefix(API_KEYS)), revision=revision)
    return None


def _changed(entry: Entry) -> ModelChanged | AgentChanged | JobChanged | ApiKeyChanged | None:
    """None: not a record of ours, or one that this version cannot read."""
    revision = entry.revision
    if entry.key.startswith(MODELS):
        model = readable_model(entry)
        return None if model is None else ModelChanged(model=model, revision=revision)
    if entry.key.startswith(AGENTS):
        agent = readable(entry, AgentRecord)
        return None if agent is None else AgentChanged(agent=agent, revision=revision)
    if entry.key.startswith(JOBS):
        job = readable(entry, JobRecord)
        return None if job is None else JobChanged(model=job.model, job=job, revision=revision)
    if entry.key.startswith(API_KEYS):
        found = readable(entry, ApiKey)
        return None if found is None else ApiKeyChanged(api_key=found, revision=revision)
    return None

"""What an orchestrator knows of the cluster: plain dicts, read by everybody, written by one task.

The registry's watch feeds it, a list corrects it, and what this process's own requests meet is
noted at once (`failed`, `became_ready`, `lost`). When the metadata store is away nothing is
forgotten: agents only grow old, and when all are old, age says nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import AgentRecord, CacheLevel, JobRecord, ModelOnAgent
from serverlessllm.core.ids import Address, AgentId, KeyId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import ModelRecord
from serverlessllm.orchestrator.waits import settled


class AgentSeen:
    """One agent: its last record, and what is known of its health here."""

    __slots__ = ("address", "agent", "failed", "models", "record", "reported", "revision", "seen_s")

    def __init__(self, record: AgentRecord, revision: int, seen_s: float) -> None:
        self.agent: AgentId = record.agent
        self.address: Address = record.address
        self.record = record
        """With what our own requests noted since."""
        self.reported = record
        self.revision = revision
        self.seen_s = seen_s
        """When the record arrived, on this process's monotonic clock."""
        self.failed = False
        """A request or load of ours could not reach it since its last heartbeat."""
        self.models: dict[ModelId, ModelOnAgent] = {on.model: on for on in record.models}

    def suspect(self, now_s: float, silent_s: float) -> bool:
        """Whether another agent should be preferred."""
        return self.failed or now_s - self.seen_s > silent_s


class ObservesView(Protocol):
    """Told of each change at once, so that others may keep a copy: the view itself says what is
    so now (nothing, when it is gone). Jobs are not told."""

    def model_changed(self, model: ModelId) -> None: ...

    def agent_changed(self, agent: AgentId) -> None:
        """A heartbeat came, requests noted something, or it is gone."""
        ...

    def key_changed(self, key: KeyId) -> None: ...

    def keys_are_known(self) -> None:
        """`listed` or `keys_asked` has become true."""
        ...


class ClusterView:
    """Models by every name, agents, jobs, API keys. `version` grows with each change."""

    def __init__(self) -> None:
        self.version = 0
        self.models: dict[ModelId, ModelRecord] = {}
        self.names: dict[str, ModelId] = {}
        self.agents: dict[AgentId, AgentSeen] = {}
        self.jobs: dict[ModelId, JobRecord] = {}
        self.api_keys: dict[str, ApiKey] = {}
        """By the SHA-256 of their text, the revoked ones among them."""
        self.keys_version = 0
        """Grows with each change of the keys."""
        self.keys_asked = False
        """Whether there ever was a key: from then on whoever has none is refused."""
        self.listed = False
        """Whether the metadata store has ever been read: before, nobody knows of keys."""
        self.observer: ObservesView | None = None
        self._change: asyncio.Future[None] | None = None

    async def changed(self, since_version: int, clock: Clock, timeout_s: float) -> None:
        """Return as soon as the version is not `since_version`, or after `timeout_s`."""
        if self.version == since_version:
            await settled(clock, self._next_change(), timeout_s)

    def _next_change(self) -> asyncio.Future[None]:
        if self._change is None or self._change.done():
            self._change = asyncio.get_running_loop().create_future()
        return self._change

    # Written by the feed.

    def put_model(self, record: ModelRecord) -> None:
        known = self.models.get(record.spec.model)
        if known == record:
            return
        self.models[record.spec.model] = record
        if known is None:
            self._learn_names(record)
        elif known.spec.aliases != record.spec.aliases:
            self.names.clear()
            for each in self.models.values():
                self._learn_names(each)
        self._touch_model(record.spec.model)

    def drop_model(self, model: ModelId) -> None:
        if self.models.pop(model, None) is not None:
            self._forget_names(model)
            # A name that the lost model hid may belong to another one.
            for record in self.models.values():
                self._learn_names(record)
            self._touch_model(model)

    def put_agent(self, record: AgentRecord, revision: int, now_s: float) -> None:
        """A heartbeat has come."""
        known = self.agents.get(record.agent)
        if known is None or record.epoch >= known.record.epoch:
            self.agents[record.agent] = AgentSeen(record, revision, now_s)
            self._touch_agent(record.agent)

    def list_agent(self, record: AgentRecord, revision: int, now_s: float) -> None:
        """A list has it: no sign of life if it is what the last heartbeat said."""
        known = self.agents.get(record.agent)
        if known is None or known.reported != record:
            self.put_agent(record, revision, now_s)

    def mirror_agent(
        self, record: AgentRecord, revision: int, seen_s: float, *, failed: bool
    ) -> None:
        """As another process of this machine sees it, with what its requests noted."""
        seen = self.agents.get(record.agent)
        news = (record.epoch, revision, seen_s)
        if seen is None or (seen.record.epoch, seen.revision, seen.seen_s) != news:
            seen = self.agents[record.agent] = AgentSeen(record, revision, seen_s)
        seen.record = record
        seen.models = {on.model: on for on in record.models}
        seen.failed = failed
        self._touch_agent(record.agent)

    def drop_agent(self, agent: AgentId) -> None:
        if self.agents.pop(agent, None) is not None:
            self._touch_agent(agent)

    def put_job(self, record: JobRecord) -> None:
        if self.jobs.get(record.model) == record:
            return
        self.jobs[record.model] = record
        self._touch()

    def drop_job(self, model: ModelId) -> None:
        if self.jobs.pop(model, None) is not None:
            self._touch()

    def put_api_key(self, key: ApiKey) -> None:
        self.keys_asked = True
        if self.api_keys.get(key.sha256) == key:
            return
        self.api_keys[key.sha256] = key
        self._touch_key(key.id)

    def drop_api_key(self, key: KeyId) -> None:
        for digest in [digest for digest, known in self.api_keys.items() if known.id == key]:
            del self.api_keys[digest]
            self._touch_key(key)

    def ask_for_keys(self) -> None:
        """There are keys, though none may be readable here."""
        if not self.keys_asked:
            self.keys_asked = True
            self._touch_keys_known()

    def is_listed(self) -> None:
        """The metadata store has been read."""
        if not self.listed:
            self.listed = True
            self._touch_keys_known()

    def keep_only(
        self,
        *,
        models: Iterable[ModelId],
        agents: Iterable[AgentId],
        jobs: Iterable[ModelId],
        api_keys: Iterable[KeyId] = (),
    ) -> None:
        """Forget what a complete list no longer has."""
        for model in self.models.keys() - set(models):
            self.drop_model(model)
        for agent in self.agents.keys() - set(agents):
            self.drop_agent(agent)
        for job in self.jobs.keys() - set(jobs):
            self.drop_job(job)
        for key in {key.id for key in self.api_keys.values()} - set(api_keys):
            self.drop_api_key(key)

    # Noted by requests; the next heartbeat has the last word.

    def failed(self, agent: AgentId) -> None:
        """It did not answer a request of ours."""
        seen = self.agents.get(agent)
        if seen is not None and not seen.failed:
            seen.failed = True
            self._touch_agent(agent)

    def became_ready(self, agent: AgentId, model: ModelId) -> None:
        """Its load ended well, to the last byte: the heartbeat that says so is still under way."""
        self._note(agent, model, CacheLevel.DEVICE, InstanceState.READY)

    def lost(self, agent: AgentId, model: ModelId) -> None:
        """It answered that it has no ready instance."""
        self._note(agent, model, CacheLevel.DRAM, None)

    def _note(
        self, agent: AgentId, model: ModelId, level: CacheLevel, state: InstanceState | None
    ) -> None:
        seen = self.agents.get(agent)
        if seen is None:
            return
        known = seen.models.get(model, ModelOnAgent(model=model))
        if known.cache_level is level and known.state is state and not known.arriving:
            return
        seen.models[model] = msgspec.structs.replace(
            known, cache_level=level, state=state, arriving=False
        )
        models = tuple(seen.models.values())
        seen.record = msgspec.structs.replace(seen.record, models=models)
        self._touch_agent(agent)

    def _learn_names(self, record: ModelRecord) -> None:
        """A canonical name beats an alias; the first alias beats a later one."""
        for alias in record.spec.aliases:
            self.names.setdefault(alias, record.spec.model)
        self.names[record.spec.model] = record.spec.model

    def _forget_names(self, model: ModelId) -> None:
        for name in [name for name, owner in self.names.items() if owner == model]:
            del self.names[name]

    def _touch_model(self, model: ModelId) -> None:
        self._touch()
        if self.observer is not None:
            self.observer.model_changed(model)

    def _touch_agent(self, agent: AgentId) -> None:
        self._touch()
        if self.observer is not None:
            self.observer.agent_changed(agent)

    def _touch_key(self, key: KeyId) -> None:
        self.keys_version += 1
        self._touch()
        if self.observer is not None:
            self.observer.key_changed(key)

    def _touch_keys_known(self) -> None:
        self.keys_version += 1
        self._touch()
        if self.observer is not None:
            self.observer.keys_are_known()

    def _touch(self) -> None:
        self.version += 1
        if self._change is not None and not self._change.done():
            self._change.set_result(None)


def is_ready(on: ModelOnAgent) -> bool:
    """Whether requests can be sent there now and wait for no bytes."""
    return on.state is InstanceState.READY and not on.arriving


def ready_agents(view: ClusterView, model: ModelId) -> frozenset[AgentId]:
    """The agents with a ready instance of `model`."""
    return frozenset(
        seen.agent
        for seen in view.agents.values()
        if (on := seen.models.get(model)) is not None and is_ready(on)
    )


def names_like(names: Mapping[str, ModelId], wanted: str, limit: int) -> list[str]:
    """Registered names for a client that asked for `wanted`: those that share most with it."""
    tail = wanted.rpartition("/")[2].lower()
    near = sorted(names, key=lambda name: (-_shared(name.rpartition("/")[2].lower(), tail), name))
    return near[:limit]


def _shared(one: str, other: str) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count

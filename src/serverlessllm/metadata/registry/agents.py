"""Agents: registration with a fencing epoch, heartbeats, placements."""

from __future__ import annotations

import msgspec

from serverlessllm.core.cluster import AgentRecord, Placement
from serverlessllm.core.errors import Fenced, Unavailable
from serverlessllm.core.ids import AgentId, Epoch, ModelId
from serverlessllm.metadata.base import ABSENT, LeaseLost, Revision, RevisionMismatch
from serverlessllm.metadata.registry.changes import Registration
from serverlessllm.metadata.registry.keys import AGENTS, agent_epoch_key, agent_key
from serverlessllm.metadata.registry.part import Part
from serverlessllm.metadata.registry.records import encode, readable


class Agents(Part):
    """The part of the registry that keeps `agents/` and their epochs."""

    async def register_agent(self, agent: AgentId, ttl_s: float) -> Registration:
        """Take the agent's id, fencing whoever had it; its record appears with `write_agent`."""
        lease = await self._metadata.lease(ttl_s)
        epoch = Epoch(await self._metadata.put(agent_epoch_key(agent), lease.encode()))
        # The one that was fenced must not be seen until its own lease runs out. The epoch came
        # first: a record written after this delete is retracted by its writer (`write_agent`).
        await self._metadata.delete(agent_key(agent))
        return Registration(agent=agent, epoch=epoch, lease=lease, ttl_s=ttl_s, written=ABSENT)

    async def write_agent(self, registration: Registration, record: AgentRecord) -> Revision:
        """A heartbeat: start the lease's time again and write the record, with our epoch.

        Raises:
            Fenced: a newer registration has the id; this agent must stop.
            LeaseLost: it was silent for longer than its lease; it must register again.
        """
        value = encode(msgspec.structs.replace(record, epoch=registration.epoch))
        key = agent_key(registration.agent)
        for _ in range(self._settings.conflict_retries_max):
            first = registration.written == ABSENT
            try:
                await self._metadata.keep_alive(registration.lease)
                registration.written = await self._metadata.put(
                    key, value, expect_revision=registration.written, lease=registration.lease
                )
            except LeaseLost:
                await self._check_epoch(registration)
                raise
            except RevisionMismatch:
                await self._check_epoch(registration)
                # What is there is an older registration's, or ours with a lost answer.
                entry = await self._metadata.get(key)
                registration.written = ABSENT if entry is None else entry.revision
                continue
            if first:
                await self._check_epoch(registration)
            return registration.written
        raise Unavailable(f"agent {registration.agent} could not write its record; try again")

    async def _check_epoch(self, registration: Registration) -> None:
        """Raise Fenced, and take our record away, when a newer registration has the id."""
        newest = await self._metadata.get(agent_epoch_key(registration.agent))
        if newest is not None and newest.revision > registration.epoch:
            await self.deregister(registration)
            raise Fenced(f"agent {registration.agent} has a newer registration: this one stops")

    async def deregister(self, registration: Registration) -> None:
        """The agent leaves: its record goes with its lease. Harmless when it is fenced."""
        await self._metadata.revoke(registration.lease)

    async def list_agents(self) -> tuple[AgentRecord, ...]:
        """All agents whose lease is alive, by id; unreadable records are left out."""
        listing = await self._metadata.list(AGENTS)
        return tuple(r for e in listing.entries if (r := readable(e, AgentRecord)) is not None)

    async def placements(self, model: ModelId) -> tuple[Placement, ...]:
        """What each agent knows about a model."""
        return tuple(
            Placement(
                agent=agent.agent,
                cache_level=known.cache_level,
                kv_hit_rate=known.kv_hit_rate,
                queue_len=known.queue_len,
            )
            for agent in await self.list_agents()
            for known in agent.models
            if known.model == model
        )

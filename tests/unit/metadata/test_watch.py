"""Typed changes, snapshots, and how they fit together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from serverlessllm.core.cluster import AgentRecord, JobRecord, JobStage, TierUsage
from serverlessllm.core.errors import MetadataUnavailable
from serverlessllm.core.ids import Address, AgentId, Epoch, ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.metadata.base import ABSENT, Revision
from serverlessllm.metadata.registry import (
    AgentChanged,
    AgentLeft,
    JobChanged,
    JobClaim,
    ModelChanged,
    ModelDeleted,
    Registry,
    RegistryChange,
    Resync,
)
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.metadata import FakeMetadata

M = ModelId("m")
USAGE = TierUsage(budget_bytes=100, used_bytes=0)
AGENT = AgentRecord(
    agent=AgentId("a"), epoch=Epoch(0), address=Address("unix:/a"), dram=USAGE, nvme=USAGE
)


async def take(watch: AsyncIterator[RegistryChange], count: int) -> list[RegistryChange]:
    async with asyncio.timeout(60):
        return [await anext(watch) for _ in range(count)]


async def test_a_watch_goes_on_where_the_snapshot_ends(
    registry: Registry, clock: VirtualClock
) -> None:
    stored = await registry.put_model(
        ModelRecord(spec=ModelSpec(model=ModelId("old"), aliases=("o",)))
    )
    snapshot = await registry.snapshot()
    assert (snapshot.models, snapshot.agents, snapshot.jobs) == ((stored,), (), ())
    async with aclosing(registry.watch(snapshot.revision)) as watch:
        new = await registry.put_model(ModelRecord(spec=ModelSpec(model=M, aliases=("x",))))
        registration = await registry.register_agent(AgentId("a"), 5)
        await registry.write_agent(registration, AGENT)
        claimed = await registry.claim_job(M, "one", 60)
        assert isinstance(claimed, JobClaim)
        await registry.delete_model(M)
        changed, agent, job, deleted = await take(watch, 4)
        assert changed == ModelChanged(model=new, revision=new.revision)
        assert isinstance(agent, AgentChanged)
        assert agent.agent.epoch == registration.epoch
        assert isinstance(job, JobChanged)
        assert job.job is not None
        assert job.job.stage is JobStage.RESOLVING
        assert isinstance(deleted, ModelDeleted)
        assert deleted.model == M

        waiting = asyncio.ensure_future(anext(watch))
        await clock.advance(6)
        gone = await waiting
        assert isinstance(gone, AgentLeft)
        assert gone.agent == "a"
        await registry.release_job(claimed)
        (lost,) = await take(watch, 1)
        revision = Revision(gone.revision + 1)
        assert lost == JobChanged(model=M, job=None, revision=revision)

    after = await registry.snapshot()
    assert (after.models, after.agents, after.jobs) == ((stored,), (), ())
    assert after.revision == lost.revision


async def test_a_snapshot_holds_everything(registry: Registry) -> None:
    stored = await registry.put_model(ModelRecord(spec=ModelSpec(model=M)))
    registration = await registry.register_agent(AgentId("a"), 5)
    await registry.write_agent(registration, AGENT)
    await registry.claim_job(M, "one", 60)
    snapshot = await registry.snapshot()
    assert snapshot.models == (stored,)
    assert [a.agent for a in snapshot.agents] == ["a"]
    assert [(j.model, j.owner) for j in snapshot.jobs] == [(M, "one")]
    assert isinstance(snapshot.jobs[0], JobRecord)
    assert snapshot.unreadable == ()


async def test_missed_changes_ask_for_a_new_snapshot(clock: VirtualClock) -> None:
    store = FakeMetadata(clock, changes_kept_max=4)
    registry = Registry(store)
    for i in range(6):
        await registry.put_model(ModelRecord(spec=ModelSpec(model=ModelId(f"m{i}"))))
    async with aclosing(registry.watch(ABSENT)) as watch:
        (first,) = await take(watch, 1)
        assert first == Resync(revision=(await registry.snapshot()).revision)
        await registry.delete_model(ModelId("m0"))
        assert isinstance((await take(watch, 1))[0], ModelDeleted)


async def test_an_unreadable_change_is_passed_over(registry: Registry, store: FakeMetadata) -> None:
    async with aclosing(registry.watch(ABSENT)) as watch:
        await store.put("models/bad", b"nonsense")
        await store.put("agents/bad", b"nonsense")
        await store.put("jobs/ingest/bad", b"nonsense")
        good = await registry.put_model(ModelRecord(spec=ModelSpec(model=M)))
        assert await take(watch, 1) == [ModelChanged(model=good, revision=good.revision)]


async def test_a_watch_of_a_store_that_fails_says_so(
    registry: Registry, store: FakeMetadata
) -> None:
    store.failing = True
    with pytest.raises(MetadataUnavailable):
        await anext(registry.watch(ABSENT))

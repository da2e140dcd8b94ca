"""Agents: at most one live epoch an id, whatever the order of who writes when."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from serverlessllm.core.cluster import AgentRecord, CacheLevel, ModelOnAgent, Placement, TierUsage
from serverlessllm.core.errors import Fenced, MetadataUnavailable
from serverlessllm.core.ids import Address, AgentId, Epoch, ModelId
from serverlessllm.metadata.base import LeaseLost, Revision
from serverlessllm.metadata.registry import Registry
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.metadata import FakeMetadata

A = AgentId("a")


def record(name: str = "a", *models: ModelOnAgent, address: str = "unix:/a") -> AgentRecord:
    usage = TierUsage(budget_bytes=100, used_bytes=0)
    return AgentRecord(
        agent=AgentId(name),
        epoch=Epoch(0),
        address=Address(address),
        dram=usage,
        nvme=usage,
        models=models,
    )


async def test_a_heartbeat_writes_the_record_under_its_epoch(registry: Registry) -> None:
    registration = await registry.register_agent(A, 5)
    assert await registry.list_agents() == ()
    first = await registry.write_agent(registration, record())
    second = await registry.write_agent(registration, record())
    assert second > first
    (found,) = await registry.list_agents()
    assert found == msgspec.structs.replace(record(), epoch=registration.epoch)


async def test_a_silent_agent_is_gone_and_must_register_again(
    registry: Registry, clock: VirtualClock
) -> None:
    registration = await registry.register_agent(A, 5)
    await registry.write_agent(registration, record())
    await clock.advance(4)
    await registry.write_agent(registration, record())
    await clock.advance(4)
    assert len(await registry.list_agents()) == 1
    await clock.advance(2)
    assert await registry.list_agents() == ()
    with pytest.raises(LeaseLost):
        await registry.write_agent(registration, record())
    again = await registry.register_agent(A, 5)
    assert again.epoch > registration.epoch
    await registry.write_agent(again, record())


async def test_the_older_of_two_with_one_id_is_fenced(registry: Registry) -> None:
    old = await registry.register_agent(A, 5)
    await registry.write_agent(old, record(address="unix:/old"))
    new = await registry.register_agent(A, 5)
    assert new.epoch > old.epoch
    assert await registry.list_agents() == ()
    with pytest.raises(Fenced):
        await registry.write_agent(old, record(address="unix:/old"))
    await registry.write_agent(new, record(address="unix:/new"))
    with pytest.raises(Fenced):
        await registry.write_agent(old, record(address="unix:/old"))
    await registry.deregister(old)
    (found,) = await registry.list_agents()
    assert (found.address, found.epoch) == ("unix:/new", new.epoch)


async def test_the_older_is_fenced_also_in_its_first_heartbeat(registry: Registry) -> None:
    old = await registry.register_agent(A, 5)
    new = await registry.register_agent(A, 5)
    with pytest.raises(Fenced):
        await registry.write_agent(old, record(address="unix:/old"))
    assert await registry.list_agents() == ()
    await registry.write_agent(new, record())


async def test_a_fenced_agent_whose_lease_ran_out_hears_that_it_is_fenced(
    registry: Registry, clock: VirtualClock
) -> None:
    old = await registry.register_agent(A, 5)
    await clock.advance(6)
    await registry.register_agent(A, 5)
    with pytest.raises(Fenced):
        await registry.write_agent(old, record())


async def test_of_eight_at_once_the_highest_epoch_stays(store: FakeMetadata) -> None:
    registries = [Registry(store.another()) for _ in range(8)]

    async def live(registry: Registry) -> Epoch:
        registration = await registry.register_agent(A, 5)
        for _ in range(3):
            await registry.write_agent(registration, record())
        return registration.epoch

    results = await asyncio.gather(*map(live, registries), return_exceptions=True)
    alive = [r for r in results if isinstance(r, int)]
    assert all(isinstance(r, Fenced) for r in results if not isinstance(r, int))
    (found,) = await registries[0].list_agents()
    assert found.epoch == max(alive)


async def test_a_lost_answer_does_not_fence_its_writer(
    registry: Registry, store: FakeMetadata
) -> None:
    registration = await registry.register_agent(A, 5)
    await registry.write_agent(registration, record())
    # The put took effect, its answer did not arrive.
    registration.written = Revision(registration.written - 1)
    await registry.write_agent(registration, record())
    assert len(await registry.list_agents()) == 1


async def test_deregistering_takes_the_record_away(registry: Registry) -> None:
    registration = await registry.register_agent(A, 5)
    await registry.write_agent(registration, record())
    await registry.deregister(registration)
    await registry.deregister(registration)
    assert await registry.list_agents() == ()


async def test_placements_are_what_each_agent_knows(registry: Registry) -> None:
    m, other = ModelId("m"), ModelId("other")
    for name, models in {
        "a": (ModelOnAgent(model=m, cache_level=CacheLevel.DEVICE, kv_hit_rate=0.5, queue_len=3),),
        "b": (ModelOnAgent(model=other), ModelOnAgent(model=m, cache_level=CacheLevel.NVME)),
        "c": (),
    }.items():
        registration = await registry.register_agent(AgentId(name), 5)
        await registry.write_agent(registration, record(name, *models))
    assert await registry.placements(m) == (
        Placement(agent=A, cache_level=CacheLevel.DEVICE, kv_hit_rate=0.5, queue_len=3),
        Placement(agent=AgentId("b"), cache_level=CacheLevel.NVME, kv_hit_rate=0.0, queue_len=0),
    )


async def test_an_unreachable_store_says_so(registry: Registry, store: FakeMetadata) -> None:
    registration = await registry.register_agent(A, 5)
    store.failing = True
    with pytest.raises(MetadataUnavailable):
        await registry.write_agent(registration, record())
    store.failing = False
    await registry.write_agent(registration, record())

"""Ingest jobs: one owner, takeover, and exactly one who publishes."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from serverlessllm.core.cluster import JobError, JobRecord, JobStage
from serverlessllm.core.errors import Fenced, ModelNotFound
from serverlessllm.core.ids import CheckpointId, Epoch, ModelId
from serverlessllm.core.models import CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.metadata.base import Revision
from serverlessllm.metadata.registry import JobClaim, Registry
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.metadata import FakeMetadata

M = ModelId("org/m")


def published(checkpoint: str, **spec: object) -> ModelRecord:
    return ModelRecord(
        spec=msgspec.convert({"model": M, **spec}, ModelSpec),
        checkpoint=CheckpointRef(id=CheckpointId(checkpoint), prefix="org/m/1", size_bytes=10),
    )


def progress(stage: JobStage, bytes_done: int = 0) -> JobRecord:
    return JobRecord(model=M, owner="", epoch=Epoch(0), stage=stage, bytes_done=bytes_done)


async def claim(registry: Registry, owner: str = "one", ttl_s: float = 10) -> JobClaim:
    taken = await registry.claim_job(M, owner, ttl_s)
    assert isinstance(taken, JobClaim)
    return taken


async def test_a_claimed_job_shows_its_owner_and_its_progress(registry: Registry) -> None:
    mine = await claim(registry)
    other = await registry.claim_job(M, "two", 10)
    assert isinstance(other, JobRecord)
    assert (other.owner, other.epoch, other.stage) == ("one", mine.epoch, JobStage.RESOLVING)
    await registry.update_job(mine, progress(JobStage.CONVERTING, 5))
    shown = await registry.get_job(M)
    assert shown == JobRecord(
        model=M, owner="one", epoch=mine.epoch, stage=JobStage.CONVERTING, bytes_done=5
    )
    assert await registry.list_jobs() == (shown,)


async def test_of_eight_claimers_one_wins_and_the_others_learn_who(store: FakeMetadata) -> None:
    results = await asyncio.gather(
        *(Registry(store.another()).claim_job(M, f"owner-{i}", 10) for i in range(8))
    )
    (winner,) = [r for r in results if isinstance(r, JobClaim)]
    assert {r.owner for r in results} == {winner.owner}
    assert {r.epoch for r in results} == {winner.epoch}


async def test_a_finished_job_stays_readable_and_can_be_claimed_again(
    registry: Registry, clock: VirtualClock
) -> None:
    first = await claim(registry)
    error = JobError(code="source_unavailable", message="hub down", status=503)
    failed = msgspec.structs.replace(progress(JobStage.FAILED), error=error)
    await registry.finish_job(first, failed)
    await clock.advance(1000)
    shown = await registry.get_job(M)
    assert shown is not None
    assert (shown.stage, shown.error, shown.owner) == (JobStage.FAILED, error, "one")
    second = await claim(registry, "two")
    assert second.epoch > first.epoch
    with pytest.raises(Fenced):
        await registry.update_job(first, progress(JobStage.CONVERTING))
    with pytest.raises(ValueError, match="not final"):
        await registry.finish_job(second, progress(JobStage.CONVERTING))


async def test_an_owner_that_keeps_its_claim_keeps_it(
    registry: Registry, clock: VirtualClock
) -> None:
    mine = await claim(registry)
    for _ in range(5):
        await clock.advance(8)
        await registry.keep_job(mine)
    assert isinstance(await registry.claim_job(M, "two", 10), JobRecord)
    await registry.finish_job(mine, progress(JobStage.DONE))


async def test_takeover_after_the_owner_died(registry: Registry, clock: VirtualClock) -> None:
    old = await claim(registry)
    await clock.advance(11)
    assert await registry.get_job(M) is None
    for refused in (
        registry.keep_job(old),
        registry.update_job(old, progress(JobStage.CONVERTING)),
    ):
        with pytest.raises(Fenced):
            await refused
    new = await claim(registry, "two")
    assert new.epoch > old.epoch
    for late in (
        registry.keep_job(old),
        registry.update_job(old, progress(JobStage.CONVERTING)),
        registry.finish_job(old, progress(JobStage.DONE)),
        registry.publish_model(old, published("a" * 64)),
    ):
        with pytest.raises(Fenced):
            await late
    await registry.release_job(old)
    stored = await registry.publish_model(new, published("b" * 64))
    assert await registry.get_model(M) == stored
    await registry.finish_job(new, progress(JobStage.DONE))


async def test_a_released_job_is_free_at_once(registry: Registry) -> None:
    await registry.release_job(await claim(registry))
    assert await registry.list_jobs() == ()
    await claim(registry, "two")


class Stalls(FakeMetadata):
    """A client that stops before its next write to a model, for as long as the test likes."""

    reached: asyncio.Event
    go_on: asyncio.Event

    async def put(self, key, value, *, expect_revision=None, lease=None):
        if key.startswith("models/"):
            self.reached.set()
            await self.go_on.wait()
        return await super().put(key, value, expect_revision=expect_revision, lease=lease)


def stalling(store: FakeMetadata) -> Stalls:
    client = Stalls(store._store.clock)
    client._share(store._store)
    client.reached, client.go_on = asyncio.Event(), asyncio.Event()
    return client


@pytest.mark.parametrize("known_before", [False, True])
async def test_an_owner_that_wakes_after_its_successor_published_gets_nothing(
    registry: Registry, store: FakeMetadata, clock: VirtualClock, known_before: bool
) -> None:
    """The old owner passes every check, stalls at the very write, and its lease runs out."""
    if known_before:
        await registry.put_model(ModelRecord(spec=ModelSpec(model=M, pinned=True)))
    slow = stalling(store)
    old_registry = Registry(slow)
    old = await claim(old_registry)
    late = asyncio.ensure_future(old_registry.publish_model(old, published("a" * 64)))
    await slow.reached.wait()
    await clock.advance(11)
    new = await claim(registry, "two")
    stored = await registry.publish_model(new, published("b" * 64))
    slow.go_on.set()
    with pytest.raises(Fenced):
        await late
    assert await registry.get_model(M) == stored


async def test_an_owner_that_wakes_before_its_successor_published_is_the_one(
    registry: Registry, store: FakeMetadata, clock: VirtualClock
) -> None:
    slow = stalling(store)
    old_registry = Registry(slow)
    old = await claim(old_registry)
    late = asyncio.ensure_future(old_registry.publish_model(old, published("a" * 64)))
    await slow.reached.wait()
    await clock.advance(11)
    new = await claim(registry, "two")
    slow.go_on.set()
    won = await late
    with pytest.raises(Fenced):
        await registry.publish_model(new, published("b" * 64))
    # The same bytes, converted twice, are one checkpoint: then the successor has what it wants.
    assert await registry.publish_model(new, published("a" * 64)) == won


async def test_publishing_keeps_what_the_operator_changed_meanwhile(registry: Registry) -> None:
    await registry.put_model(ModelRecord(spec=ModelSpec(model=M)))
    mine = await claim(registry)
    await registry.put_model(ModelRecord(spec=ModelSpec(model=M, pinned=True)))
    stored = await registry.publish_model(mine, published("a" * 64))
    assert stored.record.spec.pinned
    assert stored.record.checkpoint is not None
    assert stored.record.checkpoint.id == "a" * 64


async def test_a_model_deleted_meanwhile_stays_deleted(registry: Registry) -> None:
    await registry.put_model(ModelRecord(spec=ModelSpec(model=M)))
    mine = await claim(registry)
    await registry.delete_model(M)
    with pytest.raises(ModelNotFound, match="deleted"):
        await registry.publish_model(mine, published("a" * 64))
    assert await registry.get_model(M) is None


async def test_publishing_again_after_a_lost_answer(registry: Registry) -> None:
    mine = await claim(registry)
    first = await registry.publish_model(mine, published("a" * 64))
    assert await registry.publish_model(mine, published("a" * 64)) == first


async def test_the_next_ingest_replaces_the_checkpoint(registry: Registry) -> None:
    first = await claim(registry)
    assert first.checkpoint is None
    await registry.publish_model(first, published("a" * 64))
    await registry.finish_job(first, progress(JobStage.DONE))
    second = await claim(registry)
    assert second.checkpoint == "a" * 64
    stored = await registry.publish_model(second, published("b" * 64))
    assert stored.record.checkpoint is not None
    assert stored.record.checkpoint.id == "b" * 64


async def test_a_lost_answer_does_not_fence_the_owner(registry: Registry) -> None:
    mine = await claim(registry)
    mine.written = Revision(mine.written - 1)
    await registry.update_job(mine, progress(JobStage.CONVERTING, 1))
    shown = await registry.get_job(M)
    assert shown is not None
    assert shown.bytes_done == 1


async def test_only_the_newest_finished_jobs_are_kept(
    registry: Registry, store: FakeMetadata
) -> None:
    running = await registry.claim_job(ModelId("m0"), "one", 1000)
    assert isinstance(running, JobClaim)
    for i in range(1, 7):
        taken = await registry.claim_job(ModelId(f"m{i}"), "one", 10)
        assert isinstance(taken, JobClaim)
        await registry.finish_job(taken, progress(JobStage.DONE))
    assert [j.model for j in await registry.list_jobs()] == ["m0", "m4", "m5", "m6"]
    assert len((await store.list("")).entries) == 5  # and the one key that numbers are taken from


async def test_a_claim_that_is_cancelled_leaves_nothing_for_long(
    registry: Registry, store: FakeMetadata, clock: VirtualClock
) -> None:
    for turns in range(1, 8):
        task = asyncio.ensure_future(registry.claim_job(M, "one", 10))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await clock.advance(11)
        assert await registry.get_job(M) is None

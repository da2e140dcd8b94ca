"""The task that writes the view: list, watch, list again; nothing is forgotten on doubt."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from serverlessllm.core.apikeys import ApiKey, NewApiKey
from serverlessllm.core.ids import KeyId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.metadata.base import Revision
from serverlessllm.metadata.registry import Registry, RegistryChange, Resync, Snapshot, StoredModel
from serverlessllm.orchestrator.feed import Feed
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.testing.metadata import FakeMetadata

SETTINGS = OrchestratorSettings(list_interval_s=30.0, reconnect_s_max=2.0, list_timeout_s=2.0)


class Fed:
    def __init__(self, clock, registry):
        self.view = ClusterView()
        self.feed = Feed(self.view, registry, SETTINGS, clock)
        self.task = asyncio.create_task(self.feed.run())


@pytest.fixture
def metadata(clock):
    return FakeMetadata(clock)


@pytest.fixture
def registry(metadata):
    return Registry(metadata.another())


@pytest.fixture
async def fed(clock, metadata):
    made = Fed(clock, Registry(metadata))
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)
    await metadata.close()


async def put(registry, name, **fields):
    await registry.put_model(ModelRecord(spec=ModelSpec(model=name, **fields)))


async def until(settle, holds):
    for _ in range(50):
        if holds():
            return
        await settle()
    raise AssertionError("did not come true")


async def test_what_was_there_and_what_comes_is_seen(fed, registry, settle, make):
    await put(registry, "old")
    await put(registry, "new", aliases=("alias",))
    registration = await registry.register_agent("a", 10.0)
    await registry.write_agent(registration, make.agent("a", make.on("old")))
    claim = await registry.claim_job("new", "o", 10.0)
    view = fed.view
    await until(settle, lambda: set(view.models) == {"old", "new"} and "new" in view.jobs)
    assert view.names["alias"] == "new"
    assert view.agents["a"].record.epoch == registration.epoch
    await registry.delete_model("old")
    await registry.deregister(registration)
    await registry.release_job(claim)
    await until(settle, lambda: not view.agents and set(view.models) == {"new"} and not view.jobs)


async def test_metadata_that_goes_away_takes_nothing_with_it(
    fed, metadata, registry, clock, settle
):
    await put(registry, "m")
    await until(settle, lambda: "m" in fed.view.models)
    metadata.failing = True
    await put(registry, "n")  # by another client: the wake finds it failing
    await until(settle, lambda: not fed.feed.available)
    assert set(fed.view.models) == {"m"}
    for _ in range(10):
        await clock.advance(1.0)
    assert set(fed.view.models) == {"m"}
    metadata.failing = False
    for _ in range(10):
        await clock.advance(1.0)
    await until(settle, lambda: set(fed.view.models) == {"m", "n"})
    assert fed.feed.available


async def test_it_starts_without_metadata(metadata, clock, settle):
    metadata.failing = True
    fed = Fed(clock, Registry(metadata))
    first = asyncio.create_task(fed.feed.first_list())
    await settle()
    assert not first.done()
    for _ in range(21):
        await clock.advance(0.1)
    assert first.done()
    fed.task.cancel()
    await asyncio.gather(fed.task, return_exceptions=True)


class ScriptedRegistry:
    """Snapshots and changes as given."""

    def __init__(self, *snapshots):
        self.snapshots = list(snapshots)
        self.listed = 0
        self.changes: asyncio.Queue[RegistryChange] = asyncio.Queue()

    async def snapshot(self):
        self.listed += 1
        return self.snapshots.pop(0) if len(self.snapshots) > 1 else self.snapshots[0]

    async def watch(self, from_revision):
        while True:
            yield await self.changes.get()


def snapshot(*names, revision, unreadable=()):
    return Snapshot(
        models=tuple(
            StoredModel(record=ModelRecord(spec=ModelSpec(model=name)), revision=Revision(1))
            for name in names
        ),
        agents=(),
        jobs=(),
        revision=Revision(revision),
        unreadable=unreadable,
    )


@pytest.fixture
async def scripted(clock, settle):
    tasks = []

    async def start(*snapshots):
        registry = ScriptedRegistry(*snapshots)
        fed = Fed(clock, registry)
        tasks.append(fed.task)
        await settle()
        return registry, fed

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_list_every_interval_corrects_what_the_watch_lost(scripted, clock):
    registry, fed = await scripted(snapshot("a", revision=1), snapshot("b", revision=2))
    assert set(fed.view.models) == {"a"}
    await clock.advance(29.0)
    assert registry.listed == 1
    await clock.advance(2.0)
    assert registry.listed == 2
    assert set(fed.view.models) == {"b"}


async def test_a_resync_lists_at_once(scripted, settle):
    registry, fed = await scripted(snapshot("a", revision=1), snapshot("a", "b", revision=2))
    registry.changes.put_nowait(Resync(revision=Revision(2)))
    await settle()
    assert set(fed.view.models) == {"a", "b"}


async def test_a_store_that_went_back_deletes_nothing(scripted, clock, settle):
    registry, fed = await scripted(
        snapshot("a", revision=9), snapshot("b", revision=3), snapshot("b", revision=4)
    )
    registry.changes.put_nowait(Resync(revision=Revision(3)))
    await settle()
    assert set(fed.view.models) == {"a", "b"}
    await clock.advance(31.0)
    assert set(fed.view.models) == {"b"}


async def test_a_list_with_unreadable_records_deletes_nothing(scripted, settle):
    registry, fed = await scripted(
        snapshot("a", revision=1), snapshot("b", revision=2, unreadable=("models/a",))
    )
    registry.changes.put_nowait(Resync(revision=Revision(2)))
    await settle()
    assert set(fed.view.models) == {"a", "b"}


async def test_a_heartbeat_is_dated_by_our_own_clock(fed, registry, clock, settle, make):
    registration = await registry.register_agent("a", 1000.0)
    await registry.write_agent(registration, make.agent("a"))
    await until(settle, lambda: "a" in fed.view.agents)
    await clock.advance(7.0)
    assert fed.view.agents["a"].suspect(clock.now_s(), 3.0)
    await registry.write_agent(registration, msgspec.structs.replace(make.agent("a")))
    await settle()
    await until(settle, lambda: fed.view.agents["a"].seen_s == clock.now_s())


async def test_keys_are_seen_revoked_and_forgotten(fed, registry, metadata, settle):
    await until(settle, lambda: fed.view.listed)
    assert not fed.view.keys_asked
    key, _ = await registry.create_api_key(NewApiKey(name="one"))
    await until(settle, lambda: key.sha256 in fed.view.api_keys)
    assert fed.view.keys_asked
    version = fed.view.keys_version
    await registry.revoke_api_key(key.id)
    await until(settle, lambda: fed.view.api_keys[key.sha256].revoked_s is not None)
    assert fed.view.keys_version > version
    await metadata.another().delete(f"apikeys/{key.id}")
    await until(settle, lambda: not fed.view.api_keys)
    assert fed.view.keys_asked


async def test_a_key_that_cannot_be_read_shuts_the_door_all_the_same(clock, metadata, settle):
    newer = ApiKey(schema_version=99, id=KeyId("key_new"), name="new", sha256="0" * 64)
    await metadata.another().put("apikeys/key_new", msgspec.json.encode(newer))
    made = Fed(clock, Registry(metadata))
    try:
        await until(settle, lambda: made.view.listed)
        assert made.view.keys_asked
        assert not made.view.api_keys
    finally:
        made.task.cancel()
        await asyncio.gather(made.task, return_exceptions=True)
        await metadata.close()

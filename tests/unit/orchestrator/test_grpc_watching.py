"""What is told of a model: from the view and from the waiting room, and only when it is new."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
import pytest

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel, JobRecord, JobStage
from serverlessllm.core.ids import Epoch, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.grpc.watching import Watching
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView

M = ModelId("m")


@pytest.fixture
async def watched(make, loads):
    clock = SystemClock()
    settings = OrchestratorSettings(grpc_watch_interval_s=0.0)
    view = ClusterView()
    view.put_model(make.model("m"))
    room = WaitingRoom(loads, settings, clock)
    yield Watching(settings, view=view, room=room, clock=clock), view, room, loads, make
    await room.close()


def job(stage):
    return JobRecord(model=M, owner="o", epoch=Epoch(1), stage=stage, bytes_done=3, bytes_total=9)


async def settled():
    """Let whoever can go on do so, as far as it gets."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_states_of_a_model(watched):
    watching, view, _, _, make = watched

    def status():
        return watching.status(M)

    assert (status().state, status().cache_level) == ("cold", "store")
    view.put_job(job(JobStage.CONVERTING))
    assert (status().state, status().stage) == ("ingesting", "ingest: converting")
    assert (status().bytes_done, status().bytes_total) == (3, 9)
    view.put_job(job(JobStage.FAILED))
    assert status().state == "cold"
    for state in (InstanceState.QUEUED, InstanceState.LOADING, InstanceState.STARTING):
        on = msgspec.structs.replace(make.on("m", ready=False), state=state)
        view.put_agent(make.agent("a", on), 1, 0.0)
        assert (status().state, status().cache_level) == (state, "nvme")
    arriving = msgspec.structs.replace(make.on("m"), arriving=True)
    view.put_agent(make.agent("a", arriving), 1, 0.0)
    assert (status().state, status().agents_ready) == ("loading", 0)
    view.put_agent(make.agent("a", make.on("m")), 1, 0.0)
    view.put_agent(make.agent("b", make.on("m", level=CacheLevel.DEVICE)), 1, 0.0)
    assert (status().state, status().agents_ready, status().cache_level) == ("ready", 2, "device")
    view.drop_model(M)
    assert status().state == "deleted"


async def test_a_model_that_nobody_has_lies_nowhere(watched):
    watching, view, _, _, make = watched
    view.put_model(msgspec.structs.replace(make.model("n"), checkpoint=None))
    assert watching.status(ModelId("n")).cache_level == ""


async def test_a_watcher_hears_of_a_load_s_progress_and_begins_none(watched):
    watching, view, room, held, make = watched
    async with aclosing(watching.changes(M)) as changes:
        assert (await anext(changes)).state == "cold"
        following = asyncio.ensure_future(anext(changes))
        await settled()
        assert held.started == []
        room.hold(M)
        assert (await following).state == "queued"
        held.publish(LoadEvent(state="loading", stage="nvme→dram", bytes_done=1, bytes_total=2))
        moved = await anext(changes)
        assert (moved.state, moved.stage, moved.bytes_done) == ("loading", "nvme→dram", 1)
        view.put_agent(make.agent("a", make.on("m")), 1, 0.0)
        assert (await anext(changes)).state == "ready"
        view.drop_model(M)
        assert (await anext(changes)).state == "deleted"
        assert await anext(changes, None) is None


async def test_what_does_not_change_is_not_told(watched):
    watching, view, _, _, make = watched
    async with aclosing(watching.changes(M)) as changes:
        await anext(changes)
        following = asyncio.ensure_future(anext(changes))
        for beat in range(5):
            view.put_agent(make.agent("other"), beat, float(beat))
            await settled()
        assert not following.done()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

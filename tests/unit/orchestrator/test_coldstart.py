"""The waiting room: one load a model, and every way to come, wait and leave."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from serverlessllm.core.agentapi import HopTiming, LoadEvent
from serverlessllm.core.errors import LoadFailed, SLLMError, TooManyRequests, Unavailable
from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.orchestrator.coldstart import Loaded, WaitingRoom
from serverlessllm.orchestrator.settings import OrchestratorSettings

READY = Loaded(agent=AgentId("a"), predicted_s=1.0)


@pytest.fixture
async def room(loads, clock):
    settings = OrchestratorSettings(
        waiters_per_model_max=3, waiters_max=4, loads_max=3, failure_cache_s=5.0
    )
    made = WaitingRoom(loads, settings, clock)
    yield made
    await made.close()
    assert (made.waiting, made.loading) == (0, 0)


async def wait(room, model, timeout_s=60.0):
    with room.enter(model) as waiter:
        return await waiter.ready(timeout_s)


async def test_all_who_wait_share_one_load(room, loads, settle):
    waiting = [asyncio.create_task(wait(room, "m")) for _ in range(3)]
    await settle()
    assert loads.started == [("m", False)]
    loads.end(READY)
    assert await asyncio.gather(*waiting) == [READY] * 3
    assert room.last_load("m") == READY


async def test_who_waits_goes_on_although_bytes_still_move(room, loads, settle):
    waiting = asyncio.create_task(wait(room, "m"))
    await settle()
    loads.became_ready(READY)
    assert await waiting == READY
    assert room.last_load("m") == READY
    assert room.loading == 1
    whole = msgspec.structs.replace(READY, hops=(HopTiming(hop="start", seconds=1.0),))
    loads.end(whole)
    await settle()
    assert room.last_load("m") == whole
    assert room.loading == 0
    again = asyncio.create_task(wait(room, "m"))  # what came of the first one is not its affair
    await settle()
    assert len(loads.started) == 2
    again.cancel()


async def test_who_comes_while_bytes_still_move_hears_how_far_they_are(room, loads, settle):
    first = asyncio.create_task(wait(room, "m"))
    await settle()
    loads.became_ready(READY)
    await first
    with room.enter("m") as waiter:
        assert await waiter.ready(0) == READY
    assert waiter.incomplete
    loads.publish(LoadEvent(state="loading", bytes_done=7))
    assert waiter.progress.bytes_done == 7
    loads.end(READY)
    await settle()
    assert not waiter.incomplete
    assert loads.started == [("m", False)]


async def test_a_replica_elsewhere_is_not_the_load_whose_bytes_still_move(room, loads, settle):
    first = asyncio.create_task(wait(room, "m"))
    await settle()
    loads.became_ready(READY)
    await first
    assert room.hold("m")
    assert room.hold("m", elsewhere=True)
    await settle()
    assert loads.started == [("m", False), ("m", True)]


async def test_an_instance_that_went_before_its_bytes_came_is_loaded_again(room, loads, settle):
    first = asyncio.create_task(wait(room, "m"))
    await settle()
    loads.became_ready(READY)
    await first
    room.not_ready(ModelId("m"), AgentId("another"))
    assert await wait(room, "m") == READY
    room.not_ready(ModelId("m"), READY.agent)
    again = asyncio.create_task(wait(room, "m"))
    await settle()
    assert len(loads.started) == 2
    again.cancel()


async def test_of_a_model_that_was_deleted_nothing_is_remembered(room, loads, settle):
    waiting = asyncio.create_task(wait(room, "m"))
    await settle()
    loads.became_ready(READY)
    await waiting
    room.forget("m")
    loads.end(READY)
    await settle()
    assert room.last_load("m") is None


async def test_two_models_load_side_by_side(room, loads, settle):
    waiting = [asyncio.create_task(wait(room, model)) for model in ("m", "n")]
    await settle()
    assert sorted(loads.started) == [("m", False), ("n", False)]
    loads.end(READY)
    await asyncio.gather(*waiting)


async def test_one_who_leaves_leaves_the_others(room, loads, settle):
    first, second = (asyncio.create_task(wait(room, "m")) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    assert (loads.cancelled, room.waiting) == (0, 1)
    loads.end(READY)
    assert await second == READY


async def test_the_last_one_who_leaves_ends_the_load(room, loads, settle):
    waiting = [asyncio.create_task(wait(room, "m")) for _ in range(2)]
    await settle()
    for task in waiting:
        task.cancel()
    await settle()
    assert (loads.cancelled, room.loading) == (1, 0)


async def test_one_who_leaves_at_once_never_starts_a_load(room, loads, settle):
    with room.enter("m"):
        pass
    await settle()
    assert loads.started == []
    assert room.loading == 0


async def test_who_comes_after_the_last_left_starts_afresh(room, loads, settle):
    first = asyncio.create_task(wait(room, "m"))
    await settle()
    first.cancel()
    second = asyncio.create_task(wait(room, "m"))
    await settle()
    assert loads.started == [("m", False)] * 2
    loads.end(READY)
    assert await second == READY


async def test_the_wait_budget_ends_the_wait_and_a_promise_keeps_the_load(
    room, loads, clock, settle
):
    async def patient():
        with room.enter("m") as waiter:
            found = await waiter.ready(60.0)
            waiter.promise()
            return found

    waiting = asyncio.create_task(patient())
    await settle()
    await clock.advance(59.9)
    assert not waiting.done()
    await clock.advance(0.2)
    assert await waiting is None
    await settle()
    assert (loads.cancelled, room.loading) == (0, 1)
    loads.end(READY)
    await settle()
    assert room.loading == 0


async def test_fail_fast_does_not_wait(room, loads, settle):
    with room.enter("m") as waiter:
        assert await waiter.ready(0) is None
        waiter.promise()
    await settle()
    assert loads.started == [("m", False)]


async def test_a_held_load_needs_no_waiter_until_it_is_released(room, loads, settle):
    assert room.hold("m", elsewhere=True)
    waiting = asyncio.create_task(wait(room, "m"))
    await settle()
    waiting.cancel()
    await settle()
    assert loads.started == [("m", True)]
    assert loads.cancelled == 0
    room.release("m")
    await settle()
    assert loads.cancelled == 1


async def test_the_room_is_bounded_by_model_and_in_all(room, loads, settle):
    waiting = [asyncio.create_task(wait(room, "m")) for _ in range(3)]
    await settle()
    with pytest.raises(TooManyRequests) as full:
        await wait(room, "m")
    assert full.value.retry_after_s == 1.0
    loads.publish(LoadEvent(state="loading", eta_s=42.0))
    with pytest.raises(TooManyRequests) as full:
        await wait(room, "m")
    assert full.value.retry_after_s == 42.0
    waiting.append(asyncio.create_task(wait(room, "n")))
    await settle()
    with pytest.raises(TooManyRequests):
        await wait(room, "o")
    loads.end(READY)
    assert len(await asyncio.gather(*waiting)) == 4


async def test_loads_are_bounded(room, loads):
    for model in ("a", "b", "c"):
        assert room.hold(model)
    assert not room.hold("d")
    with pytest.raises(TooManyRequests):
        await wait(room, "d")


async def test_a_failure_is_the_same_for_all_and_is_remembered(room, loads, clock, settle):
    waiting = [asyncio.create_task(wait(room, "m")) for _ in range(3)]
    await settle()
    failure = LoadFailed("no")
    loads.end(failure)
    assert await asyncio.gather(*waiting, return_exceptions=True) == [failure] * 3
    with pytest.raises(LoadFailed):
        await wait(room, "m")
    assert not room.hold("m")
    assert len(loads.started) == 1
    await clock.advance(5.1)
    assert room.hold("m")


async def test_a_failure_is_forgotten_when_agents_come_or_an_operator_says_so(room, loads, settle):
    room.hold("m")
    await settle()
    loads.end(LoadFailed("no"))
    await settle()
    assert not room.hold("m")
    room.forget("m")
    assert room.hold("m")
    await settle()
    loads.end(LoadFailed("no"))
    await settle()
    loads.agents = frozenset({("a", 2)})
    assert room.hold("m")


async def test_a_bug_is_an_internal_error_for_those_who_wait(room, loads, settle):
    waiting = asyncio.create_task(wait(room, "m"))
    await settle()
    loads.end(ZeroDivisionError("bug"))
    with pytest.raises(SLLMError) as error:
        await waiting
    assert error.value.status == 500
    assert "bug" not in error.value.message


async def test_closing_tells_those_who_wait(loads, clock, settle):
    room = WaitingRoom(loads, OrchestratorSettings(), clock)
    waiting = asyncio.create_task(wait(room, "m"))
    late = asyncio.create_task(wait(room, "n"))
    await asyncio.sleep(0)  # the owners have not run yet
    await room.close()
    for task in (waiting, late):
        with pytest.raises(Unavailable):
            await task
    with pytest.raises(TooManyRequests):
        await wait(room, "m")


async def test_progress_reaches_whoever_looks(room, loads, clock, settle):
    with room.enter("m") as waiter:
        assert waiter.progress.state == "queued"
        coming = asyncio.create_task(waiter.progressed(5.0))
        await settle()
        event = LoadEvent(state="loading", stage="nvme→dram", bytes_done=1, bytes_total=2)
        loads.publish(event)
        assert await coming == event
        coming = asyncio.create_task(waiter.progressed(5.0))
        await settle()
        await clock.advance(5.0)
        assert await coming == event  # nothing new, but not silent either
        loads.end(READY)
        assert await waiter.ready(1.0) == READY
        assert (await waiter.progressed(5.0)).state == "ready"


async def test_a_stopped_load_tells_its_waiters(room, loads, settle):
    waiting = asyncio.create_task(wait(room, "m"))
    await settle()
    room.stop("m")
    with pytest.raises(Unavailable):
        await waiting
    assert loads.cancelled == 1

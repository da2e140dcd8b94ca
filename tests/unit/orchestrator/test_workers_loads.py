"""A worker's waiting room on the main process's: one load, and everybody hears how it goes."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.errors import ModelNotFound, NoCapacity, SLLMError
from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.orchestrator.coldstart import Loaded, WaitingRoom
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.workers.loads import WishedLoads, WorkerRoom
from serverlessllm.orchestrator.workers.messages import (
    FromWorker,
    NotReady,
    ToWorker,
    Unwished,
    Wish,
    frame,
)
from serverlessllm.orchestrator.workers.mirror import Mirror
from serverlessllm.orchestrator.workers.wishes import Wishes
from serverlessllm.testing.clock import VirtualClock

MODEL = ModelId("m")
DONE = Loaded(agent=AgentId("a"), predicted_s=1.0, load_s=2.0)
_decoder = msgspec.msgpack.Decoder(ToWorker)


class Pair:
    """A worker, and the main process it wishes of, without a process between them."""

    def __init__(self, wishes: Wishes, clock: VirtualClock) -> None:
        self.told: list[FromWorker] = []
        self._wishes = wishes
        self.loads = WishedLoads(Mirror(self._tell), self._tell)
        settings = OrchestratorSettings(failure_cache_s=0.0)
        self.room = WorkerRoom(self.loads, settings, clock, self._tell)

    def tell(self, message: ToWorker) -> None:
        """To the worker, as it is on the wire."""
        assert self.loads.hear(_decoder.decode(frame(message)[4:]))

    def _tell(self, message: FromWorker) -> None:
        self.told.append(message)
        if isinstance(message, Wish):
            self._wishes.begin(self, message)  # type: ignore[arg-type] # as far as it is used
        elif isinstance(message, Unwished):
            self._wishes.end(self, message)  # type: ignore[arg-type]


@pytest.fixture
def view():
    """The main process's."""
    return ClusterView()


@pytest.fixture
async def pairs(view, loads, clock):
    """`pairs(n)`: so many workers of one main process."""
    room = WaitingRoom(loads, OrchestratorSettings(), clock)
    wishes = Wishes(view, room)
    made: list[Pair] = []

    def make(count: int) -> tuple[WaitingRoom, Wishes, list[Pair]]:
        made.extend(Pair(wishes, clock) for _ in range(count))
        return room, wishes, made

    yield make
    for pair in made:
        await pair.room.close()
    await wishes.close()
    await room.close()


async def test_requests_of_all_workers_wait_for_one_load(pairs, loads, settle):
    room, wishes, workers = pairs(3)
    with (
        workers[0].room.enter(MODEL) as first,
        workers[0].room.enter(MODEL) as second,
        workers[1].room.enter(MODEL) as third,
        workers[2].room.enter(MODEL) as fourth,
    ):
        waiters = [first, second, third, fourth]
        await settle()
        assert loads.started == [(MODEL, False)]
        assert room.waiting_for() == {MODEL: 3}
        assert wishes.waiting_for(MODEL) == 3
        for done in (10, 20):
            loads.publish(LoadEvent(state="loading", bytes_done=done))
            await settle()
            assert [waiter.progress.bytes_done for waiter in waiters] == [done] * 4
        loads.end(DONE)
        await settle()
        assert [waiter.loaded() for waiter in waiters] == [DONE] * 4
        assert not any(waiter.incomplete for waiter in waiters)
    await settle()
    assert wishes.waiting_for(MODEL) == 0
    assert room.waiting == 0


@pytest.mark.parametrize(
    "error",
    [NoCapacity("no agent", retry_after_s=3.0), ModelNotFound("no such thing", param="model")],
)
async def test_why_it_failed_is_the_same_for_all(pairs, loads, settle, error):
    _, _, workers = pairs(2)
    with workers[0].room.enter(MODEL) as one, workers[1].room.enter(MODEL) as two:
        await settle()
        loads.end(error)
        await settle()
        for waiter in (one, two):
            with pytest.raises(type(error)) as caught:
                waiter.loaded()
            assert (caught.value.message, caught.value.param, caught.value.retry_after_s) == (
                error.message,
                error.param,
                error.retry_after_s,
            )


async def test_what_failed_is_remembered_by_the_main_process_alone(pairs, loads, settle, clock):
    _, _, (worker,) = pairs(1)
    for _ in range(2):
        with worker.room.enter(MODEL) as waiter:
            await settle()
            loads.end(NoCapacity("no agent"))
            await settle()
            with pytest.raises(NoCapacity):
                waiter.loaded()
    assert len(loads.started) == 1
    await clock.advance(OrchestratorSettings().failure_cache_s)
    with worker.room.enter(MODEL):
        await settle()
        assert len(loads.started) == 2


async def test_a_bug_is_told_to_who_waits(pairs, loads, settle):
    _, _, (worker,) = pairs(1)
    with worker.room.enter(MODEL) as waiter:
        await settle()
        loads.end(RuntimeError("a bug"))
        await settle()
        with pytest.raises(SLLMError) as caught:
            waiter.loaded()
        assert caught.value.status == 500


async def test_a_load_that_no_worker_wants_ends(pairs, loads, settle):
    _, wishes, workers = pairs(2)
    with workers[0].room.enter(MODEL):
        with workers[1].room.enter(MODEL):
            await settle()
        await settle()
        assert loads.cancelled == 0
        assert wishes.waiting_for(MODEL) == 1
    await settle()
    assert loads.cancelled == 1
    assert wishes.waiting_for(MODEL) == 0


async def test_a_worker_that_died_wants_nothing(pairs, loads, settle):
    _, wishes, (worker,) = pairs(1)
    with worker.room.enter(MODEL):
        await settle()
        wishes.end_all(worker)
        await settle()
        assert loads.cancelled == 1


async def test_a_promise_of_a_worker_holds_while_it_lives(pairs, loads, settle):
    _, _, (worker,) = pairs(1)
    with worker.room.enter(MODEL) as waiter:
        await settle()
        waiter.promise()
    await settle()
    assert loads.cancelled == 0
    loads.end(DONE)
    await settle()
    assert worker.room.loading == 0


async def test_a_wish_for_a_second_replica_is_one(pairs, loads, settle):
    _, _, workers = pairs(2)
    for worker in workers:
        assert worker.room.hold(MODEL, elsewhere=True)
        assert worker.room.hold(MODEL, elsewhere=True)
    await settle()
    assert loads.started == [(MODEL, True)]
    assert sum(isinstance(message, Wish) for message in workers[0].told) == 1
    loads.end(DONE)
    await settle()
    assert all(worker.room.loading == 0 for worker in workers)


async def test_who_waits_for_bytes_of_a_ready_instance_hears_of_them_to_the_end(
    pairs, loads, settle
):
    room, _, (worker,) = pairs(1)
    with worker.room.enter(MODEL) as waiter:
        await settle()
        loads.became_ready(DONE)
        await settle()
        assert waiter.loaded() == DONE
        assert waiter.incomplete
        loads.publish(LoadEvent(state="loading", bytes_done=7))
        await settle()
        assert waiter.progress.bytes_done == 7
        loads.end(DONE)
        await settle()
        assert not waiter.incomplete
    assert room.waiting == 0
    assert worker.told[-1] == Unwished(wish=1)


async def test_bytes_that_will_not_come_end_the_wait(pairs, loads, settle):
    _, _, (worker,) = pairs(1)
    with worker.room.enter(MODEL) as waiter:
        await settle()
        loads.became_ready(DONE)
        await settle()
        loads.end(NoCapacity("gone"))
        await settle()
        assert not waiter.incomplete
        assert waiter.loaded() == DONE  # who was sent there meets what became of it


async def test_a_request_that_finds_the_instance_gone_says_so(pairs, loads, settle):
    _, _, (worker,) = pairs(1)
    worker.room.not_ready(MODEL, DONE.agent)
    assert worker.told == [NotReady(agent=DONE.agent, model=MODEL)]


async def test_a_wish_that_comes_when_it_has_just_been_fulfilled_is_no_load(
    pairs, view, make, loads, settle
):
    _, _, workers = pairs(2)
    with workers[0].room.enter(MODEL) as first:
        await settle()
        view.put_agent(make.agent("a", make.on("m")), 1, 0.0)
        loads.end(DONE)
        await settle()
        assert first.loaded() == DONE
    with workers[1].room.enter(MODEL) as late:
        await settle()
        assert late.loaded() == DONE
    assert len(loads.started) == 1
    view.lost(DONE.agent, MODEL)
    with workers[1].room.enter(MODEL):
        await settle()
        assert len(loads.started) == 2


async def test_messages_about_what_is_over_are_of_no_effect(pairs, loads, settle):
    _, _, (worker,) = pairs(1)
    with worker.room.enter(MODEL):
        await settle()
    loads.publish(LoadEvent(state="loading", bytes_done=7))
    await settle()
    with worker.room.enter(MODEL) as waiter:
        await asyncio.sleep(0)
        assert waiter.progress.bytes_done == 0

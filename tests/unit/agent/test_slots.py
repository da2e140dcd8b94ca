"""Slots of a model: order, bounds, leaving, instances that go."""

from __future__ import annotations

import asyncio

import pytest

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.agent.slots import ModelSlots
from serverlessllm.core.errors import ModelNotReady, TooManyRequests, Unavailable
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.clock import VirtualClock

MODEL = ModelId("m")
SETTINGS = AgentSettings(queue_factor=2.0, queue_wait_s_max=5.0)


class Owner:
    """What the slots tell."""

    def __init__(self) -> None:
        self.idle: list[InstanceId] = []
        self.waits = 0

    def became_idle(self, instance: Instance) -> None:
        self.idle.append(instance.id)

    def queued(self, slots: ModelSlots) -> None:
        self.waits += 1


class Bench:
    def __init__(self, *sizes: int) -> None:
        self.clock = VirtualClock()
        self.owner = Owner()
        self.slots = ModelSlots(MODEL, SETTINGS, self.clock, self.owner)
        self.instances = [self.instance(f"i{n}", size) for n, size in enumerate(sizes)]
        for instance in self.instances:
            self.slots.add(instance)

    def instance(self, name: str, size: int) -> Instance:
        instance = Instance(
            InstanceId(name),
            ModelSpec(model=MODEL),
            None,
            keep_alive_s=300.0,
            now_s=self.clock.now_s(),
            not_before_s=0.0,
            on_change=lambda: None,
        )
        instance.slots = size
        return instance

    async def waiters(self, count: int) -> list[asyncio.Task[Instance]]:
        tasks = [asyncio.ensure_future(self.slots.take()) for _ in range(count)]
        await asyncio.sleep(0)
        return tasks


async def test_the_least_busy_instance_is_taken() -> None:
    bench = Bench(2, 2)
    taken = [(await bench.slots.take()).id for _ in range(4)]
    assert sorted(taken[:2]) == sorted(taken[2:]) == ["i0", "i1"]
    assert bench.slots.held == 4


async def test_who_waits_is_served_in_order() -> None:
    bench = Bench(1)
    first = await bench.slots.take()
    one, two = await bench.waiters(2)
    bench.slots.give_back(first)
    assert await one is first
    assert not two.done()
    assert bench.owner.idle == []
    bench.slots.give_back(first)
    bench.slots.give_back(await two)
    assert bench.owner.idle == ["i0"]
    assert first.running == 0


async def test_nobody_overtakes_the_queue() -> None:
    bench = Bench(1)
    first = await bench.slots.take()
    (waiter,) = await bench.waiters(1)
    bench.slots.give_back(first)  # the slot is given, though the waiter has not run yet
    (late,) = await bench.waiters(1)
    assert await waiter is first
    assert not late.done()
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)


async def test_the_queue_is_bounded_and_says_how_long() -> None:
    bench = Bench(2)
    for _ in range(2):
        await bench.slots.take()
    waiters = await bench.waiters(4)
    bench.slots.learn(3.0)
    with pytest.raises(TooManyRequests) as refused:
        await bench.slots.take()
    assert refused.value.retry_after_s == pytest.approx(6.0)
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert bench.slots.waiting == 0


async def test_leaving_just_after_being_given_a_slot_passes_it_on() -> None:
    bench = Bench(1)
    first = await bench.slots.take()
    one, two = await bench.waiters(2)
    bench.slots.give_back(first)
    one.cancel()
    assert await two is first
    assert first.running == 1


async def test_waiting_has_an_end() -> None:
    bench = Bench(1)
    await bench.slots.take()
    (waiter,) = await bench.waiters(1)
    assert bench.owner.waits == 1
    now_s = bench.clock.now_s()
    assert bench.slots.expire(now_s) == now_s + 5.0
    assert bench.slots.expire(now_s + 5.0) is None
    with pytest.raises(Unavailable, match="free in time"):
        await waiter


async def test_without_an_instance_nobody_waits() -> None:
    with pytest.raises(ModelNotReady):
        await Bench().slots.take()
    bench = Bench(1)
    first = await bench.slots.take()
    waiters = await bench.waiters(2)
    bench.slots.remove(first)
    for waiter in waiters:
        with pytest.raises(ModelNotReady):
            await waiter
    bench.slots.give_back(first)  # the request that ran on it ends later
    assert first.running == 0


async def test_another_instance_takes_over_the_queue() -> None:
    bench = Bench(1)
    await bench.slots.take()
    (waiter,) = await bench.waiters(1)
    fresh = bench.instance("fresh", 1)
    bench.slots.add(fresh)
    bench.slots.remove(bench.instances[0])
    assert await waiter is fresh


async def test_a_lease_falls_whatever_happens() -> None:
    bench = Bench(1)
    with pytest.raises(ZeroDivisionError):
        async with bench.slots.lease(None):
            raise ZeroDivisionError
    assert bench.slots.held == 0
    assert bench.slots.service_s is None
    async with bench.slots.lease(7.0) as instance:
        await bench.clock.advance(2.0)
    assert instance.keep_alive_s == 7.0
    assert bench.slots.service_s == 2.0

"""A handler without a task: where it goes on, how it becomes a task, how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from serverlessllm.edge.steps import Run, in_task, pause, stepping


class Event:
    """What a connection to an upstream is to a handler: it runs on whoever waits, itself."""

    def __init__(self) -> None:
        self.run: Run | None = None

    def wait(self) -> Awaitable[None]:
        run = stepping()
        assert run is not None, "waited for inside a task"
        self.run = run
        return pause(run)

    def happen(self) -> None:
        assert self.run is not None
        self.run.step()


def task_of(run: Run) -> asyncio.Task[None] | None:
    return run.task


async def test_it_goes_on_in_the_event_itself_and_needs_no_task() -> None:
    event, seen = Event(), []

    async def handler() -> None:
        for place in range(3):
            seen.append((place, asyncio.current_task()))
            await event.wait()

    run = Run(handler(), asyncio.get_running_loop())
    me = asyncio.current_task()
    for _ in range(4):
        assert not run.finished
        run.step()
    assert run.finished
    assert run.task is None
    assert [place for place, _ in seen] == [0, 1, 2]
    assert {task for _, task in seen} == {me}, "whatever runs now; nothing of its own"
    assert stepping() is None
    run.step()  # too late is no harm
    assert run.cancel() is None


async def test_what_else_it_waits_for_makes_it_a_task() -> None:
    event, loop = Event(), asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    seen: list[object] = []

    async def handler() -> None:
        await event.wait()
        seen.append(await first)
        with pytest.raises(ValueError, match="no"):
            await second
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        assert stepping() is None

    run = Run(handler(), loop)
    run.step()
    assert task_of(run) is None
    event.happen()
    task = task_of(run)
    assert task is not None
    event.happen()  # of no effect
    first.set_result("one")
    second.set_exception(ValueError("no"))
    await task
    assert seen == ["one", task]


async def test_it_asks_for_a_task_where_it_must_have_one() -> None:
    done = False

    async def handler() -> None:
        nonlocal done
        await in_task()
        await in_task()  # has one already
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        done = True

    run = Run(handler(), asyncio.get_running_loop())
    run.step()
    assert run.task is not None
    await run.task
    assert done


@pytest.mark.parametrize("adopted", [False, True], ids=["waiting for an event", "in a task"])
async def test_it_is_cancelled_as_a_task_is(adopted: bool) -> None:
    event, loop = Event(), asyncio.get_running_loop()
    seen: list[str] = []

    async def handler() -> None:
        try:
            if adopted:
                await loop.create_future()
            await event.wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
            seen.append("cleaned up")
            raise

    run = Run(handler(), loop)
    run.step()
    if adopted:
        await asyncio.sleep(0)
    task = run.cancel()
    assert task is not None
    assert seen == [], "not inside of whoever cancels"
    if not adopted:
        event.happen()  # comes before the cancellation is delivered, and says nothing any more
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled", "cleaned up"]


async def test_one_may_run_another_on() -> None:
    inner, outer, order = Event(), Event(), []

    async def first() -> None:
        await inner.wait()
        order.append("inner")

    async def second() -> None:
        await outer.wait()
        inner.happen()
        order.append("outer")
        await outer.wait()
        order.append("outer again")

    loop = asyncio.get_running_loop()
    for handler in (first, second):
        Run(handler(), loop).step()
    outer.happen()
    outer.happen()
    assert order == ["inner", "outer", "outer again"]

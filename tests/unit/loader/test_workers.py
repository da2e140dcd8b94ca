"""Threads and groups: a cancelled caller leaves nothing running and nothing unowned."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serverlessllm.core.failures import single_error
from serverlessllm.loader.workers import Threads, finish, for_each


async def test_a_cancelled_call_is_outlasted_and_taken_back() -> None:
    threads = Threads(1, "test")
    begun, go_on = threading.Event(), threading.Event()
    taken_back: list[str] = []

    def work() -> str:
        begun.set()
        go_on.wait()
        return "reservation"

    call = asyncio.create_task(threads.run_or_undo(taken_back.append, work))
    await asyncio.to_thread(begun.wait)
    for _ in range(3):  # however often
        call.cancel()
        await asyncio.sleep(0)
    assert not call.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert taken_back == ["reservation"]
    threads.close()


async def test_a_call_that_has_not_begun_never_does() -> None:
    threads = Threads(1, "test")
    go_on = threading.Event()
    ran: list[int] = []
    first = asyncio.create_task(threads.run(go_on.wait))
    second = asyncio.create_task(threads.run(ran.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go_on.set()
    await first
    threads.close()
    assert ran == []


async def test_errors_pass_through() -> None:
    threads = Threads(1, "test")
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 1, 0)
    threads.close()


async def test_a_cleanup_runs_to_its_end() -> None:
    gate = asyncio.Event()
    done: list[str] = []

    async def cleanup() -> None:
        await gate.wait()
        done.append("clean")

    async def body() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await finish(cleanup())

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["clean"]


async def test_what_is_left_is_closed_in_a_thread_though_the_caller_is_cancelled() -> None:
    threads = Threads(1, "test")
    go_on, closed_by = threading.Event(), []

    def close() -> None:
        go_on.wait()
        closed_by.append(threading.current_thread())

    async def use() -> None:
        async with threads.leaving() as stack:
            stack.callback(close)

    using = asyncio.create_task(use())
    await asyncio.sleep(0)
    for _ in range(2):
        using.cancel()
        await asyncio.sleep(0)
    assert not using.done()
    go_on.set()
    await asyncio.gather(using, return_exceptions=True)
    assert [thread is threading.main_thread() for thread in closed_by] == [False]
    threads.close()


async def test_for_each_keeps_the_order_and_the_width() -> None:
    begun: list[int] = []
    running = 0
    most = 0

    async def work(item: int) -> None:
        nonlocal running, most
        begun.append(item)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await for_each(range(10), 3, work)
    assert begun == list(range(10))
    assert most == 3


async def test_for_each_stops_at_the_first_error() -> None:
    begun: list[int] = []

    async def work(item: int) -> None:
        begun.append(item)
        await asyncio.sleep(0)
        if item == 2:
            raise KeyError(item)

    with pytest.raises(KeyError):
        await for_each(range(100), 2, work)
    assert len(begun) <= 5


async def test_single_error_leaves_others_alone() -> None:
    with pytest.raises(ValueError, match="alone"), single_error():
        raise ValueError("alone")

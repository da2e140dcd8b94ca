"""The one tick."""

from __future__ import annotations

import asyncio

from serverlessllm.edge.limits import Sweeper
from serverlessllm.testing.clock import VirtualClock


async def test_a_sweeper_ticks_until_closed() -> None:
    clock = VirtualClock(100.0)
    ticks: list[float] = []
    sweeper = Sweeper(ticks.append, 1.0, clock)
    sweeper.start()
    sweeper.start()
    await asyncio.sleep(0)
    await clock.advance(3.5)
    assert ticks == [101.0, 102.0, 103.0]
    assert sweeper.now_s == 103.0
    await sweeper.close()
    await clock.advance(5)
    assert len(ticks) == 3


async def test_one_bad_tick_is_not_the_last() -> None:
    clock = VirtualClock()
    ticks: list[float] = []

    def sweep(now_s: float) -> None:
        ticks.append(now_s)
        if len(ticks) == 1:
            raise RuntimeError("a bug in one connection's sweep")

    sweeper = Sweeper(sweep, 1.0, clock)
    sweeper.start()
    await asyncio.sleep(0)
    await clock.advance(3)
    assert len(ticks) == 3
    await sweeper.close()


async def test_closing_what_never_started() -> None:
    ticks: list[float] = []
    clock = VirtualClock()
    await Sweeper(ticks.append, 1.0, clock).close()
    await clock.advance(3)
    assert ticks == []

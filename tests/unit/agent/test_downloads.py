"""The queue before the loader: priority, joining, bounds, leaving."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from serverlessllm.agent.downloads import Downloads
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import StoreUnavailable, TooManyRequests
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.arrivals import OnArriving
from serverlessllm.loader.progress import Report
from serverlessllm.loader.service import Loader
from serverlessllm.testing.clock import VirtualClock


class Gated:
    """Loads that end when they are told to, in the order they began."""

    def __init__(self) -> None:
        self.running: dict[str, list[asyncio.Future[str]]] = {}
        self.begun: list[str] = []

    async def load(
        self,
        ref: CheckpointRef,
        level: CacheLevel,
        report: Report | None,
        on_arriving: OnArriving | None,
    ) -> str:
        gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running.setdefault(ref.id, []).append(gate)
        self.begun.append(ref.id)
        return await gate

    async def finish(self, name: str) -> None:
        for gate in self.running.pop(name):
            gate.set_result(name)
        for _ in range(5):
            await asyncio.sleep(0)


class Bench:
    def __init__(self, **settings: int) -> None:
        self.loader = Gated()
        self.downloads = Downloads(
            cast("Loader", self.loader),
            AgentSettings(**{"loads_max": 1, **settings}),  # type: ignore[arg-type]  # counts only
            VirtualClock(),
        )

    async def ask(self, name: str, *, urgent: bool = True) -> asyncio.Task[object]:
        ref = CheckpointRef(id=CheckpointId(name), prefix=name, size_bytes=1)
        task: asyncio.Task[object] = asyncio.ensure_future(
            self.downloads.load(ref, CacheLevel.DRAM, None, urgent=urgent)
        )
        for _ in range(3):
            await asyncio.sleep(0)
        return task


async def test_requests_go_before_prefetches_and_each_in_order() -> None:
    bench = Bench()
    tasks = [
        await bench.ask("a"),
        await bench.ask("p1", urgent=False),
        await bench.ask("p2", urgent=False),
        await bench.ask("b"),
        await bench.ask("c"),
    ]
    assert bench.downloads.queued == 4
    for name in ("a", "b", "c", "p1", "p2"):
        assert list(bench.loader.running) == [name]
        await bench.loader.finish(name)
    await asyncio.gather(*tasks)


async def test_who_wants_what_moves_already_joins_it() -> None:
    bench = Bench()
    first, other = await bench.ask("a"), await bench.ask("b")
    joined = await bench.ask("a")
    assert bench.loader.begun == ["a", "a"]
    waiting = await bench.ask("b", urgent=False)
    await bench.loader.finish("a")
    assert bench.loader.begun == ["a", "a", "b", "b"]
    await bench.loader.finish("b")
    await asyncio.gather(first, other, joined, waiting)


async def test_the_queue_is_bounded() -> None:
    bench = Bench(loads_queued_max=1)
    running, waiting = await bench.ask("a"), await bench.ask("b")
    with pytest.raises(TooManyRequests):
        await (await bench.ask("c"))
    for task in (running, waiting):
        task.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)


async def test_who_leaves_holds_nobody_up() -> None:
    bench = Bench()
    first, second, third = [await bench.ask(name) for name in "abc"]
    second.cancel()
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    await asyncio.sleep(0)
    assert bench.loader.begun == ["a", "c"]
    await bench.loader.finish("c")
    await third


async def test_leaving_with_the_turn_just_given_passes_it_on() -> None:
    bench = Bench()
    first, second, third = [await bench.ask(name) for name in "abc"]
    bench.loader.running.pop("a")[0].set_result("a")
    while not first.done():
        await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    for _ in range(3):
        await asyncio.sleep(0)
    assert bench.loader.begun[-1] == "c"
    await bench.loader.finish("c")
    await third


async def test_a_load_that_fails_gives_its_turn_back() -> None:
    bench = Bench()
    first, second = await bench.ask("a"), await bench.ask("b")
    bench.loader.running["a"][0].set_exception(StoreUnavailable("away"))
    with pytest.raises(StoreUnavailable):
        await first
    await asyncio.sleep(0)
    await bench.loader.finish("b")
    await second

"""Who begins before a load's end: what is announced is there, in order, and its end is known."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CorruptChunk, StoreUnavailable
from serverlessllm.loader.arrivals import Arriving
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.testing.stores import GatedStore
from serverlessllm.testing.waiting import eventually

DRAM, NVME = CacheLevel.DRAM, CacheLevel.NVME
CHUNKS = 6


class Follower:
    """Reads every chunk when it is told of it, through a descriptor of its own."""

    def __init__(self) -> None:
        self.arriving: Arriving
        self.read: dict[int, bytes] = {}
        self.announced = asyncio.Event()
        self.times = 0

    def __call__(self, arriving: Arriving) -> None:
        self.times += 1
        self.arriving = arriving
        self.fd = arriving.open()
        self.size_at_first = os.fstat(self.fd).st_size
        arriving.follow(self.look)
        self.look()
        self.announced.set()

    def look(self) -> None:
        for number in self.arriving.numbers[len(self.read) :]:
            offset, size = self.arriving.index.chunk_range(number)
            self.read[number] = os.pread(self.fd, size, offset)

    @property
    def numbers(self) -> list[int]:
        return list(self.read)

    @property
    def data(self) -> bytes:
        return b"".join(self.read[number] for number in sorted(self.read))

    def close(self) -> None:
        if self.times:
            os.close(self.fd)


@pytest.fixture
def follower():
    follower = Follower()
    yield follower
    follower.close()


@pytest.fixture
def gated(bench):
    bench.store = GatedStore(bench.store_dir)
    return bench


@pytest.fixture
def gate(monkeypatch):
    """Reads of the nvme tier at or beyond an offset wait for the event."""
    opened = threading.Event()
    honest = DirectFile.read_into

    def read_into(self, view, offset, size):
        if offset >= 2 * 65_536 and "nvme" in str(self.path):
            assert opened.wait(20)
        honest(self, view, offset, size)

    monkeypatch.setattr(DirectFile, "read_into", read_into)
    yield opened
    opened.set()


async def test_from_the_store_the_first_chunks_are_there_before_the_last(
    gated, make_sample, follower
):
    sample = await gated.publish(make_sample("a"))
    gated.store.let(2 * 65_536)
    async with gated.loader() as loader:
        load = asyncio.ensure_future(loader.load(sample.ref, DRAM, None, follower))
        await eventually(lambda: len(follower.read) == 2)
        assert follower.data == sample.data[: 2 * 65_536]
        assert follower.size_at_first >= len(sample.data)
        assert follower.arriving.index_bytes == sample.index
        assert follower.arriving.bin_path == gated.dram(sample)
        assert not follower.arriving.ended
        gated.store.let()
        async with await load as resident:
            assert follower.data == sample.data == resident.bin_path.read_bytes()
            assert follower.arriving.whole
            assert os.pread(follower.fd, len(sample.data) + 1, 0) == sample.data
            (hop,) = [hop for hop in resident.hops if hop.bytes_moved]
            assert 0 < hop.first_s < hop.seconds
    assert follower.times == 1


async def test_from_nvme_as_well(bench, make_sample, follower, gate):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, NVME)).release()
        load = asyncio.ensure_future(loader.load(sample.ref, DRAM, None, follower))
        await eventually(lambda: sorted(follower.numbers) == [0, 1])
        assert follower.data == sample.data[: 2 * 65_536]
        gate.set()
        async with await load:
            assert follower.data == sample.data
            assert follower.arriving.whole


async def test_one_worker_brings_them_in_execution_order(bench, make_sample, follower):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader(copy_threads=1) as loader:
        (await loader.load(sample.ref, NVME)).release()
        async with await loader.load(sample.ref, DRAM, None, follower):
            assert follower.numbers == list(range(CHUNKS))


async def test_who_joins_late_finds_all_that_came_before(gated, make_sample, follower):
    sample = await gated.publish(make_sample("a"))
    gated.store.let(3 * 65_536)
    first = Follower()
    async with gated.loader() as loader:
        loads = [asyncio.ensure_future(loader.load(sample.ref, DRAM, None, first))]
        await eventually(lambda: len(first.read) == 3)
        loads.append(asyncio.ensure_future(loader.load(sample.ref, DRAM, None, follower)))
        await follower.announced.wait()
        assert follower.read == first.read
        gated.store.let()
        for resident in await asyncio.gather(*loads):
            resident.release()
        assert follower.data == first.data == sample.data
        third = Follower()
        (await loader.load(sample.ref, DRAM, None, third)).release()
        assert third.times == 0  # it is whole
    first.close()


async def test_a_corrupt_chunk_is_told_of_once_it_is_mended(bench, make_sample, follower, flip):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, NVME)).release()
        flip(bench.nvme(sample), 65_536 + 10)
        bench.store.open.clear()
        load = asyncio.ensure_future(loader.load(sample.ref, DRAM, None, follower))
        await eventually(lambda: sorted(follower.numbers) == [0, 2, 3, 4, 5])
        bench.store.open.set()
        async with await load:
            assert follower.numbers[-1] == 1
            assert follower.data == sample.data


async def test_a_load_that_fails_ends_it_and_leaves_nothing(gated, make_sample, follower):
    sample = await gated.publish(make_sample("a"))
    gated.store.let(65_536)
    async with gated.loader() as loader:
        load = asyncio.ensure_future(loader.load(sample.ref, DRAM, None, follower))
        await eventually(lambda: len(follower.read) == 1)
        gated.store.fail(StoreUnavailable("the store has gone"))
        with pytest.raises(StoreUnavailable):
            await load
        assert (follower.arriving.ended, follower.arriving.whole) == (True, False)
        assert gated.leftovers() == []
        gated.store.let()
        again = Follower()
        async with await loader.load(sample.ref, DRAM, None, again):
            assert again.data == sample.data
        again.close()


async def test_corrupt_bytes_are_never_told_of(bench, make_sample, follower, flip):
    sample = await bench.publish(make_sample("a"))
    flip(bench.store_dir / sample.ref.prefix / "model.bin", 4 * 65_536 + 1)
    async with bench.loader() as loader:
        with pytest.raises(CorruptChunk):
            await loader.load(sample.ref, DRAM, None, follower)
        assert 4 not in follower.read
        for number, data in follower.read.items():
            assert data == sample.data[number * 65_536 : (number + 1) * 65_536]


async def test_the_last_caller_to_leave_ends_it(gated, make_sample, follower):
    sample = await gated.publish(make_sample("a"))
    gated.store.let(65_536)
    stays = Follower()
    async with gated.loader() as loader:
        loads = [
            asyncio.ensure_future(loader.load(sample.ref, DRAM, None, each))
            for each in (follower, stays)
        ]
        await eventually(lambda: len(stays.read) == 1)
        loads[0].cancel()
        await asyncio.wait(loads[:1])
        assert not stays.arriving.ended
        loads[1].cancel()
        await asyncio.wait(loads)
        assert (stays.arriving.ended, stays.arriving.whole) == (True, False)
        assert gated.leftovers() == []
    stays.close()


async def test_the_loaders_end_ends_it(gated, make_sample, follower):
    sample = await gated.publish(make_sample("a"))
    gated.store.let(65_536)
    async with gated.loader() as loader:
        load = asyncio.ensure_future(loader.load(sample.ref, DRAM, None, follower))
        await eventually(lambda: len(follower.read) == 1)
    assert (follower.arriving.ended, follower.arriving.whole) == (True, False)
    assert gated.leftovers() == []
    await asyncio.gather(load, return_exceptions=True)


async def test_what_another_process_fills_is_awaited_and_not_announced(
    bench, make_sample, follower
):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader, bench.child(sample) as child:
        assert await child.stdout.readline() == b"reading\n"
        load = asyncio.ensure_future(loader.load(sample.ref, DRAM, None, follower))
        child.stdin.write(b"\n")
        async with await load as resident:
            assert resident.bin_path.read_bytes() == sample.data
    assert follower.times == 0


async def test_a_load_that_waits_for_room_is_announced_once(bench, make_sample, follower):
    """The copy of the first that is written behind holds all of the DRAM tier for a moment."""
    a, b = [await bench.publish(make_sample(name)) for name in "ab"]
    async with bench.loader(dram_budget_bytes=len(a.data)) as loader:
        (await loader.load(a.ref, DRAM)).release()
        async with await loader.load(b.ref, DRAM, None, follower):
            assert follower.times == 1
            assert follower.data == b.data

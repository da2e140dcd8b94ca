"""Weights on devices: from nvme and DRAM through a ring, shared, evicted, given up; on devices that
carry out every copy as late as they may."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest

from serverlessllm.checkpoint.index import Tensor, checkpoint_id, decode_index, encode_index
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CorruptChunk, Draining, LoadFailed, OutOfSpace
from serverlessllm.loader.service import Loader
from serverlessllm.testing.accelerator import LateAccelerator, LateEvent
from serverlessllm.testing.waiting import eventually

DEVICE, DRAM, NVME, STORE = CacheLevel.DEVICE, CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.STORE
ROOM = 400_000
"""Of a device: for one sample, not for two."""


@contextlib.asynccontextmanager
async def loader_on(
    bench, accelerator: LateAccelerator, **changes: object
) -> AsyncIterator[Loader]:
    changes = {"device_budget_bytes": ROOM, **changes}
    settings = msgspec.structs.replace(bench.settings, **changes)
    loader = Loader(
        settings,
        store=bench.store,
        clock=bench.clock,
        data_dir=bench.root,
        accelerator=accelerator,
    )
    try:
        await loader.start()
        await loader.settled()
        yield loader
    finally:
        await loader.close()
        assert accelerator.allocated == []
        assert accelerator.ring is None


def on_devices(accelerator: LateAccelerator) -> bytes:
    return b"".join(memory.data for memory in accelerator.allocated)


async def bring_to_nvme(loader: Loader, sample) -> None:
    (await loader.load(sample.ref, NVME)).release()
    await loader.settled()


@pytest.mark.parametrize("size", [1, 65_535, 65_537, 340_025])
async def test_from_nvme_without_a_copy_in_dram(bench, make_sample, size):
    sample = await bench.publish(make_sample("a", size))
    accelerator = LateAccelerator({0: ROOM})
    async with loader_on(bench, accelerator) as loader:
        await bring_to_nvme(loader, sample)
        async with await loader.load(sample.ref, DEVICE) as resident:
            assert on_devices(accelerator) == sample.data
            assert [(hop.hop, hop.bytes_moved) for hop in resident.hops] == [("nvme→device", size)]
            assert resident.level is NVME
        assert list(bench.dram_dir.iterdir()) == []


async def test_from_the_store_by_dram_then_from_dram(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    accelerator = LateAccelerator({0: ROOM})
    async with loader_on(bench, accelerator) as loader:
        async with await loader.load(sample.ref, DEVICE) as resident:
            hops = [hop.hop for hop in resident.hops]
            assert hops == ["store→dram", "dram→device"]
            assert on_devices(accelerator) == sample.data
        async with await loader.load(sample.ref, DEVICE) as resident:
            assert [hop.bytes_moved for hop in resident.hops] == []  # they are still there
        assert await loader.evict(sample.ref.id, DRAM) == len(sample.data)
        assert accelerator.allocated == []
        async with await loader.load(sample.ref, DEVICE) as resident:
            assert [hop.hop for hop in resident.hops] == ["dram→device"]
            assert on_devices(accelerator) == sample.data
    assert bench.store.bytes_read == len(sample.data)


async def test_blocks_are_not_used_again_before_they_are_copied(bench, make_sample):
    """More chunks than the ring has blocks, and a device that does nothing at first."""
    sample = await bench.publish(make_sample("a", 20 * 65_536))
    accelerator = LateAccelerator({0: 2_000_000})
    changes = {
        "copy_threads": 2,
        "device_budget_bytes": 2_000_000,
        "dram_budget_bytes": 2_000_000,
        "nvme_budget_bytes": 2_000_000,
    }
    async with loader_on(bench, accelerator, **changes) as loader:
        await bring_to_nvme(loader, sample)
        accelerator.gate.clear()
        accelerator.waited.clear()
        load = asyncio.create_task(loader.load(sample.ref, DEVICE))
        await asyncio.to_thread(accelerator.waited.wait, 60)
        (memory,) = accelerator.allocated
        assert len(memory._asked) <= 4  # no more than there are blocks
        assert not load.done()
        accelerator.gate.set()
        async with await load:
            assert on_devices(accelerator) == sample.data


async def test_an_engine_begins_on_its_first_layer_while_others_come(bench, make_sample):
    sample = await bench.publish(make_sample("a", 20 * 65_536))
    accelerator = LateAccelerator({0: 2_000_000})
    budgets = ("device_budget_bytes", "dram_budget_bytes", "nvme_budget_bytes")
    changes = {"copy_threads": 2, **dict.fromkeys(budgets, 2_000_000)}
    async with loader_on(bench, accelerator, **changes) as loader:
        await bring_to_nvme(loader, sample)
        assert loader.on_device(sample.ref.id) is None
        accelerator.gate.clear()
        accelerator.waited.clear()
        load = asyncio.create_task(loader.load(sample.ref, DEVICE))
        await asyncio.to_thread(accelerator.waited.wait, 60)
        weights = loader.on_device(sample.ref.id)
        assert weights is not None
        stream: list[LateEvent] = []
        await asyncio.to_thread(weights.follow, 0, 65_536, stream)
        assert not load.done()
        accelerator.gate.set()
        await asyncio.to_thread(stream[0].wait)
        assert accelerator.allocated[0].data[:65_536] == sample.data[:65_536]
        (await load).release()


async def test_a_flipped_bit_on_nvme_is_fetched_again_and_mended(
    bench, make_sample, flip, corrupt_count
):
    sample = await bench.publish(make_sample("a"))
    accelerator = LateAccelerator({0: ROOM})
    async with loader_on(bench, accelerator) as loader:
        await bring_to_nvme(loader, sample)
        flip(bench.nvme(sample), 65_536 * 2 + 5)
        before = corrupt_count("nvme→device")
        async with await loader.load(sample.ref, DEVICE) as resident:
            assert on_devices(accelerator) == sample.data
            moved = {hop.hop: hop.bytes_moved for hop in resident.hops}
            assert moved == {"nvme→device": len(sample.data), "store→device": 65_536}
        assert corrupt_count("nvme→device") == before + 1
        assert bench.nvme(sample).read_bytes() == sample.data


async def test_a_chunk_that_the_store_lost_too_fails_the_load_and_frees_the_device(
    bench, make_sample, flip
):
    sample = await bench.publish(make_sample("a"))
    accelerator = LateAccelerator({0: ROOM})
    async with loader_on(bench, accelerator) as loader:
        await bring_to_nvme(loader, sample)
        flip(bench.nvme(sample), 5)
        flip(next(bench.store_dir.rglob("model.bin")), 5)
        with pytest.raises(CorruptChunk):
            await loader.load(sample.ref, DEVICE)
        assert accelerator.allocated == []


async def test_callers_share_one_copy_and_the_last_to_leave_ends_it(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    accelerator = LateAccelerator({0: ROOM})
    async with loader_on(bench, accelerator) as loader:
        await bring_to_nvme(loader, sample)
        accelerator.gate.clear()
        accelerator.waited.clear()
        first, second, third = [
            asyncio.create_task(loader.load(sample.ref, DEVICE)) for _ in range(3)
        ]
        await asyncio.to_thread(accelerator.waited.wait, 60)
        first.cancel()
        accelerator.gate.set()
        residents = await asyncio.gather(second, third)
        assert len(accelerator.allocated) == 1
        assert on_devices(accelerator) == sample.data
        for resident in residents:
            assert await loader.evict(sample.ref.id, NVME) == 0
            resident.release()
        await loader.evict(sample.ref.id, NVME)
        assert accelerator.allocated == []

        accelerator.gate.clear()
        accelerator.waited.clear()
        load = asyncio.create_task(loader.load(sample.ref, DEVICE))
        await asyncio.to_thread(accelerator.waited.wait, 60)
        load.cancel()
        accelerator.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await load
        await eventually(lambda: accelerator.allocated == [])
        async with await loader.load(sample.ref, DEVICE):
            assert on_devices(accelerator) == sample.data


async def test_the_least_recently_used_makes_room_and_what_is_used_stays(bench, make_sample):
    a, b, c = [await bench.publish(make_sample(name)) for name in "abc"]
    accelerator = LateAccelerator({0: 800_000})
    async with loader_on(bench, accelerator, device_budget_bytes=800_000) as loader:
        for sample in (a, b, a):
            (await loader.load(sample.ref, DEVICE)).release()
        (await loader.load(c.ref, DEVICE)).release()
        assert {bytes(memory.data) for memory in accelerator.allocated} == {a.data, c.data}
        async with await loader.load(a.ref, DEVICE), await loader.load(c.ref, DEVICE):
            with pytest.raises(OutOfSpace, match="device_budget_bytes"):
                await loader.load(b.ref, DEVICE)
        async with await loader.load(b.ref, DEVICE):
            assert b.data in {bytes(memory.data) for memory in accelerator.allocated}


async def test_a_device_that_is_fuller_than_it_said(bench, make_sample, monkeypatch):
    sample = await bench.publish(make_sample("a"))
    accelerator = LateAccelerator({0: ROOM})
    async with loader_on(bench, accelerator) as loader:
        monkeypatch.setattr(accelerator, "totals", {0: 1000})
        monkeypatch.setattr(accelerator, "free_bytes", lambda: {0: ROOM})
        allocate = accelerator.allocate

        def refuse(device: int, size_bytes: int):
            raise OutOfSpace("GPU 0 is full")

        monkeypatch.setattr(accelerator, "allocate", refuse)
        with pytest.raises(OutOfSpace, match="GPU 0"):
            await loader.load(sample.ref, DEVICE)
        monkeypatch.setattr(accelerator, "allocate", allocate)
        async with await loader.load(sample.ref, DEVICE):
            assert on_devices(accelerator) == sample.data


async def test_layers_over_two_devices(bench, make_sample):
    sample = make_sample("a")
    index = decode_index(sample.index)
    size = len(sample.data)
    cut = 200_000 // 64 * 64
    tensors = tuple(
        Tensor(
            name=f"model.layers.{number}.weight",
            dtype="U8",
            shape=(end - start,),
            offset=start,
            size_bytes=end - start,
        )
        for number, (start, end) in enumerate([(0, cut), (cut, size)])
    )
    data = encode_index(msgspec.structs.replace(index, tensors=tensors))
    ref = msgspec.structs.replace(sample.ref, id=checkpoint_id(data))
    sample = await bench.publish(msgspec.structs.replace(sample, index=data, ref=ref))
    accelerator = LateAccelerator({0: 250_000, 1: 250_000})
    async with (
        loader_on(bench, accelerator) as loader,
        await loader.load(sample.ref, DEVICE) as resident,
    ):
        assert [len(memory.data) for memory in accelerator.allocated] == [cut, size - cut]
        assert on_devices(accelerator) == sample.data
        assert resident.device is not None
        assert [p.offset for p in resident.device.weights.handle().parts] == [0, cut]


async def test_closing_ends_what_loads(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    accelerator = LateAccelerator({0: ROOM})
    async with loader_on(bench, accelerator) as loader:
        await bring_to_nvme(loader, sample)
        accelerator.gate.clear()
        accelerator.waited.clear()
        load = asyncio.create_task(loader.load(sample.ref, DEVICE))
        await asyncio.to_thread(accelerator.waited.wait, 60)
        closing = asyncio.create_task(loader.close())
        accelerator.gate.set()
        with pytest.raises(Draining):
            await load
        await closing
    assert bench.leftovers() == []


@pytest.mark.parametrize("level", [DRAM, NVME])
async def test_a_file_that_is_cut_while_it_is_loaded(bench, make_sample, level):
    """What nvme lost comes from the store; what DRAM lost fails the load."""
    sample = await bench.publish(make_sample("a", 20 * 65_536))
    budgets = ("device_budget_bytes", "dram_budget_bytes", "nvme_budget_bytes")
    changes = {"copy_threads": 2, **dict.fromkeys(budgets, 2_000_000)}
    accelerator = LateAccelerator({0: 2_000_000})
    async with (
        loader_on(bench, accelerator, **changes) as loader,
        await loader.load(sample.ref, level) as resident,
    ):
        await loader.settled()
        accelerator.gate.clear()
        accelerator.waited.clear()
        load = asyncio.create_task(loader.load(sample.ref, DEVICE))
        await asyncio.to_thread(accelerator.waited.wait, 60)
        resident.bin_path.chmod(0o600)
        with resident.bin_path.open("r+b") as file:
            file.truncate(600_000)
        accelerator.gate.set()
        if level is NVME:
            async with await load:
                assert on_devices(accelerator) == sample.data
        else:
            with pytest.raises(LoadFailed, match="see its disk"):
                await load
            assert accelerator.allocated == []

"""Several callers, several processes: one copy, one set of bytes moved, fair cancellation."""

from __future__ import annotations

import asyncio
import functools
import threading

import msgspec
import pytest

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CheckpointError, Draining, LoadFailed
from serverlessllm.loader.progress import QUEUE, LoadProgress
from serverlessllm.loader.service import Loader
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.waiting import eventually

DRAM, NVME, DEVICE, STORE = CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.DEVICE, CacheLevel.STORE


class NotedClock(SystemClock):
    """Tells when somebody has gone to sleep."""

    def __init__(self) -> None:
        self.asleep = asyncio.Event()

    async def sleep(self, delay_s: float) -> None:
        self.asleep.set()
        await super().sleep(delay_s)


def when_queued(queued: asyncio.Event, progress: LoadProgress) -> None:
    if progress.hop == QUEUE:
        queued.set()


async def test_callers_at_once_share_one_copy_and_hold_it_each(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        residents = await asyncio.gather(*(loader.load(sample.ref, DEVICE) for _ in range(20)))
        await loader.settled()
        assert bench.store.bytes_read == len(sample.data)
        for resident in residents:
            assert await loader.evict(sample.ref.id, NVME) == 0
            assert resident.hops[0].bytes_moved == len(sample.data)
            resident.release()
            resident.release()
        assert await loader.evict(sample.ref.id, NVME) == len(sample.data)


async def test_who_gives_up_waiting_for_another_process_leaves_nothing_behind(bench, make_sample):
    clock = bench.clock = NotedClock()
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader, bench.child(sample) as child:
        await eventually(bench.dram(sample).with_suffix(".partial").exists)

        async def give_up() -> tuple[int, frozenset[str]]:
            clock.asleep.clear()
            load = asyncio.create_task(loader.load(sample.ref, DRAM))
            await clock.asleep.wait()
            load.cancel()
            await asyncio.wait((load,))
            return threading.active_count(), open_descriptors()

        threads, descriptors = await give_up()
        for _ in range(24):  # the loader's own threads, some eight, come when they are needed
            now, open_now = await give_up()
            assert open_now <= descriptors
        assert now <= threads + 12
        child.kill()
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data


async def test_callers_at_once_share_one_error(bench, make_sample):
    sample = make_sample("a")  # not published
    async with bench.loader() as loader:
        calls = (loader.load(sample.ref, DRAM) for _ in range(5))
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, CheckpointError) for error in errors)
        await bench.publish(sample)
        (await loader.load(sample.ref, DRAM)).release()


async def test_a_nearer_load_follows_a_prefetch(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        bench.store.open.clear()
        prefetch = asyncio.create_task(loader.load(sample.ref, NVME))
        await bench.store.reading.wait()
        load = asyncio.create_task(loader.load(sample.ref, DRAM))
        bench.store.open.set()
        far, near = await asyncio.gather(prefetch, load)
        assert (far.level, near.level) == (NVME, DRAM)
        assert [hop.hop for hop in near.hops] == ["nvme→dram"]
        assert bench.store.bytes_read == len(sample.data)
        far.release()
        near.release()


async def test_a_caller_that_leaves_does_not_end_the_load_of_others(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        bench.store.open.clear()
        first = asyncio.create_task(loader.load(sample.ref, DRAM))
        await bench.store.reading.wait()
        seen: list[LoadProgress] = []
        second = asyncio.create_task(loader.load(sample.ref, DRAM, seen.append))
        await asyncio.sleep(0)
        assert [progress.hop for progress in seen] == ["store→dram"]  # told at once where it is
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        bench.store.open.set()
        async with await second as resident:
            assert resident.bin_path.read_bytes() == sample.data
    assert bench.store.bytes_read == len(sample.data)


@pytest.mark.parametrize("level", [DRAM, NVME])
async def test_the_last_caller_to_leave_ends_the_load(bench, make_sample, level):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        bench.store.open.clear()
        calls = [asyncio.create_task(loader.load(sample.ref, level)) for _ in range(3)]
        await bench.store.reading.wait()
        assert bench.leftovers() == [f"{sample.ref.id}.partial"]
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert bench.leftovers() == []
        assert loader.usage()[0].used_bytes == loader.usage()[1].used_bytes == 0
        bench.store.open.set()
        async with await loader.load(sample.ref, level) as resident:
            assert resident.bin_path.read_bytes() == sample.data


async def test_a_caller_that_comes_while_the_load_is_being_given_up(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        bench.store.open.clear()
        first = asyncio.create_task(loader.load(sample.ref, DRAM))
        await bench.store.reading.wait()
        first.cancel()
        await asyncio.sleep(0)
        second = asyncio.create_task(loader.load(sample.ref, DRAM))
        bench.store.open.set()
        async with await second as resident:
            assert resident.bin_path.read_bytes() == sample.data


@pytest.mark.parametrize("steps", range(0, 60, 3))
async def test_cancelled_at_any_point_nothing_stays(bench, make_sample, steps):
    """Cancel after so many turns of the event loop, from nvme: threads are at work then."""
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, NVME)).release()
        load = asyncio.create_task(loader.load(sample.ref, DRAM))
        for _ in range(steps):
            await asyncio.sleep(0)
        load.cancel()
        await asyncio.wait((load,))
        if not load.cancelled():
            load.result().release()
        assert bench.leftovers() == []
        assert await loader.evict(sample.ref.id, STORE) in {
            len(sample.data),
            2 * len(sample.data),
        }
        assert loader.usage()[0].used_bytes == 0  # so no reference stayed either


async def test_close_ends_loads_with_an_error_and_leaves_nothing(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        bench.store.open.clear()
        load = asyncio.create_task(loader.load(sample.ref, DRAM))
        await bench.store.reading.wait()
        await loader.close()
        with pytest.raises(Draining):
            await load
        assert bench.leftovers() == []


async def test_two_processes_one_copy(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader, bench.child(sample) as child:
        assert await child.stdout.readline() == b"reading\n"
        waiting = asyncio.Event()
        queued = functools.partial(when_queued, waiting)
        load = asyncio.create_task(loader.load(sample.ref, DRAM, queued))
        await waiting.wait()
        child.stdin.write(b"go on\n")
        async with await load as resident:
            assert resident.bin_path.read_bytes() == sample.data
            assert resident.hops == ()
        assert await child.stdout.readline() == b"loaded\n"
        assert bench.store.bytes_read == 0
        # The other process holds it still.
        assert await loader.evict(sample.ref.id, NVME) == 0
        child.stdin.close()
        await child.wait()
        assert child.returncode == 0
        assert await loader.evict(sample.ref.id, NVME) == len(sample.data)


async def test_the_one_that_waits_takes_over_when_the_other_is_killed(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader, bench.child(sample, ranges_before_wait=3) as child:
        assert await child.stdout.readline() == b"reading\n"
        waiting = asyncio.Event()
        queued = functools.partial(when_queued, waiting)
        load = asyncio.create_task(loader.load(sample.ref, DRAM, queued))
        await waiting.wait()
        child.kill()
        async with await load as resident:
            assert resident.bin_path.read_bytes() == sample.data
        await loader.settled()
    assert bench.leftovers() == []


async def test_waiting_for_another_process_has_a_bound_and_can_be_cancelled(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    clock = VirtualClock()
    settings = msgspec.structs.replace(bench.settings, peer_wait_s_max=30.0)
    loader = Loader(settings, store=bench.store, clock=clock, data_dir=bench.root)
    await loader.start()
    await loader.settled()
    async with bench.child(sample) as child:
        assert await child.stdout.readline() == b"reading\n"
        for bounded in (True, False):
            waiting = asyncio.Event()
            queued = functools.partial(when_queued, waiting)
            load = asyncio.create_task(loader.load(sample.ref, DRAM, queued))
            await waiting.wait()
            while not clock.sleepers:
                await asyncio.sleep(0)
            if bounded:
                await clock.advance(31.0)
                with pytest.raises(LoadFailed, match="another process"):
                    await load
            else:
                load.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await load
    await loader.close()


async def test_two_loaders_of_one_machine_respect_each_others_references(bench, make_sample):
    a, b = [await bench.publish(make_sample(name)) for name in "ab"]
    bench.settings = msgspec.structs.replace(bench.settings, dram_budget_bytes=len(a.data))
    other = Loader(bench.settings, store=bench.store, clock=SystemClock(), data_dir=bench.root)
    async with bench.loader() as loader:
        await other.start()
        await other.settled()
        resident = await other.load(a.ref, DRAM)
        await other.settled()
        with pytest.raises(Exception, match="in use or pinned"):
            await loader.load(b.ref, DRAM)
        resident.release()
        (await loader.load(b.ref, DRAM)).release()
        await other.pin(b.ref.id)
        with pytest.raises(Exception, match="in use or pinned"):
            await loader.load(a.ref, DRAM)
        await other.close()  # gives its pins back
        (await loader.load(a.ref, DRAM)).release()


async def test_close_right_after_a_load_leaves_no_half_written_copy(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    for turns in range(0, 40, 4):
        async with bench.starting() as loader:
            load = asyncio.create_task(loader.load(sample.ref, DRAM))
            for _ in range(turns):
                await asyncio.sleep(0)
            await loader.close()
            await asyncio.wait((load,))
            if load.exception() is None:
                load.result().release()
            else:
                assert isinstance(load.exception(), Draining)
        assert bench.leftovers() == []

"""A checkpoint's way through the tiers: cold, warm, after a restart, evicted, pinned."""

from __future__ import annotations

import asyncio
import re
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CheckpointError, Draining, LoadFailed, OutOfSpace
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.progress import LoadProgress

DRAM, NVME, DEVICE, STORE = CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.DEVICE, CacheLevel.STORE


def moved(resident) -> dict[str, int]:
    return {hop.hop: hop.bytes_moved for hop in resident.hops}


async def test_cold_from_the_store_then_warm_from_dram(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    size = len(sample.data)
    async with bench.loader() as loader:
        async with await loader.load(sample.ref, DEVICE) as cold:
            assert cold.bin_path.read_bytes() == sample.data
            assert cold.index_path.read_bytes() == sample.index
            assert (cold.level, cold.checkpoint) == (DRAM, sample.ref.id)
            assert moved(cold) == {"store→dram": size, "dram→device": 0}
            assert cold.index.size_bytes == size
        async with await loader.load(sample.ref, DEVICE) as warm:
            assert moved(warm) == {"dram→device": 0}
        await loader.settled()
        assert bench.nvme(sample).read_bytes() == sample.data
        assert loader.residency() == {sample.ref.id: DRAM}
    assert bench.store.bytes_read == size
    assert bench.leftovers() == []


async def test_from_nvme_after_dram_was_dropped(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, DRAM)).release()
        assert await loader.evict(sample.ref.id, NVME) == len(sample.data)
        assert loader.residency() == {sample.ref.id: NVME}
        async with await loader.load(sample.ref, DRAM) as resident:
            assert moved(resident) == {"nvme→dram": len(sample.data)}
            assert resident.bin_path.read_bytes() == sample.data
    assert bench.store.bytes_read == len(sample.data)


async def test_prefetch_to_nvme_only(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        async with await loader.load(sample.ref, NVME) as resident:
            assert resident.bin_path == bench.nvme(sample)
            assert resident.bin_path.read_bytes() == sample.data
            assert moved(resident) == {"store→nvme": len(sample.data)}
        assert list(bench.dram_dir.iterdir()) == []
        async with await loader.load(sample.ref, DRAM) as resident:
            assert moved(resident) == {"nvme→dram": len(sample.data)}
        # The nearer copy is as good.
        async with await loader.load(sample.ref, NVME) as resident:
            assert (resident.level, moved(resident)) == (DRAM, {})


@pytest.mark.parametrize("nvme_budget_bytes", [0, 100_000])
async def test_without_room_on_nvme_the_store_feeds_dram(bench, make_sample, nvme_budget_bytes):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader(nvme_budget_bytes=nvme_budget_bytes) as loader:
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data
        await loader.settled()
        assert not bench.nvme(sample).exists()
        await loader.evict(sample.ref.id, STORE)
        with pytest.raises(OutOfSpace, match="nvme_budget_bytes"):
            await loader.load(sample.ref, NVME)


@pytest.mark.parametrize("size", [1, 4095, 4096, 65_536, 65_537])
async def test_sizes_that_no_page_ends_at(bench, make_sample, size):
    sample = await bench.publish(make_sample("odd", size))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, DRAM)).release()
        await loader.settled()
        assert bench.nvme(sample).read_bytes() == sample.data
        await loader.evict(sample.ref.id, NVME)
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data
        await loader.evict(sample.ref.id, STORE)
        async with await loader.load(sample.ref, NVME) as resident:
            assert resident.bin_path.read_bytes() == sample.data


async def test_a_restart_keeps_what_verifies(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, DRAM)).release()
        await loader.settled()
    async with bench.loader() as loader:
        assert loader.residency() == {sample.ref.id: DRAM}
        async with await loader.load(sample.ref, DRAM) as resident:
            assert moved(resident) == {}
    assert bench.store.bytes_read == len(sample.data)


def read_bytes_of_this_process() -> int:
    """Bytes that this process made a disk read."""
    match = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


async def test_resident_in_dram_reads_nothing_from_disk(bench, make_sample):
    sample = await bench.publish(make_sample("a", 4 * 1024 * 1024, 1024 * 1024))
    async with bench.loader(dram_budget_bytes=1 << 24, nvme_budget_bytes=1 << 24) as loader:
        (await loader.load(sample.ref, DRAM)).release()
        await loader.evict(sample.ref.id, NVME)
        before = read_bytes_of_this_process()
        (await loader.load(sample.ref, DRAM)).release()
        assert read_bytes_of_this_process() - before >= len(sample.data)  # past the page cache
        before = read_bytes_of_this_process()
        for _ in range(3):
            async with await loader.load(sample.ref, DEVICE) as resident:
                assert resident.bin_path.read_bytes() == sample.data
        assert read_bytes_of_this_process() == before


MAP = """
import mmap, re, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapping[::4096])
print("mapped", flush=True)
sys.stdin.readline()
smaps = open("/proc/self/smaps").read()
part = smaps[smaps.index(sys.argv[1]):].split("VmFlags")[0]
print(*(re.search(rf"^{name}: +(\\d+) kB", part, re.M)[1] for name in sys.argv[2:]))
"""


async def test_processes_that_map_it_share_the_memory(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader, await loader.load(sample.ref, DEVICE) as resident:
        command = [sys.executable, "-c", MAP, str(resident.bin_path), "Rss", "Pss", "Private_Dirty"]
        engines = [
            await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
            for _ in range(2)
        ]
        for engine in engines:
            assert engine.stdout is not None
            assert await engine.stdout.readline() == b"mapped\n"
        answer, _ = await engines[0].communicate(b"\n")
        rss, pss, private = map(int, answer.split())
        assert rss * 1024 >= len(sample.data)
        assert private == 0
        assert pss <= rss * 0.6  # the other has it mapped too: each counts half
        await engines[1].communicate(b"\n")


async def test_least_recently_used_goes_first_and_what_is_held_stays(bench, make_sample):
    samples = [await bench.publish(make_sample(name)) for name in "abcdef"]
    a, b, c, d, e, f = samples
    async with bench.loader() as loader:  # DRAM takes four
        held = await loader.load(a.ref, DRAM)
        for sample in (b, c, d):
            (await loader.load(sample.ref, DRAM)).release()
        (await loader.load(b.ref, DRAM)).release()
        await loader.settled()
        (await loader.load(e.ref, DRAM)).release()
        in_dram = {id_ for id_, level in loader.residency().items() if level is DRAM}
        assert in_dram == {x.ref.id for x in (a, b, d, e)}
        await loader.pin(d.ref.id)
        await loader.settled()
        (await loader.load(f.ref, DRAM)).release()
        in_dram = {id_ for id_, level in loader.residency().items() if level is DRAM}
        assert in_dram == {x.ref.id for x in (a, d, e, f)}
        dram, _ = loader.usage()
        assert (dram.used_bytes, dram.pinned_bytes) == (4 * len(a.data), 2 * len(a.data))
        held.release()
        assert loader.usage()[0].pinned_bytes == len(a.data)


async def test_no_room_when_all_is_held(bench, make_sample):
    a, b = [await bench.publish(make_sample(name)) for name in "ab"]
    async with bench.loader(dram_budget_bytes=len(a.data) + 10) as loader:
        async with await loader.load(a.ref, DRAM):
            await loader.settled()
            with pytest.raises(OutOfSpace, match="in use or pinned"):
                await loader.load(b.ref, DRAM)
            assert bench.leftovers() == []
            assert loader.residency()[a.ref.id] is DRAM
        async with await loader.load(b.ref, DRAM):
            assert loader.residency() == {a.ref.id: NVME, b.ref.id: DRAM}


async def test_back_to_back_loads_wait_for_the_copy_written_behind(bench, make_sample):
    a, b = [await bench.publish(make_sample(name)) for name in "ab"]
    async with bench.loader(dram_budget_bytes=len(a.data)) as loader:
        (await loader.load(a.ref, DRAM)).release()
        (await loader.load(b.ref, DRAM)).release()
        assert loader.residency()[a.ref.id] is NVME


async def test_larger_than_the_budget_names_the_setting(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader(dram_budget_bytes=len(sample.data) - 1) as loader:
        with pytest.raises(OutOfSpace, match=r"loader\.dram_budget_bytes"):
            await loader.load(sample.ref, DRAM)
    assert bench.store.bytes_read == 0
    assert bench.leftovers() == []


async def test_evict_spares_what_is_held_and_pins_last_until_unpinned(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    size = len(sample.data)
    async with bench.loader() as loader:
        await loader.pin(sample.ref.id)  # before it is there
        async with await loader.load(sample.ref, DRAM):
            await loader.settled()
            assert await loader.evict(sample.ref.id, STORE) == 0
        assert await loader.evict(sample.ref.id, STORE) == 0
        assert loader.usage()[0].pinned_bytes == loader.usage()[1].pinned_bytes == size
        await loader.unpin(sample.ref.id)
        await loader.unpin(sample.ref.id)
        assert await loader.evict(sample.ref.id, DRAM) == 0
        assert await loader.evict(sample.ref.id, STORE) == 2 * size
        assert loader.residency() == {}
        assert list(bench.dram_dir.iterdir()) == []


async def test_a_smaller_budget_is_met_at_start(bench, make_sample):
    samples = [await bench.publish(make_sample(name)) for name in "abc"]
    async with bench.loader() as loader:
        for sample in samples:
            (await loader.load(sample.ref, DRAM)).release()
    async with bench.loader(dram_budget_bytes=len(samples[0].data)) as loader:
        assert loader.usage()[0].used_bytes == len(samples[0].data)
        assert loader.residency()[samples[-1].ref.id] is DRAM


async def test_bandwidth_and_limits_are_reported(bench, make_sample):
    sample = await bench.publish(make_sample("a", 3 * 1024 * 1024, 1024 * 1024))
    async with bench.loader(dram_budget_bytes=1 << 24, nvme_budget_bytes=1 << 24) as loader:
        assert loader.bandwidth()["nvme→dram"] == 1e9  # the limit, until there is better
        async with await loader.load(sample.ref, DEVICE) as resident:
            assert {hop.hop: hop.limit_bytes_s for hop in resident.hops} == {
                "store→dram": 1e9,
                "dram→device": 1e10,
            }
        await loader.evict(sample.ref.id, NVME)
        (await loader.load(sample.ref, DRAM)).release()
        assert loader.bandwidth()["nvme→dram"] not in {0, 1e9}


async def test_an_index_that_is_not_the_registered_one(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    other = make_sample("b").ref
    ref = CheckpointRef(id=other.id, prefix=sample.ref.prefix, size_bytes=other.size_bytes)
    async with bench.loader() as loader:
        with pytest.raises(CheckpointError, match="not the one that was registered"):
            await loader.load(ref, DRAM)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            await loader.load(CheckpointRef(id=other.id, prefix="b/r1", size_bytes=1), DRAM)
        with pytest.raises(ValueError, match="target"):
            await loader.load(sample.ref, STORE)
    with pytest.raises(Draining):
        await loader.load(sample.ref, DRAM)
    assert bench.leftovers() == []


async def test_progress_counts_up_to_the_whole(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    seen: list[LoadProgress] = []
    async with bench.loader() as loader:
        (await loader.load(sample.ref, DRAM, seen.append)).release()
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, len(sample.data))
    assert {(p.hop, p.bytes_total) for p in seen} == {("store→dram", len(sample.data))}
    assert seen[-1].eta_s == 0


async def test_the_directory_of_somebody_else_is_refused(bench):
    target = bench.root / "elsewhere"
    target.mkdir()
    bench.dram_dir.rmdir()
    bench.dram_dir.symlink_to(target)
    with pytest.raises(LoadFailed, match="dram_dir"):
        async with bench.loader():
            pass
    bench.dram_dir.unlink()


async def test_the_directories_are_private(bench):
    bench.dram_dir.chmod(0o755)
    async with bench.loader():
        assert bench.dram_dir.stat().st_mode & 0o777 == 0o700
        assert bench.nvme_dir.stat().st_mode & 0o777 == 0o700

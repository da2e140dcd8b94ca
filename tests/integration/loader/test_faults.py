"""Rotten bits, full disks, killed processes: never a wrong byte, never a leftover."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CorruptChunk, LoadFailed, OutOfSpace

DRAM, NVME, STORE = CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.STORE


async def load_and_drop_dram(loader, sample) -> None:
    (await loader.load(sample.ref, DRAM)).release()
    await loader.settled()
    await loader.evict(sample.ref.id, NVME)


@pytest.mark.parametrize("offset", [0, 65_536 * 3 + 7, -1])
async def test_a_flipped_bit_on_nvme_is_fetched_again_and_mended(
    bench, make_sample, flip, corrupt_count, offset
):
    sample = await bench.publish(make_sample("a"))
    size = len(sample.data)
    async with bench.loader() as loader:
        await load_and_drop_dram(loader, sample)
        flip(bench.nvme(sample), offset % size)
        before, read_before = corrupt_count("nvme→dram"), bench.store.bytes_read
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data
            chunk = min(65_536, size - offset % size // 65_536 * 65_536)
            moved = {hop.hop: hop.bytes_moved for hop in resident.hops}
            assert moved == {"nvme→dram": size, "store→dram": chunk}
        assert bench.store.bytes_read - read_before == chunk
        assert corrupt_count("nvme→dram") == before + 1
        assert bench.nvme(sample).read_bytes() == sample.data


async def test_a_flipped_bit_in_a_dram_leftover_is_not_adopted(
    bench, make_sample, flip, corrupt_count
):
    good, bad = [await bench.publish(make_sample(name)) for name in ("good", "bad")]
    async with bench.loader() as loader:
        for sample in (good, bad):
            (await loader.load(sample.ref, DRAM)).release()
        await loader.settled()
    flip(bench.dram(bad), 65_536 * 2)
    before = corrupt_count("dram")
    async with bench.loader() as loader:
        assert loader.residency() == {good.ref.id: DRAM, bad.ref.id: NVME}
        assert corrupt_count("dram") == before + 1
        async with await loader.load(bad.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == bad.data


async def test_a_load_waits_for_the_check_of_its_leftover(bench, make_sample, flip):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, DRAM)).release()
    flip(bench.dram(sample), 5)
    async with bench.starting() as loader:
        assert sample.ref.id not in loader.residency()
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data


@pytest.mark.parametrize("damage", ["truncated", "longer", "no index", "other index", "cut index"])
async def test_leftovers_that_are_not_whole_are_removed(bench, make_sample, damage):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, DRAM)).release()
        await loader.settled()
    for path in (bench.dram(sample), bench.nvme(sample)):
        path.chmod(0o600)
        index = path.with_suffix(".idx")
        match damage:
            case "truncated":
                os.truncate(path, len(sample.data) - 1)
            case "longer":
                os.truncate(path, len(sample.data) + 1)
            case "no index":
                index.unlink()
            case "other index":
                index.write_bytes(make_sample("b").index)
            case "cut index":
                index.write_bytes(sample.index[:-100])
    async with bench.loader() as loader:
        assert loader.residency() == {}
        assert list(bench.dram_dir.iterdir()) == []
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data


async def test_damage_while_running_is_found_by_the_next_load(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        await load_and_drop_dram(loader, sample)
        os.truncate(bench.nvme(sample), 1000)
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data
            assert [hop.hop for hop in resident.hops] == ["store→dram"]


async def test_a_copy_that_cannot_be_opened_where_it_is_wanted_fails_the_load(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        with socket.socket(socket.AF_UNIX) as unreadable:  # a file that cannot be opened
            unreadable.bind(str(bench.dram(sample)))
        async with asyncio.timeout(60):
            with pytest.raises(LoadFailed, match="tier of the agent failed"):
                await loader.load(sample.ref, DRAM)
        bench.dram(sample).unlink()
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data


async def test_a_copy_that_cannot_be_opened_farther_away_is_passed_over(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    bench.nvme(sample).symlink_to(bench.nvme(sample))
    async with bench.loader() as loader, await loader.load(sample.ref, DRAM) as resident:
        assert resident.bin_path.read_bytes() == sample.data


async def test_strangers_in_the_directories_are_left_alone(bench, make_sample):
    names = ["notes.txt", "x.bin", "00.partial"]
    for name in names:
        (bench.dram_dir / name).write_text("mine")
    dead = [f"{'0' * 64}.partial", f"{'1' * 64}.idx"]
    for name in dead:
        (bench.dram_dir / name).write_text("what a killed process left")
    async with bench.loader() as loader:
        assert loader.residency() == {}
    assert sorted(path.name for path in bench.dram_dir.iterdir()) == sorted(names)


async def test_a_corrupt_store_is_never_served(bench, make_sample, flip, corrupt_count):
    sample = await bench.publish(make_sample("a"))
    flip(bench.store_dir / sample.ref.prefix / "model.bin", 65_536 + 1)
    before = corrupt_count("store→dram")
    async with bench.loader() as loader:
        with pytest.raises(CorruptChunk, match=r"chunk 1 .*'w'.*sllm rm.*sllm pull"):
            await loader.load(sample.ref, DRAM)
        assert corrupt_count("store→dram") == before + bench.settings.chunk_tries_max
        assert loader.residency() == {}
        assert bench.leftovers() == []
        assert loader.usage()[0].used_bytes == 0


async def test_bits_that_flip_on_the_wire_are_fetched_again(bench, make_sample, monkeypatch):
    sample = await bench.publish(make_sample("a"))
    honest = bench.store.read_range
    lies = iter([True, False, True])

    async def sometimes(prefix: str, offset: int, size: int) -> memoryview:
        data = bytearray(await honest(prefix, offset, size))
        if offset == 65_536 and next(lies, False):
            data[0] ^= 1
        return memoryview(data)

    monkeypatch.setattr(bench.store, "read_range", sometimes)
    async with bench.loader() as loader, await loader.load(sample.ref, DRAM) as resident:
        assert resident.bin_path.read_bytes() == sample.data


@pytest.mark.parametrize("level", [DRAM, NVME])
@pytest.mark.parametrize("ranges_before_wait", [0, 5])
async def test_after_kill_9_in_mid_load_the_next_load_is_clean(
    bench, make_sample, level, ranges_before_wait
):
    sample = await bench.publish(make_sample("a"))
    async with bench.child(sample, level, ranges_before_wait) as child:
        assert await child.stdout.readline() == b"reading\n"
        assert bench.leftovers() == [f"{sample.ref.id}.partial"]
        child.send_signal(signal.SIGKILL)
        await child.wait()
        # A loader that runs already is not hindered…
    async with bench.loader() as loader:
        assert bench.leftovers() == []  # …and one that starts tidies up
        async with await loader.load(sample.ref, level) as resident:
            assert resident.bin_path.read_bytes() == sample.data
        await loader.settled()
    assert bench.leftovers() == []


async def test_what_a_killed_process_reserved_does_not_count(bench, make_sample):
    a, b = [await bench.publish(make_sample(name)) for name in "ab"]
    bench.settings = msgspec.structs.replace(bench.settings, dram_budget_bytes=len(a.data) + 4096)
    async with bench.loader() as loader:
        async with bench.child(a) as child:
            assert await child.stdout.readline() == b"reading\n"
            with pytest.raises(OutOfSpace):
                await loader.load(b.ref, DRAM)
            child.kill()
            await child.wait()
        async with await loader.load(b.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == b.data
    assert bench.leftovers() == []


@contextlib.contextmanager
def small_file_system(path: Path, size_bytes: int) -> Iterator[None]:
    """A tmpfs of that size at `path`; without the right to mount, a limit of file sizes."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", str(path)]
    if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        return
    with file_size_limit(size_bytes):
        yield


@contextlib.contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_dram_file_system_that_is_too_small(bench, make_sample):
    small = await bench.publish(make_sample("small", 50_000))
    large = await bench.publish(make_sample("large"))
    with small_file_system(bench.dram_dir, 200_704):
        async with bench.loader() as loader:
            with pytest.raises(OutOfSpace):
                await loader.load(large.ref, DRAM)
            assert list(bench.dram_dir.iterdir()) == []
            async with await loader.load(small.ref, DRAM) as resident:
                assert resident.bin_path.read_bytes() == small.data


@pytest.mark.parametrize("level", [DRAM, NVME])
async def test_a_disk_that_fills_up_while_loading(bench, make_sample, level):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        bench.store.open.clear()
        full = pytest.raises(OutOfSpace, match=rf"the {level.tier} tier is full")
        with file_size_limit(100_000), full:
            await loader.load(sample.ref, level)
        assert bench.leftovers() == []
        bench.store.open.set()
        async with await loader.load(sample.ref, level) as resident:
            assert resident.bin_path.read_bytes() == sample.data


async def test_a_failing_copy_behind_fails_nobody(bench, make_sample):
    a, b = [await bench.publish(make_sample(name)) for name in "ab"]
    async with bench.loader() as loader:
        bench.nvme_dir.rename(bench.root / "unplugged")
        bench.nvme_dir.write_text("not a directory")
        async with await loader.load(a.ref, DRAM) as resident:
            await loader.settled()
            assert resident.bin_path.read_bytes() == a.data
        with pytest.raises(LoadFailed):
            await loader.load(b.ref, NVME)
        bench.nvme_dir.unlink()
        (await loader.load(b.ref, NVME)).release()


async def test_a_directory_that_was_cleaned_away_is_made_again(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, DRAM)).release()
        await loader.settled()
        shutil.rmtree(bench.dram_dir)
        assert loader.residency() == {sample.ref.id: NVME}
        assert loader.usage()[0].used_bytes == 0
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data


async def test_a_disk_that_fills_up_behind_a_load(bench, make_sample):
    """The error's traceback still sees the mapping that is being given back."""
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader, await loader.load(sample.ref, DRAM) as resident:
        with file_size_limit(100_000):
            await loader.settled()
        assert resident.bin_path.read_bytes() == sample.data
        assert bench.leftovers() == []

"""Past the page cache, or through it where the file system insists; never a copy left in it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.loader.budget import PAGE_BYTES

DRAM, NVME, STORE = CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.STORE
SIZES = [1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 340_025]


def cached_pages(path: Path) -> int:
    """Of the file, in the page cache now (mincore)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)  # writable: has an address
    pages = (ctypes.c_ubyte * -(-size // PAGE_BYTES))()
    first = ctypes.c_char.from_buffer(mapping)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert libc.mincore(ctypes.addressof(first), size, pages) == 0
    del first
    mapping.close()
    return sum(page & 1 for page in pages)


async def round_trip(bench, loader, sample) -> None:
    """Store → DRAM, behind it to nvme, and from there to DRAM again."""
    (await loader.load(sample.ref, DRAM)).release()
    await loader.settled()
    assert bench.nvme(sample).read_bytes() == sample.data
    await loader.evict(sample.ref.id, NVME)
    async with await loader.load(sample.ref, DRAM) as resident:
        assert [hop.hop for hop in resident.hops] == ["nvme→dram"]
        assert resident.bin_path.read_bytes() == sample.data


async def test_a_load_leaves_nothing_in_the_page_cache(bench, make_sample):
    sample = await bench.publish(make_sample("a", 2_000_001))
    budgets = {"dram_budget_bytes": 1 << 22, "nvme_budget_bytes": 1 << 22}
    async with bench.loader(**budgets) as loader:
        async with await loader.load(sample.ref, NVME) as resident:
            path = resident.bin_path
            before = cached_pages(path)
        (await loader.load(sample.ref, DRAM)).release()
        assert cached_pages(path) <= before  # all of it where the disk itself is memory
        if before < 400:
            assert before <= 1  # the last page is written through the cache


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("refused", ["when opened", "when used"])
async def test_file_systems_that_refuse_direct_io(bench, make_sample, monkeypatch, size, refused):
    honest_open, honest_read, honest_write = os.open, os.preadv, os.pwrite
    direct: set[int] = set()

    def open_(path, flags: int, mode: int = 0o777, **others) -> int:
        if flags & os.O_DIRECT and refused == "when opened":
            raise OSError(errno.EINVAL, "refused")
        fd = honest_open(path, flags, mode, **others)
        direct.discard(fd)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def refuse(fd: int) -> None:
        if fd in direct:
            raise OSError(errno.EINVAL, "refused")

    def preadv(fd: int, views, offset: int) -> int:
        refuse(fd)
        return honest_read(fd, views, offset)

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        refuse(fd)
        return honest_write(fd, view, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pwrite", pwrite)
    bench.store.is_near = True
    sample = await bench.publish(make_sample("a", size))
    async with bench.loader() as loader:
        direct.clear()  # descriptors of others, by now
        await round_trip(bench, loader, sample)
    assert bench.leftovers() == []


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory on a tmpfs, which takes direct I/O or refuses it as its kernel pleases."""
    path = Path(tempfile.mkdtemp(prefix="sllm-test-nvme-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("size", SIZES)
async def test_an_nvme_tier_on_a_tmpfs(bench, make_sample, in_memory, size):
    bench.nvme_dir = in_memory
    sample = await bench.publish(make_sample("a", size))
    async with bench.loader(nvme_dir=str(in_memory)) as loader:
        await round_trip(bench, loader, sample)


async def test_a_file_that_is_cut_while_it_is_read(bench, make_sample, corrupt_count, monkeypatch):
    """What is missing comes from the store, and is put back."""
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        (await loader.load(sample.ref, NVME)).release()
        find = loader._bringer._find

        def then_cut(*args):  # once its size has been seen
            if found := find(*args):
                os.truncate(found.held.path, 100_000)
            return found

        monkeypatch.setattr(loader._bringer, "_find", then_cut)
        before = corrupt_count("nvme→dram")
        async with await loader.load(sample.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == sample.data
        assert corrupt_count("nvme→dram") == before + 5  # all but the first chunk
        assert bench.nvme(sample).read_bytes() == sample.data


async def test_loads_reuse_the_memory_of_what_they_evict(bench, make_sample):
    a, b = [await bench.publish(make_sample(name)) for name in "ab"]
    async with bench.loader(dram_budget_bytes=len(a.data) + 5000) as loader:
        (await loader.load(a.ref, DRAM)).release()
        await loader.settled()
        inode = bench.dram(a).stat().st_ino
        async with await loader.load(b.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == b.data
            assert resident.bin_path.stat().st_ino == inode
            await loader.settled()
            assert bench.nvme(b).read_bytes() == b.data
        async with await loader.load(a.ref, DRAM) as resident:
            assert resident.bin_path.read_bytes() == a.data
        assert loader.residency() == {a.ref.id: DRAM, b.ref.id: NVME}
    assert bench.leftovers() == []


async def test_a_second_process_maps_what_is_there(bench, make_sample):
    """Nothing moves: not a byte is read, and the file is the same."""
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader, await loader.load(sample.ref, DRAM) as resident:
        await loader.settled()
        ranges, status = len(bench.store.ranges), resident.bin_path.stat()
        async with bench.child(sample) as child:
            assert child.stdout is not None
            assert await child.stdout.readline() == b"loaded\n"  # and not `reading`
        assert len(bench.store.ranges) == ranges
        after = resident.bin_path.stat()
        assert (after.st_ino, after.st_blocks) == (status.st_ino, status.st_blocks)

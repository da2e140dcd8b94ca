"""A store that is a folder of this machine: read as the disk it is, and doubted like any store."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CheckpointError, CorruptChunk

DRAM, NVME, STORE = CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.STORE


@pytest.fixture
async def near(bench):
    bench.store.is_near = True
    return bench


def bin_of(near, sample):
    return near.store_dir / sample.ref.prefix / "model.bin"


@pytest.mark.parametrize("level", [DRAM, NVME])
@pytest.mark.parametrize("size", [1, 4095, 4097, 65_535, 65_537, 340_025])
async def test_bytes_come_past_the_store_s_client(near, make_sample, level, size):
    sample = await near.publish(make_sample("a", size))
    async with near.loader() as loader, await loader.load(sample.ref, level) as resident:
        assert resident.bin_path.read_bytes() == sample.data
        assert [hop.bytes_moved for hop in resident.hops] == [size]
        await loader.settled()
    assert near.store.ranges == []
    assert near.leftovers() == []


@pytest.mark.parametrize("level", [DRAM, NVME])
async def test_a_corrupt_store_is_never_served(near, make_sample, flip, corrupt_count, level):
    sample = await near.publish(make_sample("a"))
    flip(bin_of(near, sample), 65_536 + 7)
    hop = f"store→{level.tier}"
    before = corrupt_count(hop)
    async with near.loader() as loader:
        with pytest.raises(CorruptChunk, match="chunk 1 "):
            await loader.load(sample.ref, level)
        assert corrupt_count(hop) == before + 1 + loader._bringer._settings.chunk_tries_max
        assert loader.residency() == {}
    assert near.leftovers() == []


async def test_a_bit_that_flips_in_memory_is_read_again(near, make_sample, monkeypatch):
    """The disk's copy is good, the first read of it was not."""
    sample = await near.publish(make_sample("a"))
    honest = os.preadv
    lied: list[int] = []

    def preadv(fd: int, views, offset: int, *flags: int) -> int:
        count = honest(fd, views, offset, *flags)
        if offset == 2 * 65_536 and not lied:
            views[0][9] ^= 1
            lied.append(offset)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    async with near.loader() as loader, await loader.load(sample.ref, DRAM) as resident:
        assert resident.bin_path.read_bytes() == sample.data
    assert lied
    assert near.store.bytes_read == 65_536  # of the one chunk, by the client


async def test_a_file_that_was_replaced_by_another_size(near, make_sample):
    sample = await near.publish(make_sample("a"))
    bin_of(near, sample).write_bytes(sample.data[:100_000])
    async with near.loader() as loader:
        with pytest.raises(CheckpointError, match="truncated"):
            await loader.load(sample.ref, DRAM)
    assert near.leftovers() == []


async def test_the_same_bytes_in_another_file_are_as_good(near, make_sample, monkeypatch):
    """Published again while it is read: each chunk is known by its digest, not by its file."""
    sample = await near.publish(make_sample("a"))
    path = bin_of(near, sample)
    opened: list[Path] = []
    honest = os.open

    def open_(name, flags: int, *rest, **others) -> int:
        if name == path and flags & os.O_DIRECT:
            opened.append(name)
            new = path.with_suffix(f".{threading.get_ident()}")
            new.write_bytes(sample.data)
            new.replace(path)
        return honest(name, flags, *rest, **others)

    monkeypatch.setattr(os, "open", open_)
    async with near.loader() as loader, await loader.load(sample.ref, DRAM) as resident:
        assert resident.bin_path.read_bytes() == sample.data
    assert len(opened) == 6
    assert near.store.ranges == []


async def test_a_file_that_is_gone_is_named_by_the_store(near, make_sample):
    sample = await near.publish(make_sample("a"))
    bin_of(near, sample).unlink()
    async with near.loader() as loader:
        with pytest.raises(CheckpointError, match="no checkpoint"):
            await loader.load(sample.ref, DRAM)
    assert near.leftovers() == []

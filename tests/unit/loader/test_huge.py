"""Huge pages for what fills DRAM: asked for, never needed, and never over what is there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from crc32c import crc32c

from serverlessllm.loader.plan import ChunkRange
from serverlessllm.loader.pour import Crc32c, fill, write_parts
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.huge import HugePages
from serverlessllm.loader.tiers.staging import BLOCK_BYTES, Staging

CHUNK_BYTES = 2 * BLOCK_BYTES
SIZE_BYTES = 2 * CHUNK_BYTES + 5000
CHUNKS = [
    ChunkRange(number=n, offset=start, size_bytes=min(CHUNK_BYTES, SIZE_BYTES - start))
    for n, start in enumerate(range(0, SIZE_BYTES, CHUNK_BYTES))
]
DATA = os.urandom(SIZE_BYTES)


class Memory:
    """A source of `DATA` that may fail."""

    def __init__(self, fails_at: int = SIZE_BYTES) -> None:
        self.fails_at = fails_at

    def read_into(self, view: memoryview, offset: int, size: int) -> None:
        if offset >= self.fails_at:
            raise OSError(5, "a bad sector")
        view[:size] = DATA[offset : offset + size]


@pytest.fixture(params=["tmpfs", "disk"])
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """An empty file of `SIZE_BYTES`, where there are huge pages and where there are none."""
    folder = "/dev/shm" if request.param == "tmpfs" else str(tmp_path)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.ftruncate(file.fileno(), SIZE_BYTES)
        yield file.fileno()


def test_every_chunk_is_filled_whichever_way_it_goes(fd: int) -> None:
    dram = DramFile(fd, SIZE_BYTES, filling=True)
    for chunk in CHUNKS:
        end = chunk.offset + chunk.size_bytes
        check = Crc32c(crc32c(DATA[chunk.offset : end]))
        assert fill(Memory(), dram, chunk, check, Staging(1))
    dram.close()
    assert os.pread(fd, SIZE_BYTES, 0) == DATA


def test_a_chunk_that_fails_is_written_again_from_elsewhere(fd: int) -> None:
    dram = DramFile(fd, SIZE_BYTES, filling=True)
    chunk, end = CHUNKS[0], CHUNK_BYTES
    assert not fill(Memory(), dram, chunk, Crc32c(0), Staging(1))
    assert not fill(Memory(BLOCK_BYTES), dram, CHUNKS[1], Crc32c(0), Staging(1))
    write_parts(dram, chunk, [memoryview(DATA)[:1000], memoryview(DATA)[1000:end]])
    dram.close()
    assert os.pread(fd, end, 0) == DATA[:end]


def test_what_has_memory_is_left_as_it_is(fd: int) -> None:
    os.pwrite(fd, b"here", CHUNK_BYTES + 7)
    pages = HugePages(fd, SIZE_BYTES)
    assert pages.take(CHUNK_BYTES, CHUNK_BYTES) is None
    pages.close()
    assert os.pread(fd, 4, CHUNK_BYTES + 7) == b"here"


@pytest.mark.parametrize(
    ("offset", "size"),
    [(1, BLOCK_BYTES), (0, BLOCK_BYTES - 1), (2 * CHUNK_BYTES, 5000), (0, SIZE_BYTES)],
)
def test_pieces_of_extents_are_not_given(fd: int, offset: int, size: int) -> None:
    pages = HugePages(fd, SIZE_BYTES)
    assert pages.take(offset, size) is None
    pages.close()
    assert os.pread(fd, SIZE_BYTES, 0) == bytes(SIZE_BYTES)


def test_what_is_given_is_the_file(fd: int) -> None:
    pages = HugePages(fd, SIZE_BYTES)
    memory = pages.take(0, CHUNK_BYTES)
    if memory is not None:  # the kernel decides; a disk's files never are
        memory[:] = DATA[:CHUNK_BYTES]
        assert os.pread(fd, CHUNK_BYTES, 0) == DATA[:CHUNK_BYTES]
    assert pages.take(0, CHUNK_BYTES) is None or memory is None
    pages.close()
    assert pages.take(CHUNK_BYTES, CHUNK_BYTES) is None


def test_a_file_smaller_than_an_extent_has_none(fd: int) -> None:
    pages = HugePages(fd, 5000)
    assert pages.take(0, 4096) is None
    pages.close()

"""Passes over a file past the page cache: the disk's own limit, and what each thing that is done
to the bytes on their way adds to it."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import msgspec

from serverlessllm.core.units import MIB, format_size
from serverlessllm.loader.budget import whole_pages
from serverlessllm.loader.plan import ChunkRange
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.loader.workers import Threads, for_each

_SAMPLE_BYTES = 256 * MIB
"""Most of the file that one way is tried on."""
_STRIPE_BYTES = 16 * MIB
"""What a thread takes at once, to be read block by block."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A way to read a file."""

    threads: int
    block_bytes: int

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return f"{self.threads} thread{plural}, blocks of {format_size(self.block_bytes)}"


READINGS = tuple(
    Reading(threads=threads, block_bytes=block)
    for threads in (1, 2, 4, 8)
    for block in (MIB, 2 * MIB, 4 * MIB, 16 * MIB)
)


def stripes(size_bytes: int, stripe_bytes: int = _STRIPE_BYTES) -> tuple[ChunkRange, ...]:
    """`size_bytes` cut into equal parts, the last one shorter."""
    return tuple(
        ChunkRange(number=number, offset=offset, size_bytes=min(stripe_bytes, size_bytes - offset))
        for number, offset in enumerate(range(0, size_bytes, stripe_bytes))
    )


async def best_reading(path: Path, size_bytes: int) -> Reading:
    """The way that reads the first part of the file fastest, of two tries each."""
    sample = min(size_bytes, _SAMPLE_BYTES)
    seconds: dict[Reading, float] = {}
    for reading in (*READINGS, *READINGS):
        taken = await read_through(path, sample, reading)
        seconds[reading] = min(taken, seconds.get(reading, taken))
    return min(seconds, key=lambda reading: seconds[reading])


async def read_through(path: Path, size_bytes: int, reading: Reading) -> float:
    """Seconds to read so much of the file, into memory that is there before.

    Raises:
        OSError: the disk failed.
    """
    with contextlib.closing(DirectFile(path, os.O_RDONLY)) as file:
        block_bytes = min(reading.block_bytes, whole_pages(size_bytes))
        idle = [_filled_memory(block_bytes) for _ in range(reading.threads)]

        def read(part: ChunkRange) -> None:
            memory = idle.pop()
            for offset in range(part.offset, part.offset + part.size_bytes, len(memory)):
                size = min(len(memory), part.offset + part.size_bytes - offset)
                file.read_into(memory, offset, size)
            idle.append(memory)

        return await in_threads(stripes(size_bytes), reading.threads, read)


async def in_threads(
    parts: Sequence[ChunkRange], threads: int, work: Callable[[ChunkRange], object]
) -> float:
    """Seconds to do `work` on all parts, so many at once."""
    pool = Threads(threads, "trial")

    async def do(part: ChunkRange) -> None:
        await pool.run(work, part)

    try:
        started_s = perf_counter()
        await for_each(parts, threads, do)
        return perf_counter() - started_s
    finally:
        pool.close()


def _filled_memory(size_bytes: int) -> memoryview:
    """Page-aligned, in huge pages where the kernel gives them, there before the first read."""
    memory = mmap.mmap(-1, size_bytes)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memoryview(memory)

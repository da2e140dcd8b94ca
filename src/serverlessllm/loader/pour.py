"""A chunk's bytes from a source into a sink, in slices that are checked on the way."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

from blake3 import blake3
from crc32c import crc32c

from serverlessllm.loader.plan import ChunkRange
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.staging import BLOCK_BYTES, Copy, Staging


class Source(Protocol):
    """What a slice is read from."""

    def read_into(self, view: memoryview, offset: int, size: int) -> None:
        """Fill the first `size` bytes of `view`."""


class Sink(Protocol):
    """What a slice is written to."""

    def write(self, view: memoryview, offset: int) -> Copy | None:
        """Take all of `view`, at once or (a device) by the end of the copy."""


class Check(Protocol):
    """The digest of a chunk, fed slice by slice, and what it should be."""

    def update(self, part: memoryview) -> None:
        """The next slice."""

    def holds(self) -> bool:
        """Whether the slices were the chunk."""


class Crc32c:
    """Of bytes that move between tiers of one machine."""

    __slots__ = ("_expected", "_sum")

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._sum = 0

    def update(self, part: memoryview) -> None:
        self._sum = crc32c(part, self._sum)

    def holds(self) -> bool:
        return self._sum == self._expected


class Blake3:
    """Of bytes that come from a store. `expected`: hex digits."""

    __slots__ = ("_digest", "_expected")

    def __init__(self, expected: str) -> None:
        self._expected = expected
        self._digest = blake3()

    def update(self, part: memoryview) -> None:
        self._digest.update(part)

    def holds(self) -> bool:
        return self._digest.hexdigest() == self._expected


class Unchecked:
    """Of bytes that were checked where they lie."""

    __slots__ = ()

    def update(self, part: memoryview) -> None:
        """Nothing to know of it."""

    def holds(self) -> bool:
        return True


def pour(source: Source, sink: Sink, chunk: ChunkRange, check: Check, staging: Staging) -> bool:
    """Move a chunk in slices, each checked while the processor's cache has it; whether the source
    could be read and had what it should. The sink gets the slices before that is known.

    Raises:
        OutOfSpace: the sink is full.
        OSError: a failure that reading elsewhere will not mend.
    """
    end = chunk.offset + chunk.size_bytes
    for offset in range(chunk.offset, end, BLOCK_BYTES):
        size = min(BLOCK_BYTES, end - offset)
        with staging.block() as block:
            if not _read(source, block.memory, offset, size):
                return False
            part = block.memory[:size]
            check.update(part)
            block.busy_until(sink.write(part, offset))
    return check.holds()


def fill(source: Source, dram: DramFile, chunk: ChunkRange, check: Check, staging: Staging) -> bool:
    """`pour` into DRAM: straight into huge pages, if there are any for the chunk.

    Raises what `pour` does.
    """
    memory = dram.take(chunk)
    if memory is None:
        return pour(source, dram, chunk, check, staging)
    for start in range(0, chunk.size_bytes, BLOCK_BYTES):
        part = memory[start : start + BLOCK_BYTES]
        if not _read(source, part, chunk.offset + start, len(part)):
            return False
        check.update(part)
    return check.holds()


def _read(source: Source, view: memoryview, offset: int, size: int) -> bool:
    """Whether the source could be read."""
    try:
        source.read_into(view, offset, size)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False
    return True


def is_whole(dram: DramFile, chunk: ChunkRange, crc: int) -> bool:
    """Whether a chunk in DRAM is what it should be."""
    with dram.view(chunk) as view:
        return bool(crc32c(view) == crc)


def blake3_of(parts: Sequence[memoryview]) -> str:
    """BLAKE3 of a chunk that came in parts, as hex digits."""
    digest = blake3()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def write_parts(dram: DramFile, chunk: ChunkRange, parts: Sequence[memoryview]) -> None:
    """Write a chunk that came in parts, from where they lie."""
    dram.take(chunk)  # the write is faster where there is memory
    offset = chunk.offset
    for part in parts:
        dram.write(part, offset)
        offset += len(part)


def write_staged(
    sink: Sink, chunk: ChunkRange, parts: Sequence[memoryview], staging: Staging
) -> None:
    """Write a chunk from memory that the sink would refuse, through memory that it takes."""
    pour(Parts(chunk.offset, parts), sink, chunk, Unchecked(), staging)


class Parts:
    """A chunk that came in parts, as the source of its slices."""

    __slots__ = ("_offset", "_parts")

    def __init__(self, offset: int, parts: Sequence[memoryview]) -> None:
        self._offset = offset
        self._parts = parts

    def read_into(self, view: memoryview, offset: int, size: int) -> None:
        """Fill the first `size` bytes of `view`."""
        skip, done = offset - self._offset, 0
        for part in self._parts:
            piece = part[skip : skip + size - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
            skip = max(0, skip - len(part))

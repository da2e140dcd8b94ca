"""The DRAM tier's memory: a file of a tmpfs, mapped and shared by every process that maps it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.loader.budget import full_is_out_of_space
from serverlessllm.loader.plan import ChunkRange
from serverlessllm.loader.tiers.huge import HugePages


class DramFile:
    """A `.partial` to fill, or a `.bin` to read. The descriptor stays the caller's."""

    __slots__ = ("_fd", "_huge", "_map")

    def __init__(self, fd: int, size_bytes: int, *, filling: bool = False) -> None:
        """Raises OSError: EIO, the file is shorter than that."""
        self._fd = fd
        try:
            self._map = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except ValueError as error:
            raise OSError(errno.EIO, "the file is shorter than it should be") from error
        self._huge = HugePages(fd, size_bytes) if filling else None

    @contextlib.contextmanager
    def view(self, chunk: ChunkRange) -> Iterator[memoryview]:
        """The chunk's memory, read-only."""
        end = chunk.offset + chunk.size_bytes
        with memoryview(self._map) as whole, whole[chunk.offset : end] as part:
            yield part

    def read_into(self, view: memoryview, offset: int, size: int) -> None:
        """Fill the first `size` bytes of `view`: the kernel copies faster than a mapping whose
        pages this process has yet to touch, and does not hold the interpreter.

        Raises:
            OSError: EIO, the file ends too early.
        """
        done = 0
        while done < size:
            count = os.preadv(self._fd, [view[done:size]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than it should be")
            done += count

    def take(self, chunk: ChunkRange) -> memoryview | None:
        """The memory of a chunk that is about to be filled, in huge pages; None when there are
        none to be had, and `write` is the way."""
        return None if self._huge is None else self._huge.take(chunk.offset, chunk.size_bytes)

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view`: the file's own write neither clears the new pages first, as every
        way through a mapping does, nor holds the interpreter.

        Raises:
            OutOfSpace: the tmpfs, or the memory, is full.
        """
        done = 0
        with full_is_out_of_space(CacheLevel.DRAM):
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)

    def close(self) -> None:
        """Unmap. A view that an error's traceback still holds keeps the memory until it goes."""
        with contextlib.suppress(BufferError):
            self._map.close()
        if self._huge is not None:
            self._huge.close()

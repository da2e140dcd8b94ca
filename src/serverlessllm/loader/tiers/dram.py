"""The DRAM tier's memory: a file of a tmpfs, mapped and shared by every process that maps it."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.loader.budget import full_is_out_of_space, whole_pages
from serverlessllm.loader.plan import ChunkRange


class DramFile:
    """A `.partial` to fill, or a `.bin` to read. The descriptor stays the caller's."""

    __slots__ = ("_fd", "_map")

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        self._fd = fd
        length = whole_pages(size_bytes) if writable else size_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=protection)

    @contextlib.contextmanager
    def view(self, chunk: ChunkRange) -> Iterator[memoryview]:
        """The chunk's memory; of a file being filled, to the end of its last page."""
        end = min(chunk.offset + whole_pages(chunk.size_bytes), len(self._map))
        with memoryview(self._map) as whole, whole[chunk.offset : end] as part:
            yield part

    def allocate(self, chunk: ChunkRange) -> None:
        """Take the chunk's pages, so that a read into its memory cannot fail for want of them.

        By chunk, in the threads that read: it costs as much as half of the read itself.

        Raises:
            OutOfSpace: the tmpfs, or the memory, is full.
        """
        with full_is_out_of_space(CacheLevel.DRAM):
            os.posix_fallocate(self._fd, chunk.offset, whole_pages(chunk.size_bytes))

    def write(self, chunk: ChunkRange, parts: Iterable[memoryview]) -> None:
        """Write the chunk from `parts`, in order: the file's own write neither clears the new
        pages nor holds the interpreter, as a copy into the mapping would.

        Raises:
            OutOfSpace: the tmpfs, or the memory, is full.
        """
        offset = chunk.offset
        with full_is_out_of_space(CacheLevel.DRAM):
            for part in parts:
                done = 0
                while done < len(part):
                    done += os.pwrite(self._fd, part[done:], offset + done)
                offset += len(part)

    def close(self) -> None:
        """Unmap. A view that an error's traceback still holds keeps the memory until it goes."""
        with contextlib.suppress(BufferError):
            self._map.close()

"""The nvme tier's I/O: past the page cache where the file system allows it.

The bytes are wanted once, in the next tier: a page cache would hold a second copy of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.loader.budget import PAGE_BYTES, full_is_out_of_space, whole_pages

_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}


class DirectFile:
    """A file that is read and written at any offset from several threads at once.

    Offsets and the memory are page-aligned. What has to go through the page cache after all does
    not stay there.
    """

    __slots__ = ("_buffered_fd", "_fd", "path")

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self._buffered_fd = os.open(path, flags)
        try:
            self._fd = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSED:
                os.close(self._buffered_fd)
                raise
            self._fd = self._buffered_fd

    def read_into(self, view: memoryview, offset: int, size: int) -> None:
        """Fill the first `size` bytes of `view`, which reaches to the end of its last page.

        Raises:
            OSError: the disk failed, or (EIO) the file ends too early.
        """
        done = 0
        while done < size:
            window = view[done : whole_pages(size)]
            count = self._direct(_read, window, offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than it should be")
            done += count

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view`: whole pages directly, the rest of a last one, which must not make
        the file longer, through the page cache.

        Raises:
            OutOfSpace: the file system is full.
        """
        pages = len(view) // PAGE_BYTES * PAGE_BYTES
        done = 0
        with full_is_out_of_space(CacheLevel.NVME):
            while done < pages:
                done += self._direct(os.pwrite, view[done:pages], offset + done)
            while done < len(view):
                done += os.pwrite(self._buffered_fd, view[done:], offset + done)

    def close(self) -> None:
        """No call may be running."""
        os.close(self._buffered_fd)
        if self._fd != self._buffered_fd:
            os.close(self._fd)

    def _direct(
        self, call: Callable[[int, memoryview, int], int], view: memoryview, offset: int
    ) -> int:
        """`call`, through the page cache where direct I/O is refused, if only now."""
        try:
            if self._fd != self._buffered_fd:
                return call(self._fd, view, offset)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        count = call(self._buffered_fd, view, offset)
        os.posix_fadvise(self._buffered_fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count


def _read(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)

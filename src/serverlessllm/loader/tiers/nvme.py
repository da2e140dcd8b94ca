"""The nvme tier's I/O: past the page cache where the file system allows it.

The bytes are wanted once, in the next tier: a page cache would hold a second copy of them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.loader.budget import PAGE_BYTES, full_is_out_of_space, whole_pages

_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}


class DirectFile:
    """A file that is read and written at any offset from several threads at once.

    Offsets and the memory are page-aligned.
    """

    __slots__ = ("_fd",)

    def __init__(self, path: Path, flags: int) -> None:
        try:
            self._fd = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._fd = os.open(path, flags)

    def read_into(self, view: memoryview, offset: int, size: int) -> None:
        """Fill the first `size` bytes of `view`, which reaches to the end of its last page.

        Raises:
            OSError: the disk failed, or (EIO) the file ends too early.
        """
        done = 0
        while done < size:
            window = view[done : whole_pages(size)]
            try:
                count = os.preadv(self._fd, [window], offset + done)
            except OSError as error:
                self._without_direct(error)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than it should be")
            done += count

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view`; a last part of a page is padded with zeros to a whole one.

        Raises:
            OutOfSpace: the file system is full.
        """
        body = len(view) // PAGE_BYTES * PAGE_BYTES
        with full_is_out_of_space(CacheLevel.NVME):
            self._write_pages(view[:body], offset)
            if body < len(view):
                with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as padded:
                    page[: len(view) - body] = view[body:]
                    self._write_pages(padded, offset + body)

    def close(self) -> None:
        """No call may be running."""
        os.close(self._fd)

    def _write_pages(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:
                self._without_direct(error)

    def _without_direct(self, error: OSError) -> None:
        """Go on through the page cache if it was direct I/O that the file system refused."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        if error.errno not in _REFUSED or not flags & os.O_DIRECT:
            raise error
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)

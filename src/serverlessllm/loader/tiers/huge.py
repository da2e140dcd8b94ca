"""Huge pages for a file of a tmpfs whose mount gives none, extent by extent.

Nearly everywhere `/dev/shm` is mounted without them. `MADV_COLLAPSE` (Linux 6.1, madvise(2)) makes
one of an extent all the same: clearing it at once costs a third of 512 pages, direct reads go
straight into it, and whoever maps it later takes one fault where there were many. Where the kernel
will not, nothing changes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from serverlessllm.loader.tiers.staging import BLOCK_BYTES

_MADV_COLLAPSE = 25
_PROT_NONE = 0
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HugePages:
    """Of a file that is being filled. The descriptor stays the caller's."""

    __slots__ = ("_address", "_fd", "_length", "_memory", "_refused", "_reserved")

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._length = size_bytes // BLOCK_BYTES * BLOCK_BYTES
        self._reserved, self._address = _mapped(fd, self._length)
        self._refused = self._address == 0
        self._memory = memoryview(b"")
        if not self._refused:
            array = (ctypes.c_char * self._length).from_address(self._address)
            self._memory = memoryview(array).cast("B")

    def take(self, offset: int, size: int) -> memoryview | None:
        """The memory of a range that has none yet, in huge pages, to be filled. None when it has
        some, does not consist of whole extents, or there are no huge pages to be had."""
        end = offset + size
        ragged = offset % BLOCK_BYTES or end % BLOCK_BYTES or end > self._length
        if self._refused or ragged or not _is_hole(self._fd, offset, end):
            return None
        for extent in range(offset, end, BLOCK_BYTES):  # an extent without any page is refused
            try:
                os.pwrite(self._fd, b"\0", extent)
            except OSError:
                return None  # whoever fills the range will say that there is no room
        if _libc.madvise(self._address + offset, size, _MADV_COLLAPSE):
            # Too little memory in one piece just now passes; a kernel without it does not.
            self._refused = ctypes.get_errno() == errno.EINVAL
            return None
        return self._memory[offset:end]

    def close(self) -> None:
        """Unmap. Nobody may use what `take` gave."""
        self._memory = memoryview(b"")
        if self._reserved:
            _libc.munmap(self._reserved, self._length + BLOCK_BYTES)
            self._reserved = self._address = 0
        self._refused = True


def _mapped(fd: int, length: int) -> tuple[int, int]:
    """Address space, and in it the file on an extent's boundary; zeros if it cannot be had."""
    if not length:
        return 0, 0
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    reserved = _libc.mmap(None, length + BLOCK_BYTES, _PROT_NONE, private, -1, 0)
    if reserved == _FAILED:
        return 0, 0
    aligned = -(-reserved // BLOCK_BYTES) * BLOCK_BYTES
    shared, both = mmap.MAP_SHARED | _MAP_FIXED, mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(aligned, length, both, shared, fd, 0) != aligned:
        _libc.munmap(reserved, length + BLOCK_BYTES)
        return 0, 0
    return reserved, aligned


def _is_hole(fd: int, start: int, end: int) -> bool:
    """Whether no byte of the range has memory."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= end
    except OSError:  # ENXIO: none up to the file's end; a file system without holes: so be it
        return True

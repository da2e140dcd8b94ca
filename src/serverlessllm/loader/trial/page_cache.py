"""The kernel's cache of a file: emptied before a cold round, and looked at to be sure."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from serverlessllm.core.units import GIB

_PAGE_BYTES = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def forget(path: Path) -> None:
    """Drop the file from the page cache: no privilege is needed, and no other file suffers.

    Pages that some process maps stay: `cached_share` tells.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cached_share(path: Path) -> float | None:
    """Part of the file that the page cache holds, 0..1.

    None when the kernel keeps it to itself: it tells only who may write the file.
    """
    if not os.access(path, os.W_OK):
        return None
    size = path.stat().st_size
    if size == 0:
        return 0.0
    with path.open("rb") as file:
        counted = sum(
            _cached_pages(file.fileno(), offset, min(GIB, size - offset))
            for offset in range(0, size, GIB)
        )
    return counted / -(-size // _PAGE_BYTES)


def most(shares: Iterable[float | None]) -> float | None:
    """The largest; None when one of them is not known."""
    known = list(shares)
    return None if None in known else max(share or 0.0 for share in known)


def _cached_pages(fd: int, offset: int, size: int) -> int:
    pages = -(-size // _PAGE_BYTES)
    state = (ctypes.c_ubyte * pages)()
    # Private and writable, for an address; nothing is ever written to it.
    with contextlib.closing(mmap.mmap(fd, size, access=mmap.ACCESS_COPY, offset=offset)) as window:
        start = ctypes.c_char.from_buffer(window)
        failed = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), state)
        del start  # before the mapping can be closed
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    return sum(byte & 1 for byte in bytes(state))

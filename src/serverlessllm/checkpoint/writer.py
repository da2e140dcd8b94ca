"""Writing a `.bin`: streamed, two chunks of memory, resumable.

Reading chunk n+1, hashing chunk n and writing chunk n overlap; each releases the GIL. The file
is preallocated, so a full disk shows before the first byte and not after the last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from serverlessllm.checkpoint.digests import digest_chunk
from serverlessllm.checkpoint.journal import Journal
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.reader import first_bad_chunk, page_buffer
from serverlessllm.core.errors import CheckpointError, OutOfSpace
from serverlessllm.core.units import format_size

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_INDEX_BYTES_EACH = 512
"""Of the `.idx` and the journal for one tensor or chunk; generous."""


def write_bin(
    layout: Layout,
    path: Path,
    journal: Journal,
    *,
    chunk_bytes: int,
    on_chunk: Callable[[int, int, int], None],
) -> None:
    """Write the bytes of `layout` to `path`, going on where `journal` says and the disk agrees.

    `on_chunk(number, offset, size_bytes)` is called for every chunk, in order, also for those
    of an earlier run. On return the file is on the disk and the journal has all digests.

    Raises:
        OutOfSpace: the disk cannot hold it; says how much is needed.
        OSError: of the disk, while writing.
        SourceUnavailable, CheckpointError: of the source; what is written stays for a resume.
    """
    total = -(-layout.size_bytes // chunk_bytes)

    def chunk_range(number: int) -> tuple[int, int]:
        offset = number * chunk_bytes
        return offset, min(chunk_bytes, layout.size_bytes - offset)

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        _reserve(fd, layout, total)
        bad = first_bad_chunk(fd, journal.chunks, chunk_range, threads=2)
        if bad is not None:
            journal.keep(bad)
        done = len(journal.chunks)
        for number in range(done):
            on_chunk(number, *chunk_range(number))
        _write_rest(layout, fd, journal, range(done, total), chunk_range, on_chunk)
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def translating_disk_errors(needed_bytes: int) -> Iterator[None]:
    """Turn what the kernel says of a disk that is written to into the error tree's words."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise CheckpointError(f"cannot write the checkpoint: {error.strerror}") from error
        raise OutOfSpace(
            f"the disk cannot hold the checkpoint's {format_size(needed_bytes)} "
            f"({error.strerror}): free some space, or convert to another disk"
        ) from error


def _reserve(fd: int, layout: Layout, chunks: int) -> None:
    """Take all the space that the work will need, or none."""
    beside = _INDEX_BYTES_EACH * (len(layout.tensors) + len(layout.aliases) + 2 * chunks + 8)
    taken = os.fstat(fd).st_blocks * 512
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    needed = max(layout.size_bytes - taken, 0) + beside
    if needed > free:
        raise OutOfSpace(
            f"the checkpoint needs {format_size(needed)} and its disk has {format_size(free)} "
            "free: free some space, or convert to another disk"
        )
    os.posix_fallocate(fd, 0, layout.size_bytes)
    os.ftruncate(fd, layout.size_bytes)


def _write_rest(
    layout: Layout,
    fd: int,
    journal: Journal,
    numbers: range,
    chunk_range: Callable[[int], tuple[int, int]],
    on_chunk: Callable[[int, int, int], None],
) -> None:
    if not numbers:
        return
    buffers = [page_buffer(chunk_range(0)[1]) for _ in numbers[:2]]

    def read(number: int) -> memoryview:
        offset, size = chunk_range(number)
        view = buffers[number % len(buffers)][:size]
        layout.read_into(offset, view)
        return view

    with ThreadPoolExecutor(2, thread_name_prefix="convert") as pool:
        reading = pool.submit(read, numbers[0])
        for number in numbers:
            view = reading.result()
            if number + 1 in numbers:
                reading = pool.submit(read, number + 1)
            digesting = pool.submit(digest_chunk, view)
            offset, size = chunk_range(number)
            _write(fd, offset, view)
            journal.append(digesting.result())
            on_chunk(number, offset, size)


def _write(fd: int, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    # Starts the write-back (the pages are dirty, so they stay): the fsync at the end finds little.
    os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)

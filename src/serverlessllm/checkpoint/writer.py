"""Writing a `.bin`: streamed, a few chunks of memory, resumable, each chunk read back.

Every chunk goes its own way through one thread: read from the source, written past the page cache,
read back from the disk, compared, hashed. Several are on their way at once, so the disk reads
and writes and the digests are computed at the same time; each of these releases the GIL. The file
is preallocated, so a full disk shows before the first byte and not after the last.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from serverlessllm.checkpoint.digests import checksum, digest_chunk
from serverlessllm.checkpoint.index import Chunk
from serverlessllm.checkpoint.journal import Journal
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.reader import (
    first_bad_chunk,
    open_past_cache,
    page_buffer,
    paged,
    read_chunk,
)
from serverlessllm.core.errors import CheckpointError, CorruptChunk, OutOfSpace
from serverlessllm.core.units import MIB, format_size

IN_FLIGHT_BYTES = 64 * MIB
"""Of chunks between source and disk, unless two of them are more."""
IN_FLIGHT_MAX = 4

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_INDEX_BYTES_EACH = 512
"""Of the `.idx` and the journal for one tensor or chunk; generous."""

ChunkRange = Callable[[int], tuple[int, int]]


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
    of an earlier run. On return the file is on the disk, every byte of it was read back, and the
    journal has all digests.

    Raises:
        OutOfSpace: the disk cannot hold it; says how much is needed.
        CorruptChunk: the disk gives back other bytes than it was given.
        OSError: of the disk, while writing.
        SourceUnavailable, CheckpointError: of the source; what is written stays for a resume.
    """
    total = -(-layout.size_bytes // chunk_bytes)

    def chunk_range(number: int) -> tuple[int, int]:
        offset = number * chunk_bytes
        return offset, min(chunk_bytes, layout.size_bytes - offset)

    _reserve(path, layout, total)
    fd = open_past_cache(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        bad = first_bad_chunk(fd, journal.chunks, chunk_range, threads=2)
        journal.keep(len(journal.chunks) if bad is None else bad)
        done = len(journal.chunks)
        for number in range(done):
            on_chunk(number, *chunk_range(number))
        writer = _ChunkWriter(layout, fd, chunk_range)
        for number, chunk in writer.write(range(done, total), _in_flight(chunk_bytes)):
            journal.append(chunk)
            on_chunk(number, *chunk_range(number))
        os.ftruncate(fd, layout.size_bytes)
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


def _in_flight(chunk_bytes: int) -> int:
    return max(2, min(IN_FLIGHT_MAX, IN_FLIGHT_BYTES // chunk_bytes))


def _reserve(path: Path, layout: Layout, chunks: int) -> None:
    """Take all the space that the work will need, or none. Whole pages, as O_DIRECT wants them."""
    beside = _INDEX_BYTES_EACH * (len(layout.tensors) + len(layout.aliases) + 2 * chunks + 8)
    size = paged(layout.size_bytes)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        taken = os.fstat(fd).st_blocks * 512
        disk = os.fstatvfs(fd)
        free = disk.f_bavail * disk.f_frsize
        needed = max(size - taken, 0) + beside
        if needed > free:
            raise OutOfSpace(
                f"the checkpoint needs {format_size(needed)} and its disk has "
                f"{format_size(free)} free: free some space, or convert to another disk"
            )
        os.posix_fallocate(fd, 0, size)
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


class _ChunkWriter:
    """Chunks of `layout` → the file `fd`, by threads."""

    def __init__(self, layout: Layout, fd: int, chunk_range: ChunkRange) -> None:
        self._layout = layout
        self._fd = fd
        self._chunk_range = chunk_range
        self._buffers: SimpleQueue[memoryview] = SimpleQueue()

    def write(self, numbers: range, in_flight: int) -> Iterator[tuple[int, Chunk]]:
        """Write these chunks, `in_flight` at once; each is given in order when it is on the disk.

        When this ends early (an error, or nobody asks for the next), no thread is left.
        """
        if not numbers:
            return
        in_flight = min(in_flight, len(numbers))
        for _ in range(in_flight):
            self._buffers.put(page_buffer(self._chunk_range(0)[1]))
        pool = ThreadPoolExecutor(in_flight, thread_name_prefix="convert")
        waiting: deque[tuple[int, Future[Chunk]]] = deque()
        try:
            for number in numbers:
                waiting.append((number, pool.submit(self._write, number)))
                if len(waiting) == 2 * in_flight:  # one that is slow does not stop the others
                    first, chunk = waiting.popleft()
                    yield first, chunk.result()
            for first, chunk in waiting:
                yield first, chunk.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _write(self, number: int) -> Chunk:
        offset, size = self._chunk_range(number)
        buffer = self._buffers.get()
        try:
            self._layout.read_into(offset, buffer[:size])
            given = checksum(buffer[:size])
            whole_pages = buffer[: paged(size)]
            whole_pages[size:] = bytes(len(whole_pages) - size)
            write_all(self._fd, offset, whole_pages)
            _forget_cached(self._fd, offset, size)
            # BLAKE3 costs three times CRC32C: it is taken once, of what the disk gives back.
            came_back = read_chunk(self._fd, offset, buffer, size)
            chunk = digest_chunk(buffer[:size])
            if not came_back or chunk.crc32c != given:
                raise CorruptChunk(
                    f"chunk {number} (bytes {offset} to {offset + size}) came back from the disk "
                    "other than it was written: the disk or the memory of this machine is broken"
                )
            return chunk
        finally:
            self._buffers.put(buffer)


def write_all(fd: int, offset: int, view: memoryview) -> None:
    """Write all of `view` at `offset`, past the page cache for as long as the file system lets."""
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(fd, view[done:], offset + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # A file system that takes the flag and then wants more than whole pages.
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _forget_cached(fd: int, offset: int, size: int) -> None:
    """Without O_DIRECT, bring the bytes to the disk, and let a read of them come from there."""
    if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        os.fdatasync(fd)
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)

"""Checking a `.bin` against its `.idx`, at the speed of the disk."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from serverlessllm.checkpoint.digests import verify_chunk
from serverlessllm.checkpoint.index import Chunk, Index, tensor_at
from serverlessllm.core.errors import CheckpointError, CorruptChunk

_PAGE_BYTES = 4096


def verify(
    bin_path: Path,
    index: Index,
    *,
    threads: int = 2,
    on_chunk: Callable[[int], None] | None = None,
) -> None:
    """Read the whole `.bin` from its disk, past the page cache, and check every digest.

    Memory: a chunk a thread. `on_chunk` is called, from any of the threads, with the
    size of each chunk that is right.

    Raises:
        CorruptChunk: names the first chunk that is not right and the tensor it hits.
        CheckpointError: the file is missing, shorter or longer than the index says.
    """
    fd = _open_direct(bin_path)
    try:
        size = os.fstat(fd).st_size
        if size != index.size_bytes:
            raise CheckpointError(
                f"{bin_path.name} has {size} bytes where its index says {index.size_bytes}: "
                "it was cut off, or belongs to another index; fetch or convert it again"
            )
        bad = first_bad_chunk(
            fd, index.chunks, index.chunk_range, threads=threads, on_chunk=on_chunk
        )
    finally:
        os.close(fd)
    if bad is not None:
        raise corrupt_chunk(index, bad)


def corrupt_chunk(index: Index, number: int) -> CorruptChunk:
    """The error for a chunk whose bytes are not what its digests say."""
    offset, size = index.chunk_range(number)
    tensor = tensor_at(index, offset, size)
    hit = f", tensor {tensor!r} and what follows" if tensor else ""
    return CorruptChunk(
        f"chunk {number} of {index.model} (bytes {offset} to {offset + size}{hit}) does not "
        "match its digest: fetch or convert the checkpoint again"
    )


def first_bad_chunk(
    fd: int,
    chunks: Sequence[Chunk],
    chunk_range: Callable[[int], tuple[int, int]],
    *,
    threads: int,
    on_chunk: Callable[[int], None] | None = None,
) -> int | None:
    """Number of the first chunk that is unreadable or does not match; None when all do."""
    numbers = count()
    bad: list[int] = []

    def check_until_bad() -> None:
        buffer = page_buffer(chunk_range(0)[1])
        # Numbers are handed out in order, so whoever stops leaves no lower one unchecked.
        while (number := next(numbers)) < min(bad, default=len(chunks)):
            offset, size = chunk_range(number)
            if not _read(fd, offset, buffer, size) or not verify_chunk(
                buffer[:size], chunks[number]
            ):
                bad.append(number)
            elif on_chunk is not None:
                on_chunk(size)

    if chunks:
        workers = min(threads, len(chunks))
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            for done in [pool.submit(check_until_bad) for _ in range(workers)]:
                done.result()
    return min(bad, default=None)


def page_buffer(size_bytes: int) -> memoryview:
    """Page-aligned memory for reads past the page cache; freed with its last view."""
    return memoryview(mmap.mmap(-1, -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES))


def _open_direct(path: Path) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.open(path, flags)  # a file system without O_DIRECT: drop its cache instead
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return fd
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from error


def _read(fd: int, offset: int, buffer: memoryview, size: int) -> bool:
    """Whether all of it could be read: a disk that fails is as bad as one that lies."""
    done = 0
    while done < size:
        try:
            # Whole pages, as O_DIRECT wants them; the end of the file cuts the last one.
            count_ = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError:
            return False
        if count_ == 0:
            return False
        done += count_
    return True

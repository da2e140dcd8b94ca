"""Checking a `.bin` against its `.idx`, at the speed of the disk."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

import msgspec

from serverlessllm.checkpoint.digests import verify_chunk
from serverlessllm.checkpoint.index import Chunk, Index, parts_at
from serverlessllm.core.errors import CheckpointError, CorruptChunk

BAD_CHUNKS_NAMED_MAX = 64
PARTS_NAMED_MAX = 16
PAGE_BYTES = 4096

_WRONG = "does not match its digest"
_UNREADABLE = "cannot be read from the disk"
_CUT_OFF = "is cut off"


class BadChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk whose bytes are not what the index says, and all that it may have damaged."""

    number: int
    offset: int
    size_bytes: int
    problem: str
    """What is wrong with it, as the end of a sentence."""
    parts: tuple[str, ...]
    """Names of the tensors and side files with a byte in it, in order: at most 16."""
    parts_count: int
    """How many there are; 0 when only padding is hit."""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a `.bin`."""

    size_bytes: int
    """Of the file, as it is."""
    bad_chunks: tuple[BadChunk, ...]
    """In order: at most 64."""
    bad_chunks_count: int
    excess_bytes: int
    """Behind the last byte that the index knows of."""

    @property
    def whole(self) -> bool:
        """Whether every byte is what the index says."""
        return self.bad_chunks_count == 0 and self.excess_bytes == 0


def examine(
    bin_path: Path,
    index: Index,
    *,
    threads: int = 2,
    on_chunk: Callable[[int], None] | None = None,
) -> Findings:
    """Read the whole `.bin` from its disk, past the page cache, and name all that is wrong.

    Memory: a chunk a thread. `on_chunk` is called, from any of the threads, with the
    size of each chunk that is right.

    Raises:
        CheckpointError: the file is missing, or not one.
    """
    with _open_direct(bin_path) as fd:
        size = os.fstat(fd).st_size
        bad = _bad_chunks(
            fd, index.chunks, index.chunk_range, threads=threads, on_chunk=on_chunk, all_=True
        )
    return Findings(
        size_bytes=size,
        bad_chunks=tuple(
            _bad_chunk(index, number, bad[number])
            for number in islice(sorted(bad), BAD_CHUNKS_NAMED_MAX)
        ),
        bad_chunks_count=len(bad),
        excess_bytes=max(size - index.size_bytes, 0),
    )


def verify(
    bin_path: Path,
    index: Index,
    *,
    threads: int = 2,
    on_chunk: Callable[[int], None] | None = None,
) -> None:
    """As `examine`, but an error at the first thing that is wrong.

    Raises:
        CorruptChunk: names the first chunk that is not right and the tensor it hits.
        CheckpointError: the file is missing, shorter or longer than the index says.
    """
    with _open_direct(bin_path) as fd:
        size = os.fstat(fd).st_size
        if size != index.size_bytes:
            raise CheckpointError(
                f"{bin_path.name} has {size} bytes where its index says {index.size_bytes}: "
                "it was cut off, or belongs to another index; fetch or convert it again"
            )
        bad = first_bad_chunk(
            fd, index.chunks, index.chunk_range, threads=threads, on_chunk=on_chunk
        )
    if bad is not None:
        raise corrupt_chunk(index, bad)


def corrupt_chunk(index: Index, number: int) -> CorruptChunk:
    """The error for a chunk whose bytes are not what its digests say."""
    bad = _bad_chunk(index, number, _WRONG)
    hit = f", tensor {bad.parts[0]!r} and what follows" if bad.parts else ""
    return CorruptChunk(
        f"chunk {number} of {index.model} (bytes {bad.offset} to {bad.offset + bad.size_bytes}"
        f"{hit}) {bad.problem}: fetch or convert the checkpoint again"
    )


def _bad_chunk(index: Index, number: int, problem: str) -> BadChunk:
    offset, size = index.chunk_range(number)
    parts = list(parts_at(index, offset, size))
    return BadChunk(
        number=number,
        offset=offset,
        size_bytes=size,
        problem=problem,
        parts=tuple(parts[:PARTS_NAMED_MAX]),
        parts_count=len(parts),
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
    bad = _bad_chunks(fd, chunks, chunk_range, threads=threads, on_chunk=on_chunk, all_=False)
    return min(bad, default=None)


def _bad_chunks(
    fd: int,
    chunks: Sequence[Chunk],
    chunk_range: Callable[[int], tuple[int, int]],
    *,
    threads: int,
    on_chunk: Callable[[int], None] | None,
    all_: bool,
) -> dict[int, str]:
    """What is wrong, by number: of all chunks, or at least of the first that is."""
    numbers = count()
    bad: dict[int, str] = {}
    file_bytes = os.fstat(fd).st_size

    def check() -> None:
        buffer = page_buffer(chunk_range(0)[1])
        # Numbers are handed out in order, so whoever stops leaves no lower one unchecked.
        while (number := next(numbers)) < len(chunks) and (all_ or not bad):
            offset, size = chunk_range(number)
            if offset + size > file_bytes:
                bad[number] = _CUT_OFF
            elif not read_chunk(fd, offset, buffer, size):
                bad[number] = _UNREADABLE
            elif not verify_chunk(buffer[:size], chunks[number]):
                bad[number] = _WRONG
            elif on_chunk is not None:
                on_chunk(size)

    if chunks:
        workers = min(threads, len(chunks))
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            for done in [pool.submit(check) for _ in range(workers)]:
                done.result()
    return bad


def page_buffer(size_bytes: int) -> memoryview:
    """Page-aligned memory of whole pages, for I/O past the page cache; freed with its last view."""
    return memoryview(mmap.mmap(-1, paged(size_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def paged(size_bytes: int) -> int:
    """The size of the whole pages that hold so many bytes."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


@contextmanager
def _open_direct(path: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = open_past_cache(path, flags)
        # Without O_DIRECT: drop what of the file is cached, if it is on the disk already.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def open_past_cache(path: Path, flags: int) -> int:
    """A descriptor with O_DIRECT, or without where the file system has no such thing."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


def read_chunk(fd: int, offset: int, buffer: memoryview, size: int) -> bool:
    """Whether all of it could be read: a disk that fails is as bad as one that lies."""
    done = 0
    while done < size:
        try:
            # Whole pages, as O_DIRECT wants them; the end of the file cuts the last one.
            count_ = os.preadv(fd, [buffer[done : paged(size)]], offset + done)
        except OSError:
            return False
        if count_ == 0:
            return False
        done += count_
    return True

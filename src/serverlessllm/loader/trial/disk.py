"""A trial of a file on a disk → DRAM, be it the nvme tier's or a store's: whole loads beside passes
that do ever more of what a load does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.plan import ChunkRange, chunk_ranges, hop_name
from serverlessllm.loader.pour import Blake3, Check, Crc32c, Sink, Unchecked, fill, pour
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.loader.tiers.staging import BLOCK_BYTES, Staging
from serverlessllm.loader.trial.page_cache import cached_share, forget, most
from serverlessllm.loader.trial.reads import Reading, best_reading, in_threads, read_through
from serverlessllm.loader.trial.report import Cost, Report, Tell, cost_of, ladder, make_report

Work = Callable[[], Awaitable[None]]


async def try_disk(
    loader: Loader,
    ref: CheckpointRef,
    source: CacheLevel,
    path: Path,
    index: Index,
    settings: LoaderSettings,
    *,
    rounds: int,
    tell: Tell,
) -> Report:
    """In each round the checkpoint comes from `source` (nvme, or a store that is a folder), where
    its file is at `path`, to DRAM.

    Raises what `Loader.load` does, and OSError.
    """
    forget(path)
    passes = _Passes(
        path, index, _CHECKS[source], settings, await best_reading(path, ref.size_bytes)
    )
    loads: list[Cost] = []
    cached = []

    async def load() -> None:
        loads.append(await cost_of(loader.load(ref, CacheLevel.DRAM)))
        await loader.evict(ref.id, source)

    for number in range(rounds):
        tell(number)
        cached.append(cached_share(path))
        for work in rotated((*passes.all(), load), number):
            await work()
    limit, limit_s = passes.limit()
    return make_report(
        ref,
        hop=hop_name(source, CacheLevel.DRAM),
        loads=loads,
        limit=f"O_DIRECT reads of the same file, {limit}",
        limit_bytes_s=ref.size_bytes / limit_s,
        stages=ladder(
            (
                ("read", passes.read),
                ("copy into DRAM", passes.copied),
                ("verify", passes.verified),
                ("hold, commit, clean up", [load.seconds for load in loads]),
            )
        ),
        verify_s=passes.verify_s(),
        cached_share=most(cached),
    )


def rotated(works: Sequence[Work], number: int) -> Sequence[Work]:
    """Another one first in each round: some disks are quicker after a rest."""
    first = number % len(works)
    return (*works[first:], *works[:first])


def _crc32c(index: Index, chunk: ChunkRange) -> Check:
    return Crc32c(index.chunks[chunk.number].crc32c)


def _blake3(index: Index, chunk: ChunkRange) -> Check:
    return Blake3(index.chunks[chunk.number].blake3)


def _unchecked(_index: Index, _chunk: ChunkRange) -> Check:
    return Unchecked()


_MakeCheck = Callable[[Index, ChunkRange], Check]
_CHECKS: dict[CacheLevel, _MakeCheck] = {CacheLevel.NVME: _crc32c, CacheLevel.STORE: _blake3}


class _Passes:
    """The moves of a load without its bookkeeping: seconds of each pass, a sample a round."""

    def __init__(
        self,
        path: Path,
        index: Index,
        check: _MakeCheck,
        settings: LoaderSettings,
        best: Reading,
    ) -> None:
        self._path = path
        self._index = index
        self._check = check
        self._dram_path = Path(settings.dram_dir or "") / "pass"
        self._staging = Staging(settings.copy_threads)
        self._best = best
        self._own = Reading(threads=settings.copy_threads, block_bytes=BLOCK_BYTES)
        self.best_read: list[float] = []
        self.read: list[float] = []
        self.copied: list[float] = []
        self.verified: list[float] = []

    def all(self) -> tuple[Work, ...]:
        """One round of each."""
        return self._best_read, self._read, self._copy, self._verify

    def limit(self) -> tuple[Reading, float]:
        """The quicker of both ways to read, and its seconds."""
        ways = ((self._best, median(self.best_read)), (self._own, median(self.read)))
        return min(ways, key=lambda way: way[1])

    def verify_s(self) -> float:
        """What the digests add: with and without, pair by pair."""
        pairs = zip(self.verified, self.copied, strict=True)
        return max(0.0, median(verified - copied for verified, copied in pairs))

    async def _best_read(self) -> None:
        self.best_read.append(await read_through(self._path, self._index.size_bytes, self._best))

    async def _read(self) -> None:
        self.read.append(await self._pour(_Nowhere(), _unchecked))

    async def _copy(self) -> None:
        with self._new_dram() as dram:
            self.copied.append(await self._pour(dram, _unchecked))

    async def _verify(self) -> None:
        with self._new_dram() as dram:
            self.verified.append(await self._pour(dram, self._check))

    async def _pour(self, sink: Sink, check: _MakeCheck) -> float:
        with contextlib.closing(DirectFile(self._path, os.O_RDONLY)) as file:

            def move(chunk: ChunkRange) -> bool:
                digest = check(self._index, chunk)
                if isinstance(sink, DramFile):
                    return fill(file, sink, chunk, digest, self._staging)
                return pour(file, sink, chunk, digest, self._staging)

            return await in_threads(chunk_ranges(self._index), self._own.threads, move)

    @contextlib.contextmanager
    def _new_dram(self) -> Iterator[DramFile]:
        """A file without a single page, gone afterwards."""
        fd = os.open(self._dram_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, self._index.size_bytes)
            with contextlib.closing(DramFile(fd, self._index.size_bytes, filling=True)) as dram:
                yield dram
        finally:
            self._dram_path.unlink()
            os.close(fd)


class _Nowhere:
    """A sink that forgets."""

    def write(self, view: memoryview, offset: int) -> None:
        """Nothing."""

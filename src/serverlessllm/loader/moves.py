"""How one chunk gets from one tier into the next: read, checked, written.

BLAKE3 checks what comes from the store, before it is written anywhere; CRC32C what comes from a
tier of this node. A chunk that fails is counted and fetched from the store again, never served.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence

from blake3 import blake3
from crc32c import crc32c

from serverlessllm.checkpoint.index import Index, tensor_at
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CorruptChunk, OutOfSpace
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.budget import whole_pages
from serverlessllm.loader.plan import ChunkRange, hop_name
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.loader.tiers.remote import RemoteFile
from serverlessllm.loader.workers import Threads
from serverlessllm.telemetry import log
from serverlessllm.telemetry.table import CORRUPT_CHUNKS

_log = log("loader")


class Moves:
    """The moves of one load of one checkpoint."""

    def __init__(
        self,
        checkpoint: CheckpointId,
        index: Index,
        remote: RemoteFile,
        threads: Threads,
        *,
        tries_max: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._index = index
        self._remote = remote
        self._threads = threads
        self._tries_max = tries_max
        self.refetched_bytes = 0
        """What had to come from the store because the nearer copy was corrupt."""

    async def store_to_dram(self, chunk: ChunkRange, dram: DramFile) -> None:
        parts = await self._fetch(chunk, CacheLevel.DRAM)
        await self._threads.run(dram.write, chunk, parts)

    async def store_to_nvme(self, chunk: ChunkRange, nvme: DirectFile) -> None:
        parts = await self._fetch(chunk, CacheLevel.NVME)
        await self._threads.run(write_aligned, nvme, chunk, parts)

    async def dram_to_nvme(self, chunk: ChunkRange, dram: DramFile, nvme: DirectFile) -> None:
        await self._threads.run(write_view, dram, nvme, chunk)

    async def nvme_to_dram(self, chunk: ChunkRange, nvme: DirectFile, dram: DramFile) -> None:
        """A corrupt or unreadable chunk is fetched from the store, and mended in the nvme copy."""
        crc = self._index.chunks[chunk.number].crc32c
        if await self._threads.run(read_verified, nvme, dram, chunk, crc):
            return
        self._quarantine(chunk, hop_name(CacheLevel.NVME, CacheLevel.DRAM))
        await self.store_to_dram(chunk, dram)
        self.refetched_bytes += chunk.size_bytes
        try:
            await self._threads.run(mend, dram, nvme, chunk)
        except (OSError, OutOfSpace) as error:  # the disk is failing; the load need not
            _log.warning("not mended", checkpoint=self._checkpoint, error=repr(error))

    async def _fetch(self, chunk: ChunkRange, target: CacheLevel) -> Sequence[memoryview]:
        """The chunk from the store, verified.

        Raises:
            CorruptChunk: the store keeps sending other bytes.
        """
        digest = self._index.chunks[chunk.number].blake3
        for _ in range(self._tries_max):
            parts = await self._remote.fetch(chunk)
            if await self._threads.run(blake3_of, parts) == digest:
                return parts
            self._quarantine(chunk, hop_name(CacheLevel.STORE, target))
        tensor = tensor_at(self._index, chunk.offset, chunk.size_bytes)
        raise CorruptChunk(
            f"chunk {chunk.number} of checkpoint {self._checkpoint[:12]}… (tensor {tensor!r}) does "
            "not match its digest in the store: delete the model and ingest it again (`sllm rm`, "
            "`sllm pull`)"
        )

    def _quarantine(self, chunk: ChunkRange, hop: str) -> None:
        CORRUPT_CHUNKS.inc(hop)
        _log.warning(
            "corrupt chunk, fetched again",
            checkpoint=self._checkpoint,
            number=chunk.number,
            hop=hop,
        )


def read_verified(nvme: DirectFile, dram: DramFile, chunk: ChunkRange, crc: int) -> bool:
    """Read a chunk from the disk straight into the mapping; whether it is what it should be.

    Raises:
        OutOfSpace: DRAM is full.
        OSError: a failure that reading elsewhere will not mend.
    """
    dram.allocate(chunk)
    with dram.view(chunk) as view:
        try:
            nvme.read_into(view, chunk.offset, chunk.size_bytes)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
    return is_whole(dram, chunk, crc)


def is_whole(dram: DramFile, chunk: ChunkRange, crc: int) -> bool:
    """Whether a chunk in DRAM is what it should be."""
    with dram.view(chunk) as view, view[: chunk.size_bytes] as exact:
        return bool(crc32c(exact) == crc)


def blake3_of(parts: Sequence[memoryview]) -> str:
    """BLAKE3 of a chunk that came in parts, as hex digits."""
    digest = blake3()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def write_view(dram: DramFile, nvme: DirectFile, chunk: ChunkRange) -> None:
    """Write a chunk from the mapping to the disk."""
    with dram.view(chunk) as view, view[: chunk.size_bytes] as exact:
        nvme.write(exact, chunk.offset)


def mend(dram: DramFile, nvme: DirectFile, chunk: ChunkRange) -> None:
    """Write a chunk over the corrupt one it should be."""
    with contextlib.closing(DirectFile(nvme.path, os.O_WRONLY)) as file:
        write_view(dram, file, chunk)


def write_aligned(nvme: DirectFile, chunk: ChunkRange, parts: Sequence[memoryview]) -> None:
    """Write a chunk from memory that direct I/O would refuse."""
    staging = mmap.mmap(-1, whole_pages(chunk.size_bytes))  # unmapped with its last view
    for part in parts:
        staging.write(part)
    nvme.write(memoryview(staging)[: chunk.size_bytes], chunk.offset)

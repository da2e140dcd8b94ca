"""How one chunk gets from one tier into the next: read, checked, written, slice by slice.

BLAKE3 checks what comes from the store, CRC32C what comes from a tier of this node. A chunk that
fails is counted and fetched from the store again. What was written of it is overwritten, in a
file that has no name to be found by yet: it is never served.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from serverlessllm.checkpoint.index import Index, tensor_at
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CorruptChunk, OutOfSpace
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.plan import ChunkRange, hop_name
from serverlessllm.loader.pour import (
    Blake3,
    Check,
    Crc32c,
    Sink,
    Source,
    Unchecked,
    blake3_of,
    fill,
    pour,
    write_parts,
    write_staged,
)
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.loader.tiers.remote import RemoteFile
from serverlessllm.loader.tiers.staging import Staging
from serverlessllm.loader.workers import Threads
from serverlessllm.telemetry import log
from serverlessllm.telemetry.table import CORRUPT_CHUNKS

_log = log("loader")


class Moves:
    """The moves of one load of one checkpoint. `staging`: what the bytes pass through."""

    def __init__(
        self,
        checkpoint: CheckpointId,
        index: Index,
        remote: RemoteFile,
        threads: Threads,
        *,
        tries_max: int,
        staging: Staging | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._index = index
        self._remote = remote
        self._threads = threads
        self._staging = staging or threads.staging
        self._tries_max = tries_max
        self.refetched_bytes = 0
        """What had to come from the store because the nearer copy was corrupt."""

    async def store_to_dram(self, chunk: ChunkRange, dram: DramFile) -> None:
        def move(file: Source, check: Check) -> bool:
            return fill(file, dram, chunk, check, self._staging)

        if not await self._folder_to(chunk, CacheLevel.DRAM, move):
            parts = await self._fetch(chunk, CacheLevel.DRAM)
            await self._threads.run(write_parts, dram, chunk, parts)

    async def store_to_nvme(self, chunk: ChunkRange, nvme: DirectFile) -> None:
        def move(file: Source, check: Check) -> bool:
            return pour(file, nvme, chunk, check, self._staging)

        if not await self._folder_to(chunk, CacheLevel.NVME, move):
            parts = await self._fetch(chunk, CacheLevel.NVME)
            await self._threads.run(write_staged, nvme, chunk, parts, self._staging)

    async def dram_to_nvme(self, chunk: ChunkRange, dram: DramFile, nvme: DirectFile) -> None:
        """Raises CorruptChunk: what lies in DRAM is not what was put there."""
        if not await self._threads.run(pour, dram, nvme, chunk, self._crc(chunk), self._staging):
            raise self._corrupt(chunk, CacheLevel.DRAM)

    async def nvme_to_dram(self, chunk: ChunkRange, nvme: DirectFile, dram: DramFile) -> None:
        """A corrupt or unreadable chunk is fetched from the store, and mended in the nvme copy."""
        if await self._threads.run(fill, nvme, dram, chunk, self._crc(chunk), self._staging):
            return
        self._quarantine(chunk, hop_name(CacheLevel.NVME, CacheLevel.DRAM))
        parts = await self._fetch(chunk, CacheLevel.DRAM)
        await self._threads.run(write_parts, dram, chunk, parts)
        await self._mend(chunk, nvme, parts)

    async def nvme_to_device(self, chunk: ChunkRange, nvme: DirectFile, device: Sink) -> None:
        """As `nvme_to_dram`: a copy in DRAM is not made."""
        if await self._threads.run(pour, nvme, device, chunk, self._crc(chunk), self._staging):
            return
        self._quarantine(chunk, hop_name(CacheLevel.NVME, CacheLevel.DEVICE))
        parts = await self._fetch(chunk, CacheLevel.DEVICE)
        await self._threads.run(write_staged, device, chunk, parts, self._staging)
        await self._mend(chunk, nvme, parts)

    async def dram_to_device(self, chunk: ChunkRange, dram: DramFile, device: Sink) -> None:
        """Unchecked: what lies in DRAM was checked when it came, as for engines that map it.
        Raises OSError: the file there is not whole any more."""
        if not await self._threads.run(pour, dram, device, chunk, Unchecked(), self._staging):
            raise OSError(errno.EIO, "a file in DRAM was cut")

    async def _folder_to(
        self, chunk: ChunkRange, target: CacheLevel, move: Callable[[Source, Check], bool]
    ) -> bool:
        """Read a store that is a folder of this machine as the disk it is, past the store's
        client and its copies; whether that gave the chunk. The file is opened for each chunk: its
        digest, and not its inode, says that it is the right one."""
        path = self._remote.local_path
        if path is None:
            return False
        threads = self._threads
        try:
            file = await threads.run_or_undo(DirectFile.close, DirectFile, path, os.O_RDONLY)
        except OSError:  # the store's client says what is wrong with it
            return False
        try:
            check = Blake3(self._index.chunks[chunk.number].blake3)
            if await threads.run(move, file, check):
                return True
        finally:
            file.close()
        self._quarantine(chunk, hop_name(CacheLevel.STORE, target))
        return False

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
        raise self._corrupt(chunk, CacheLevel.STORE)

    async def _mend(self, chunk: ChunkRange, nvme: DirectFile, parts: Sequence[memoryview]) -> None:
        """Write what was fetched over the corrupt chunk it should be."""
        self.refetched_bytes += chunk.size_bytes
        try:
            await self._threads.run(mend, nvme.path, chunk, parts, self._staging)
        except (OSError, OutOfSpace) as error:  # the disk is failing; the load need not
            _log.warning("not mended", checkpoint=self._checkpoint, error=repr(error))

    def _crc(self, chunk: ChunkRange) -> Crc32c:
        return Crc32c(self._index.chunks[chunk.number].crc32c)

    def _quarantine(self, chunk: ChunkRange, hop: str) -> None:
        CORRUPT_CHUNKS.inc(hop)
        _log.warning(
            "corrupt chunk, fetched again",
            checkpoint=self._checkpoint,
            number=chunk.number,
            hop=hop,
        )

    def _corrupt(self, chunk: ChunkRange, where: CacheLevel) -> CorruptChunk:
        tensor = tensor_at(self._index, chunk.offset, chunk.size_bytes)
        return CorruptChunk(
            f"chunk {chunk.number} of checkpoint {self._checkpoint[:12]}… (tensor {tensor!r}) does "
            f"not match its digest in the {where.tier}: delete the model and ingest it again "
            "(`sllm rm`, `sllm pull`)"
        )


def mend(path: Path, chunk: ChunkRange, parts: Sequence[memoryview], staging: Staging) -> None:
    """Write a chunk over the corrupt one it should be."""
    file = DirectFile(path, os.O_WRONLY)
    try:
        write_staged(file, chunk, parts, staging)
    finally:
        file.close()

"""The store as a tier: a chunk by ranged reads, a bounded number of them in flight."""

from __future__ import annotations

import asyncio

from serverlessllm.core.failures import single_error
from serverlessllm.loader.plan import ChunkRange
from serverlessllm.store.checkpoints import CheckpointStore


class RemoteFile:
    """The `.bin` of one checkpoint in the store, for one load."""

    def __init__(
        self, store: CheckpointStore, prefix: str, *, range_bytes: int, ranges_in_flight_max: int
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._range_bytes = range_bytes
        self.local_path = store.local_bin(prefix)
        """Where it lies, if the store is a folder of this machine."""
        self._slots = asyncio.Semaphore(ranges_in_flight_max)

    async def fetch(self, chunk: ChunkRange) -> tuple[memoryview, ...]:
        """The chunk's bytes in order, unverified, in the store client's own memory."""
        starts = range(chunk.offset, chunk.offset + chunk.size_bytes, self._range_bytes)
        end = chunk.offset + chunk.size_bytes
        with single_error():
            async with asyncio.TaskGroup() as group:
                reads = [
                    group.create_task(self._read(start, min(self._range_bytes, end - start)))
                    for start in starts
                ]
        return tuple(read.result() for read in reads)

    async def _read(self, offset: int, size: int) -> memoryview:
        async with self._slots:
            return await self._store.read_range(self._prefix, offset, size)

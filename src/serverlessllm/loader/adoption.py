"""What an earlier process left in the tiers: checked before it is announced, or removed.

Copies that appear later need no check: a `.bin` gets its name when its last chunk was verified.
Of the nvme tier only the `.idx` and the sizes are checked, since each of its chunks is verified
whenever it is read; DRAM is read by engines, so all of it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from serverlessllm.core.errors import CorruptChunk
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.indexes import Indexes
from serverlessllm.loader.plan import ChunkRange, chunk_ranges
from serverlessllm.loader.pour import is_whole
from serverlessllm.loader.residency import Held, TierDirectory
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.workers import Threads, for_each
from serverlessllm.telemetry import log, span
from serverlessllm.telemetry.table import CORRUPT_CHUNKS

_log = log("loader")
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


def sweep(tier: TierDirectory, indexes: Indexes) -> tuple[CheckpointId, ...]:
    """Remove what is not whole at first sight; what is left, last used first. Blocks."""
    with tier.lock():
        tier.sweep()
        files = sorted(
            (file for file in tier.scan() if file.whole), key=lambda file: -file.last_used
        )
        kept = []
        for file in files:
            index = indexes.of_tier(tier, file.checkpoint)
            if index is not None and index.size_bytes == file.size_bytes:
                kept.append(file.checkpoint)
            else:
                tier.remove(file.checkpoint)
                _log.warning("removed a broken copy", checkpoint=file.checkpoint)
    return tuple(kept)


class Leftovers:
    """The copies in DRAM that were found at start and not verified yet. `spawn` owns the tasks."""

    def __init__(
        self,
        tier: TierDirectory,
        indexes: Indexes,
        spawn: Spawn,
        *,
        files: Threads,
        copies: Threads,
        width: int,
    ) -> None:
        self._tier = tier
        self._indexes = indexes
        self._spawn = spawn
        self._files = files
        self._copies = copies
        self._width = width
        self._running: dict[CheckpointId, asyncio.Task[None]] = {}
        self.unverified: dict[CheckpointId, None] = {}
        """In order; not to be announced."""

    async def check_all(self) -> None:
        """Verify one after the other."""
        for checkpoint in tuple(self.unverified):
            await self.check(checkpoint)

    async def check(self, checkpoint: CheckpointId) -> None:
        """Return when `checkpoint` is verified, or gone; at once if it was no leftover."""
        while checkpoint in self.unverified:
            running = self._running.get(checkpoint)
            if running is None:
                running = self._running[checkpoint] = self._spawn(self._verify(checkpoint))
            await asyncio.wait((running,))

    async def _verify(self, checkpoint: CheckpointId) -> None:
        tier = self._tier
        try:
            held = await self._files.run_or_undo(_release, tier.hold, checkpoint)
            if held is None:
                return
            try:
                with span("loader.adopt", loud=True, checkpoint=checkpoint):
                    await self._check_chunks(held)
            except (CorruptChunk, OSError):
                CORRUPT_CHUNKS.inc(tier.level.tier)
                _log.warning("removed a corrupt copy", checkpoint=checkpoint, tier=tier.level.tier)
                await self._files.run(tier.discard, checkpoint)
            finally:
                held.release()
        finally:
            del self.unverified[checkpoint], self._running[checkpoint]

    async def _check_chunks(self, held: Held) -> None:
        index = await self._files.run(self._indexes.of_tier, self._tier, held.checkpoint)
        if index is None or index.size_bytes != held.size_bytes:
            raise CorruptChunk("its index is missing, or its size is wrong")
        async with self._copies.leaving() as stack:
            dram = DramFile(held.fd, held.size_bytes)
            stack.callback(dram.close)

            async def check(chunk: ChunkRange) -> None:
                crc = index.chunks[chunk.number].crc32c
                if not await self._copies.run(is_whole, dram, chunk, crc):
                    raise CorruptChunk(f"chunk {chunk.number} does not match its digest")

            await for_each(chunk_ranges(index), self._width, check)


def _release(held: Held | None) -> None:
    if held is not None:
        held.release()

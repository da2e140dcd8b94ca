"""Runs the copies of a plan under the tiers' budgets; one that fails or is cancelled leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.arrivals import Arriving, OnArriving
from serverlessllm.loader.budget import Partial, reserve
from serverlessllm.loader.moves import Moves
from serverlessllm.loader.plan import ChunkRange, Copy, hop_name
from serverlessllm.loader.progress import Meter
from serverlessllm.loader.residency import Held, TierDirectory
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.speeds import Speeds
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.loader.tiers.remote import RemoteFile
from serverlessllm.loader.workers import Threads, finish, for_each
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.telemetry import log, span

_log = log("loader")
_STORE_SLACK = 2
"""Chunks that are being checked or written while the store's reads are all in flight."""

Move = Callable[[ChunkRange], Awaitable[None]]


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """A tier of this node and its budget."""

    directory: TierDirectory
    budget_bytes: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint that a load is about."""

    ref: CheckpointRef
    index: Index
    index_bytes: bytes


class Filled(msgspec.Struct, frozen=True, kw_only=True):
    """A copy that is done: a reference to it, and what moved."""

    held: Held
    hops: tuple[HopTiming, ...]


class Pipeline:
    """Copies between the tiers of one node. `files` runs what waits for locks and directories,
    `copies` what moves bytes."""

    def __init__(
        self,
        settings: LoaderSettings,
        store: CheckpointStore,
        tiers: Mapping[CacheLevel, Tier],
        speeds: Speeds,
        *,
        files: Threads,
        copies: Threads,
    ) -> None:
        self._settings = settings
        self._store = store
        self._tiers = tiers
        self._speeds = speeds
        self._files = files
        self._copies = copies

    async def reserve(self, copy: Copy, job: Job) -> Partial | None:
        """Room for the copy, which `run` uses up; None when the target needs none (it is there,
        or another process is filling it).

        Raises:
            OutOfSpace, LoadFailed, OSError
        """
        tier = self._tiers[copy.target]
        return await self._files.run_or_undo(
            _abandon,
            reserve,
            tier.directory,
            job.ref.id,
            job.index.size_bytes,
            tier.budget_bytes,
        )

    async def run(
        self,
        copy: Copy,
        job: Job,
        source: Held | None,
        partial: Partial,
        meter: Meter,
        announce: OnArriving | None = None,
    ) -> Filled:
        """Make the copy. `source` is the copy's source unless that is the store. A file that is
        filled in DRAM is announced before its first byte.

        Raises:
            OutOfSpace, StoreUnavailable, CheckpointError, CorruptChunk, OSError
        """
        arriving = Arriving(
            job.ref.id,
            job.index,
            job.index_bytes,
            bin_path=self._tiers[copy.target].directory.bin_path(job.ref.id),
            fd=partial.fd,
        )
        try:
            if announce is not None and copy.target is CacheLevel.DRAM:
                announce(arriving)
            hops = await self._fill(copy, job, source, partial, meter, arriving)
            held = await self._files.run_or_undo(Held.release, partial.commit, job.index_bytes)
            arriving.end(whole=True)
        finally:
            arriving.end(whole=False)
            await finish(self._files.run(partial.abandon))
        return Filled(held=held, hops=hops)

    async def _fill(
        self,
        copy: Copy,
        job: Job,
        source: Held | None,
        partial: Partial,
        meter: Meter,
        arriving: Arriving,
    ) -> tuple[HopTiming, ...]:
        settings = self._settings
        remote = RemoteFile(
            self._store,
            job.ref.prefix,
            range_bytes=settings.range_bytes,
            ranges_in_flight_max=settings.ranges_in_flight_max,
        )
        moves = Moves(
            job.ref.id,
            job.index,
            remote,
            self._copies,
            tries_max=settings.chunk_tries_max,
        )
        async with self._copies.leaving() as stack:
            move = self._open(moves, copy, source, partial, stack)

            async def moved(chunk: ChunkRange) -> None:
                await move(chunk)
                meter.add(chunk.size_bytes)
                _log.debug(
                    "arrived",
                    checkpoint=job.ref.id,
                    number=chunk.number,
                    after_s=round(meter.elapsed_s, 6),
                )
                arriving.add(chunk.number)

            width = settings.copy_threads
            if copy.source is CacheLevel.STORE:
                in_flight = settings.range_bytes * settings.ranges_in_flight_max
                width = -(-in_flight // job.index.chunk_bytes) + _STORE_SLACK
            meter.begin(copy.hop, copy.size_bytes)
            with span("loader.copy", loud=True, hop=copy.hop, checkpoint=job.ref.id) as measured:
                await for_each(copy.chunks, min(width, len(copy.chunks)), moved)
                measured.note(bytes_moved=copy.size_bytes, first_s=round(meter.first_s, 6))
            elapsed_s = meter.elapsed_s
        timing = self._speeds.record(copy.hop, copy.size_bytes, elapsed_s)
        hops = [msgspec.structs.replace(timing, first_s=meter.first_s)]
        if moves.refetched_bytes:
            hop = hop_name(CacheLevel.STORE, copy.target)
            hops.append(HopTiming(hop=hop, bytes_moved=moves.refetched_bytes))
        return tuple(hops)

    def _open(
        self,
        moves: Moves,
        copy: Copy,
        source: Held | None,
        partial: Partial,
        stack: contextlib.ExitStack,
    ) -> Move:
        """Open both ends of the copy, and say how a chunk gets from one to the other."""
        size = partial.size_bytes
        if copy.target is CacheLevel.NVME:
            path = self._tiers[CacheLevel.NVME].directory.partial_path(partial.checkpoint)
            nvme = DirectFile(path, os.O_WRONLY)
            stack.callback(nvme.close)
            if source is None:
                return lambda chunk: moves.store_to_nvme(chunk, nvme)
            dram = DramFile(source.fd, size)
            stack.callback(dram.close)
            return lambda chunk: moves.dram_to_nvme(chunk, dram, nvme)
        dram = DramFile(partial.fd, size, filling=True)
        stack.callback(dram.close)
        if source is None:
            return lambda chunk: moves.store_to_dram(chunk, dram)
        nvme = DirectFile(source.path, os.O_RDONLY)
        stack.callback(nvme.close)
        return lambda chunk: moves.nvme_to_dram(chunk, nvme, dram)


def _abandon(partial: Partial | None) -> None:
    if partial is not None:
        partial.abandon()

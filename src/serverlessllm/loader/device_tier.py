"""The device tier of a node with accelerators: whose weights are on which, and who uses them.

The bytes come through a ring of page-locked blocks: a block is read from nvme past the page cache,
or from DRAM, checked, and handed to the device's copy engine; it is filled again when that is
done. Blocks are twice as many as threads, so each thread fills one while another is copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import Draining, OutOfSpace
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.accelerator import Accelerator, Allocation
from serverlessllm.loader.flights import Flight
from serverlessllm.loader.measure import measure_device
from serverlessllm.loader.moves import Moves
from serverlessllm.loader.plan import ChunkRange, Span, chunk_ranges, hop_name, spread
from serverlessllm.loader.progress import Meter, Report
from serverlessllm.loader.residency import Held
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.speeds import Speeds
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.loader.tiers.remote import RemoteFile
from serverlessllm.loader.tiers.staging import Staging
from serverlessllm.loader.weights import Weights
from serverlessllm.loader.workers import Threads, disk_errors, finish, for_each, outlast
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.telemetry import span
from serverlessllm.telemetry.table import EVICTIONS, TIER_USED_BYTES

_BUDGET_SHARE = 0.5
"""Of a device's memory, unless a budget is set: engines need the rest for caches."""


class _Entry:
    """Weights on devices, and how many use them."""

    __slots__ = ("last_used", "spans", "users", "weights")

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self.spans = spans
        self.users = 1
        self.last_used = 0
        self.weights: Weights | None = None
        """None while its memory is being allocated."""


class OnDevice:
    """A reference to weights on devices: while it is held, they stay."""

    __slots__ = ("_entry", "hops", "weights")

    def __init__(self, entry: _Entry, weights: Weights, hops: tuple[HopTiming, ...] = ()) -> None:
        self._entry: _Entry | None = entry
        self.weights = weights
        self.hops = hops
        """What moved for it; nothing moved when the bytes were there."""

    def share(self) -> OnDevice:
        """Another reference, released by itself."""
        assert self._entry is not None
        self._entry.users += 1
        return OnDevice(self._entry, self.weights, self.hops)

    def release(self) -> None:
        """Idempotent."""
        if self._entry is not None:
            self._entry.users -= 1
            self._entry = None


class DeviceTier:
    """Least recently used weights that nobody refers to make room for others."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: LoaderSettings,
        store: CheckpointStore,
        clock: Clock,
        speeds: Speeds,
        copies: Threads,
    ) -> None:
        self._accelerator = accelerator
        self._settings = settings
        self._store = store
        self._clock = clock
        self._speeds = speeds
        self._copies = copies
        self._ring = Staging(2 * settings.copy_threads)
        self._entries: dict[CheckpointId, _Entry] = {}
        self._flights: dict[CheckpointId, Flight[OnDevice]] = {}
        self._budgets: dict[int, int] = {}
        self._uses = 0
        self._closed = False

    async def start(self) -> None:
        """Lock the ring's pages, and measure how fast they are copied.

        Raises:
            DeviceUnavailable: the devices cannot be used.
        """
        await self._copies.run(self._accelerator.start, self._ring)
        totals = await self._copies.run(self._accelerator.total_bytes)
        budget = self._settings.device_budget_bytes
        for device, total in totals.items():
            self._budgets[device] = int(total * _BUDGET_SHARE) if budget is None else budget
        with contextlib.suppress(OutOfSpace):  # somebody else's work may fill it for now
            self._speeds.device_bytes_s = await self._copies.run(
                measure_device, self._accelerator, self._ring
            )

    async def close(self) -> None:
        """Cancel what loads, free everything. Whoever uses weights must have ended. Idempotent."""
        if self._closed:
            return
        self._closed = True
        while running := [flight.task for flight in self._flights.values()]:
            for task in running:
                task.cancel()
                await outlast(task)
            await asyncio.sleep(0)  # their callbacks run
        for checkpoint in tuple(self._entries):
            await self._drop(checkpoint)
        await self._copies.run(self._accelerator.close)

    async def load(
        self,
        ref: CheckpointRef,
        index: Index,
        level: CacheLevel,
        held: Held,
        report: Report | None = None,
    ) -> OnDevice:
        """The checkpoint's weights on devices, from its copy `held` in the tier `level`. Loads of
        one checkpoint share one copy; the last one to leave ends it.

        Raises:
            OutOfSpace: the devices have no room that is not in use.
            StoreUnavailable, CheckpointError, CorruptChunk: a chunk had to come from the store.
            LoadFailed: a tier or a device failed.
            Draining: the tier is closed.
        """
        while True:
            if self._closed:
                raise Draining("the agent is shutting down; ask another")
            flight = self._flights.get(ref.id)
            if flight is None:
                if (found := self._find(ref.id)) is not None:
                    return found
                flight = self._take_off(ref, index, level, held)
            if flight.joinable:
                return await flight.join(OnDevice.share, report, None)
            await outlast(flight.task)

    def weights_of(self, checkpoint: CheckpointId) -> Weights | None:
        """Its weights, also while they are still coming; see `Weights.follow`. Who uses them
        holds a reference, or waits for the load that brings them."""
        entry = self._entries.get(checkpoint)
        return None if entry is None else entry.weights

    async def evict(self, checkpoint: CheckpointId) -> int:
        """Drop weights that nobody uses; bytes freed."""
        entry = self._entries.get(checkpoint)
        if entry is None or entry.users:
            return 0
        await self._drop(checkpoint)
        return sum(span.size_bytes for span in entry.spans)

    def _find(self, checkpoint: CheckpointId) -> OnDevice | None:
        entry = self._entries.get(checkpoint)
        if entry is None or entry.weights is None:
            return None
        self._touch(entry)
        entry.users += 1
        return OnDevice(entry, entry.weights)

    def _take_off(
        self, ref: CheckpointRef, index: Index, level: CacheLevel, held: Held
    ) -> Flight[OnDevice]:
        source = held.share()  # the caller may leave before the others that wait
        flight = Flight(
            CacheLevel.DEVICE, lambda report, _: self._bring(ref, index, level, source, report)
        )
        self._flights[ref.id] = flight

        def landed(_: object) -> None:
            del self._flights[ref.id]
            source.release()

        flight.task.add_done_callback(landed)
        return flight

    async def _bring(
        self, ref: CheckpointRef, index: Index, level: CacheLevel, source: Held, report: Report
    ) -> OnDevice:
        entry = await self._reserve(ref.id, index)
        try:
            with disk_errors():
                entry.weights = await self._allocate(index, entry.spans)
                hops = await self._fill(ref, entry.weights, level, source, report)
        except BaseException:
            await finish(self._drop(ref.id))
            raise
        self._touch(entry)
        return OnDevice(entry, entry.weights, hops)

    async def _reserve(self, checkpoint: CheckpointId, index: Index) -> _Entry:
        """An entry with room on devices, which counts from now on."""
        while True:
            free = await self._copies.run(self._accelerator.free_bytes)
            try:
                spans = spread(index, self._room(free))
            except OutOfSpace:
                idle = [(e.last_used, id_) for id_, e in self._entries.items() if not e.users]
                if not idle:
                    raise
                await self._drop(min(idle)[1])
                EVICTIONS.inc(CacheLevel.DEVICE.tier)
            else:
                entry = self._entries[checkpoint] = _Entry(spans)
                self._report_usage()
                return entry

    def _room(self, free: Mapping[int, int]) -> dict[int, int]:
        """By device: bytes that fit the budget, and the device."""
        used = dict.fromkeys(self._budgets, 0)
        for entry in self._entries.values():
            for part in entry.spans:
                used[part.device] += part.size_bytes
        return {
            device: max(0, min(budget - used[device], free[device]))
            for device, budget in self._budgets.items()
        }

    async def _allocate(self, index: Index, spans: tuple[Span, ...]) -> Weights:
        return await self._copies.run_or_undo(Weights.free, self._allocate_all, index, spans)

    def _allocate_all(self, index: Index, spans: tuple[Span, ...]) -> Weights:
        parts: list[tuple[Span, Allocation]] = []
        try:
            for part in spans:
                allocation = self._accelerator.allocate(part.device, part.size_bytes)
                parts.append((part, allocation))
        except BaseException:
            for _, allocation in parts:
                allocation.free()
            raise
        return Weights(index, tuple(parts))

    async def _fill(
        self,
        ref: CheckpointRef,
        weights: Weights,
        level: CacheLevel,
        source: Held,
        report: Report,
    ) -> tuple[HopTiming, ...]:
        settings = self._settings
        remote = RemoteFile(
            self._store,
            ref.prefix,
            range_bytes=settings.range_bytes,
            ranges_in_flight_max=settings.ranges_in_flight_max,
        )
        moves = Moves(
            ref.id,
            weights.index,
            remote,
            self._copies,
            tries_max=settings.chunk_tries_max,
            staging=self._ring,
        )
        meter = Meter(self._clock, settings.progress_interval_s, report)
        hop = hop_name(level, CacheLevel.DEVICE)
        size = weights.index.size_bytes
        async with self._copies.leaving() as stack:
            move = _open(moves, weights, level, source, stack)

            async def moved(chunk: ChunkRange) -> None:
                await move(chunk)
                weights.arrived(chunk.number)
                meter.add(chunk.size_bytes)

            meter.begin(hop, size)
            with span("loader.copy", loud=True, hop=hop, checkpoint=ref.id) as measured:
                await for_each(chunk_ranges(weights.index), settings.copy_threads, moved)
                await self._copies.run(weights.settle)
                measured.note(bytes_moved=size)
            elapsed_s = meter.elapsed_s
        weights.end()
        hops = [self._speeds.record(hop, size, elapsed_s)]
        if moves.refetched_bytes:
            refetch = hop_name(CacheLevel.STORE, CacheLevel.DEVICE)
            hops.append(HopTiming(hop=refetch, bytes_moved=moves.refetched_bytes))
        return tuple(hops)

    async def _drop(self, checkpoint: CheckpointId) -> None:
        entry = self._entries.pop(checkpoint)
        if entry.weights is not None:
            await self._copies.run(entry.weights.free)
        self._report_usage()

    def _touch(self, entry: _Entry) -> None:
        self._uses += 1
        entry.last_used = self._uses

    def _report_usage(self) -> None:
        used = sum(part.size_bytes for entry in self._entries.values() for part in entry.spans)
        TIER_USED_BYTES.set(used, CacheLevel.DEVICE.tier)


def _open(
    moves: Moves, weights: Weights, level: CacheLevel, source: Held, stack: contextlib.ExitStack
) -> Callable[[ChunkRange], Awaitable[None]]:
    """Open the source, and say how a chunk gets from it to the device."""
    if level is CacheLevel.DRAM:
        dram = DramFile(source.fd, source.size_bytes)
        stack.callback(dram.close)
        return lambda chunk: moves.dram_to_device(chunk, dram, weights)
    nvme = DirectFile(source.path, os.O_RDONLY)
    stack.callback(nvme.close)
    return lambda chunk: moves.nvme_to_device(chunk, nvme, weights)

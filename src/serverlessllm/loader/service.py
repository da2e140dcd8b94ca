"""The loader: brings a checkpoint's bytes near, once, for everybody who wants them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel, TierUsage
from serverlessllm.core.errors import Draining, SLLMError
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.accelerator import Accelerator
from serverlessllm.loader.adoption import Leftovers, sweep
from serverlessllm.loader.arrivals import Arriving, OnArriving
from serverlessllm.loader.bring import Bringer
from serverlessllm.loader.budget import evict, trim
from serverlessllm.loader.device import attach
from serverlessllm.loader.device_tier import DeviceTier
from serverlessllm.loader.flights import Flight
from serverlessllm.loader.indexes import Indexes
from serverlessllm.loader.measure import measured_limits
from serverlessllm.loader.pipeline import Pipeline, Tier
from serverlessllm.loader.progress import LoadProgress, Report
from serverlessllm.loader.references import Brought, References, Resident
from serverlessllm.loader.residency import Held, TierDirectory
from serverlessllm.loader.settings import (
    LoaderSettings,
    default_dram_budget_bytes,
    default_dram_dir,
    default_nvme_budget_bytes,
)
from serverlessllm.loader.speeds import Speeds
from serverlessllm.loader.weights import Weights
from serverlessllm.loader.workers import Threads, outlast
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.telemetry import log, span
from serverlessllm.telemetry.table import LOADS, TIER_BUDGET_BYTES, TIER_USED_BYTES

__all__ = ["Arriving", "LoadProgress", "Loader", "Resident"]

_log = log("loader")
_FILE_THREADS = 2


class Loader:
    """The tiers of one node. Several processes of a machine may share the same directories.

    `accelerator`: the devices that weights end on; None for a CPU."""

    def __init__(
        self,
        settings: LoaderSettings,
        *,
        store: CheckpointStore,
        clock: Clock,
        data_dir: Path,
        accelerator: Accelerator | None = None,
    ) -> None:
        self._tiers = _tiers(settings, data_dir)
        self._dram = self._tiers[CacheLevel.DRAM]
        self._nvme = self._tiers[CacheLevel.NVME]
        self._flights: dict[CheckpointId, Flight[Brought]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False
        self._files = Threads(_FILE_THREADS, "loader-files")
        self._copies = Threads(settings.copy_threads, "loader-copies")
        self._indexes = Indexes(settings.indexes_cached_max)
        self._references = References()
        self._speeds = Speeds(store_is_local=store.root is not None)
        self._device = (
            DeviceTier(accelerator, settings, store, clock, self._speeds, self._copies)
            if accelerator is not None
            else None
        )
        self._leftovers = Leftovers(
            self._dram.directory,
            self._indexes,
            self._spawn,
            files=self._files,
            copies=self._copies,
            width=settings.copy_threads,
        )
        pipeline = Pipeline(
            settings, store, self._tiers, self._speeds, files=self._files, copies=self._copies
        )
        self._bringer = Bringer(
            settings,
            store,
            clock,
            self._tiers,
            indexes=self._indexes,
            leftovers=self._leftovers,
            pipeline=pipeline,
            references=self._references,
            files=self._files,
            spawn=self._spawn,
        )

    async def start(self) -> None:
        """Make the directories, remove what killed processes left, check leftovers (which are
        announced one by one as they verify; `settled` waits for the last)."""
        for tier in self._tiers.values():
            TIER_BUDGET_BYTES.set(tier.budget_bytes, tier.directory.level.tier)
            await self._files.run(tier.directory.prepare)
            kept = await self._files.run(sweep, tier.directory, self._indexes)
            if tier is self._dram:
                self._leftovers.unverified.update(dict.fromkeys(kept))
            await self._files.run(trim, tier.directory, tier.budget_bytes)
        if self._device is not None:
            await self._device.start()
        self._spawn(self._leftovers.check_all())
        self._spawn(self._measure())

    async def close(self) -> None:
        """Cancel running loads and background copies; give back pins. Files stay for the next."""
        self._closed = True
        while running := [*self._background, *(f.task for f in self._flights.values())]:
            for task in running:
                task.cancel()
            for task in running:
                await outlast(task)
            await asyncio.sleep(0)  # their callbacks run; a load that was done may write behind
        if self._device is not None:
            await self._device.close()
        self._references.unpin_all()
        self._files.close()
        self._copies.close()

    async def settled(self) -> None:
        """Return when nothing runs in the background: leftovers checked, copies written behind."""
        while self._background:
            await asyncio.wait(self._background)

    async def load(
        self,
        ref: CheckpointRef,
        level: CacheLevel,
        on_progress: Report | None = None,
        on_arriving: OnArriving | None = None,
    ) -> Resident:
        """Bring a checkpoint to `level` or nearer, and hold it there.

        Concurrent loads of one checkpoint share one copy. Cancelling a caller ends the copy only
        when no other waits for it. On a CPU, DEVICE is DRAM: an engine maps the file; on a node
        with an accelerator, the bytes also go there, from DRAM or nvme. From the store to DRAM,
        the nvme copy is written after the answer, from DRAM.

        `on_arriving` is called at most once, and only while this process fills the file in DRAM:
        once its length is reserved and before its first byte, or when joining later. An engine
        may begin on what has arrived; the checkpoint is held for it by its being filled, and by
        the `Resident` after that.

        Raises:
            ValueError: `level` is STORE.
            OutOfSpace: the tier's budget is too small, or all of it is in use.
            StoreUnavailable, CheckpointError, CorruptChunk: from the store.
            LoadFailed: another process held the checkpoint's load for too long; a disk error.
            Draining: the loader is closed.
        """
        if level is CacheLevel.STORE:
            raise ValueError("a load has a tier of this node as its target")
        with span("loader.load", checkpoint=ref.id, tier=level.tier):
            try:
                resident = await self._load(ref, level, on_progress, on_arriving)
            except SLLMError as error:
                LOADS.inc(error.code)
                raise
        LOADS.inc("ok")
        return resident

    def on_device(self, checkpoint: CheckpointId) -> Weights | None:
        """Its weights on devices, also while they are still coming: an engine of this process may
        begin on its first layers. Who uses them holds a `Resident`, or waits in `load`."""
        return None if self._device is None else self._device.weights_of(checkpoint)

    def residency(self) -> Mapping[CheckpointId, CacheLevel]:
        """The nearest verified tier (DRAM or NVME) of each checkpoint on this node."""
        levels: dict[CheckpointId, CacheLevel] = {}
        for tier in (self._nvme.directory, self._dram.directory):
            for file in tier.scan():
                unverified = self._leftovers.unverified if tier is self._dram.directory else ()
                if file.whole and file.checkpoint not in unverified:
                    levels[file.checkpoint] = tier.level
        return levels

    def usage(self) -> tuple[TierUsage, TierUsage]:
        """Of the DRAM tier and of the nvme tier; pinned is what this process holds."""
        return self._usage(self._dram), self._usage(self._nvme)

    def bandwidth(self) -> Mapping[str, float]:
        """Bytes/s by hop: what loads measured, or the machine's limit before the first."""
        return self._speeds.bandwidth()

    async def evict(self, checkpoint: CheckpointId, keep: CacheLevel) -> int:
        """Drop the copies nearer than `keep` that are neither in use nor pinned; bytes freed.

        With `keep` NVME, a copy that is still being written there is waited for.
        """
        if keep is CacheLevel.NVME:
            await self._bringer.written_behind(checkpoint)
        elif keep is CacheLevel.STORE:
            await self._bringer.stop_behind(checkpoint)
        freed = 0
        if keep > CacheLevel.DEVICE and self._device is not None:
            freed = await self._device.evict(checkpoint)
        return freed + sum(
            [
                await self._files.run(evict, tier.directory, checkpoint)
                for level, tier in self._tiers.items()
                if level < keep
            ]
        )

    async def pin(self, checkpoint: CheckpointId) -> None:
        """Keep whatever copies exist, and later ones, from eviction by any process."""
        self._references.pin(checkpoint)
        for level, tier in self._tiers.items():
            held = await self._files.run_or_undo(_release, tier.directory.hold, checkpoint)
            if held is not None:
                self._references.keep(level, held)
                held.release()

    async def unpin(self, checkpoint: CheckpointId) -> None:
        """Undo `pin`. Idempotent."""
        self._references.unpin(checkpoint)

    async def _load(
        self,
        ref: CheckpointRef,
        level: CacheLevel,
        on_progress: Report | None,
        on_arriving: OnArriving | None,
    ) -> Resident:
        """To devices, from the nearest copy; one on nvme need not come to DRAM first."""
        device = self._device if level is CacheLevel.DEVICE else None
        if device is None:
            return await self._join(ref, level, on_progress, on_arriving)
        near = self.residency().get(ref.id, CacheLevel.DRAM)
        resident = await self._join(ref, near, on_progress, on_arriving)
        try:
            held = resident.share()
            try:
                resident.put_on(
                    await device.load(ref, resident.index, resident.level, held, on_progress)
                )
            finally:
                held.release()
        except BaseException:
            resident.release()
            raise
        return resident

    async def _join(
        self,
        ref: CheckpointRef,
        level: CacheLevel,
        on_progress: Report | None,
        on_arriving: OnArriving | None,
    ) -> Resident:
        wanted = max(level, CacheLevel.DRAM)
        while True:
            if self._closed:
                raise Draining("the agent is shutting down; ask another")
            flight = self._flights.get(ref.id) or self._take_off(ref, wanted)
            if flight.joinable and flight.level <= wanted:
                return await flight.join(
                    lambda brought: self._refer(brought, level), on_progress, on_arriving
                )
            # Its last waiter has left, or it goes less far than this one must.
            await asyncio.wait((flight.task,))

    def _take_off(self, ref: CheckpointRef, wanted: CacheLevel) -> Flight[Brought]:
        flight = Flight(
            wanted,
            lambda report, announce: self._bringer.bring(ref, wanted, report, announce),
        )
        self._flights[ref.id] = flight
        flight.task.add_done_callback(lambda _: self._flights.pop(ref.id))
        return flight

    def _refer(self, brought: Brought, level: CacheLevel) -> Resident:
        hops = brought.hops
        if level is CacheLevel.DEVICE:  # of a CPU
            hops = (*hops, attach(self._speeds))
        return self._references.take(brought, hops)

    def _usage(self, tier: Tier) -> TierUsage:
        held = self._references.held(tier.directory.level)
        files = tier.directory.scan()
        used = sum(file.size_bytes for file in files)
        TIER_USED_BYTES.set(used, tier.directory.level.tier)
        return TierUsage(
            budget_bytes=tier.budget_bytes,
            used_bytes=used,
            pinned_bytes=sum(file.size_bytes for file in files if file.checkpoint in held),
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run in the background until `close`."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("background work failed", error=repr(error))

    async def _measure(self) -> None:
        try:
            self._speeds.limits = await self._files.run(measured_limits, self._nvme.directory.path)
        except (OSError, SLLMError) as error:
            _log.warning("the disk was not measured", error=repr(error))


def _tiers(settings: LoaderSettings, data_dir: Path) -> dict[CacheLevel, Tier]:
    dram = Path(settings.dram_dir) if settings.dram_dir else default_dram_dir(data_dir)
    nvme = Path(settings.nvme_dir) if settings.nvme_dir else data_dir / "nvme"
    dram_budget = settings.dram_budget_bytes
    nvme_budget = settings.nvme_budget_bytes
    if dram_budget is None:
        dram_budget = default_dram_budget_bytes(dram)
    if nvme_budget is None:
        nvme_budget = default_nvme_budget_bytes(nvme)
    return {
        CacheLevel.DRAM: Tier(
            directory=TierDirectory(CacheLevel.DRAM, dram), budget_bytes=dram_budget
        ),
        CacheLevel.NVME: Tier(
            directory=TierDirectory(CacheLevel.NVME, nvme), budget_bytes=nvme_budget
        ),
    }


def _release(held: Held | None) -> None:
    if held is not None:
        held.release()

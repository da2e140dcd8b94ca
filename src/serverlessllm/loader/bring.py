"""One load: look where the checkpoint is, plan, copy, look again if somebody else copied."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import LoadFailed, OutOfSpace, SLLMError
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.adoption import Leftovers, Spawn
from serverlessllm.loader.arrivals import OnArriving
from serverlessllm.loader.budget import Partial
from serverlessllm.loader.indexes import Indexes
from serverlessllm.loader.locks import is_being_written
from serverlessllm.loader.pipeline import Job, Pipeline, Tier
from serverlessllm.loader.plan import Copy, plan
from serverlessllm.loader.progress import QUEUE, Meter, Report
from serverlessllm.loader.references import Brought, References
from serverlessllm.loader.residency import Held, TierDirectory
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.workers import Threads, disk_errors, outlast
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.telemetry import log

_log = log("loader")


class Bringer:
    """Brings checkpoints near, and writes the nvme copies behind. `spawn` owns its tasks."""

    def __init__(
        self,
        settings: LoaderSettings,
        store: CheckpointStore,
        clock: Clock,
        tiers: Mapping[CacheLevel, Tier],
        *,
        indexes: Indexes,
        leftovers: Leftovers,
        pipeline: Pipeline,
        references: References,
        files: Threads,
        spawn: Spawn,
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._tiers = tiers
        self._indexes = indexes
        self._leftovers = leftovers
        self._pipeline = pipeline
        self._references = references
        self._files = files
        self._spawn = spawn
        self._behind: dict[CheckpointId, asyncio.Task[None]] = {}

    async def bring(
        self, ref: CheckpointRef, level: CacheLevel, report: Report, announce: OnArriving
    ) -> Brought:
        """`ref` at `level` or nearer, held; raises what `Loader.load` does. `announce` is called
        at most once: what this process fills in DRAM becomes whole, or the load fails."""
        meter = Meter(self._clock, self._settings.progress_interval_s, report)
        with disk_errors():
            brought = await self._bring(ref, max(level, CacheLevel.DRAM), meter, announce)
        self._references.keep(brought.tier.level, brought.held)
        return brought

    async def written_behind(self, checkpoint: CheckpointId) -> None:
        """Return when no copy of it is being written behind."""
        if checkpoint in self._behind:
            await asyncio.wait((self._behind[checkpoint],))

    async def stop_behind(self, checkpoint: CheckpointId) -> None:
        """Give up its copy that is being written behind."""
        if checkpoint in self._behind:
            self._behind[checkpoint].cancel()
            await outlast(self._behind[checkpoint])

    async def _bring(
        self, ref: CheckpointRef, wanted: CacheLevel, meter: Meter, announce: OnArriving
    ) -> Brought:
        await self._leftovers.check(ref.id)
        while True:
            found = await self._nearest(ref, wanted)
            if found is not None and found.tier.level <= wanted:
                return found
            try:
                brought = await self._copy(ref, wanted, found, meter, announce)
            finally:
                if found is not None:
                    found.release()
            if brought is not None:
                return brought
            await self._wait_for_peer(ref, wanted, meter)

    async def _nearest(self, ref: CheckpointRef, wanted: CacheLevel) -> Brought | None:
        """The nearest copy on this node, held."""
        for level in (CacheLevel.DRAM, CacheLevel.NVME):
            tier = self._tiers[level].directory
            found = await self._files.run_or_undo(_release, self._find, tier, ref, wanted)
            if found is not None:
                return found
        return None

    def _find(self, tier: TierDirectory, ref: CheckpointRef, wanted: CacheLevel) -> Brought | None:
        """Its copy in one tier; one that is not whole is removed instead. Blocks."""
        try:
            held = tier.hold(ref.id)
        except OSError as error:  # a failing disk must not stop loads from the store
            if tier.level is wanted:  # where no other copy has room beside this one
                raise
            _log.warning("a tier cannot be read", tier=tier.level.tier, error=repr(error))
            return None
        if held is None:
            return None
        index = self._indexes.of_tier(tier, ref.id)
        if index is None or held.size_bytes != index.size_bytes:
            held.release()
            tier.discard(ref.id)
            _log.warning("removed a broken copy", checkpoint=ref.id, tier=tier.level.tier)
            return None
        tier.touch(held)
        return Brought(held=held, tier=tier, index=index, hops=())

    async def _copy(
        self,
        ref: CheckpointRef,
        wanted: CacheLevel,
        found: Brought | None,
        meter: Meter,
        announce: OnArriving,
    ) -> Brought | None:
        """Carry out the plan; None when another process is doing so."""
        job = await self._job(ref, found)
        nearest = CacheLevel.STORE if found is None else found.tier.level
        budgets = {level: tier.budget_bytes for level, tier in self._tiers.items()}
        copy, *later = plan(job.index, nearest, wanted, budgets)
        source = None if found is None else found.held
        partial = await self._reserve(copy, job)
        if partial is None:
            return None
        filled = await self._pipeline.run(copy, job, source, partial, meter, announce)
        for copy in later:
            self._write_behind(copy, job, filled.held.share())
        tier = self._tiers[wanted].directory
        return Brought(held=filled.held, tier=tier, index=job.index, hops=filled.hops)

    async def _reserve(self, copy: Copy, job: Job) -> Partial | None:
        """Room in the target. Copies that are being written behind hold DRAM for a moment: their
        end is worth waiting for."""
        behind = tuple(self._behind.values())
        try:
            return await self._pipeline.reserve(copy, job)
        except OutOfSpace:
            if not behind:
                raise
            await asyncio.wait(behind)
            return await self._pipeline.reserve(copy, job)

    async def _job(self, ref: CheckpointRef, found: Brought | None) -> Job:
        data = None
        if found is not None:
            data = await self._files.run(found.tier.read_index, ref.id)
        if data is None:
            data = await self._store.read_index(ref.prefix)
        index = await self._files.run(self._indexes.decode, data, ref.id)
        return Job(ref=ref, index=index, index_bytes=data)

    def _write_behind(self, copy: Copy, job: Job, source: Held) -> None:
        if job.ref.id in self._behind:
            source.release()
            return
        task = self._spawn(self._behind_run(copy, job, source))
        self._behind[job.ref.id] = task
        task.add_done_callback(lambda _: self._behind_done(job.ref.id, source))

    def _behind_done(self, checkpoint: CheckpointId, source: Held) -> None:
        """Also of a task that was cancelled before it began."""
        del self._behind[checkpoint]
        source.release()

    async def _behind_run(self, copy: Copy, job: Job, source: Held) -> None:
        meter = Meter(self._clock, self._settings.progress_interval_s, _tell_nobody)
        try:
            with disk_errors():
                partial = await self._pipeline.reserve(copy, job)
                if partial is None:
                    return
                filled = await self._pipeline.run(copy, job, source, partial, meter)
        except SLLMError as error:  # the load itself succeeded; the next one is slower
            _log.warning("no nvme copy", checkpoint=job.ref.id, code=error.code)
            return
        self._references.keep(copy.target, filled.held)
        filled.held.release()

    async def _wait_for_peer(self, ref: CheckpointRef, wanted: CacheLevel, meter: Meter) -> None:
        """Return when whoever fills the tier's copy has let go of it: finished, or died.

        The lock has no event that a waiter could leave: a blocked `flock` would outlive it.
        """
        meter.begin(QUEUE, ref.size_bytes)
        partial = self._tiers[wanted].directory.partial_path(ref.id)
        wait_s_max = self._settings.peer_wait_s_max
        until_s = self._clock.now_s() + wait_s_max
        while await self._files.run(is_being_written, partial):
            if self._clock.now_s() >= until_s:
                raise LoadFailed(
                    f"another process of this machine has been loading the checkpoint for over "
                    f"{wait_s_max:.0f} s: see what it waits for, or raise loader.peer_wait_s_max",
                    retry_after_s=5.0,
                )
            await self._clock.sleep(self._settings.peer_poll_s)


def _release(found: Brought | None) -> None:
    if found is not None:
        found.release()


def _tell_nobody(_progress: object) -> None:
    """Nobody waits for a copy that is written behind."""

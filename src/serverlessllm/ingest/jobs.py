"""An ingest job in the cluster: claimed by one, followed by the others, taken over when it dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import JobRecord, JobStage
from serverlessllm.core.errors import (
    Conflict,
    Fenced,
    InvalidRequest,
    MetadataUnavailable,
    ModelNotFound,
    SLLMError,
)
from serverlessllm.core.failures import error_of, record_of
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.ingest.conversion import Conversion
from serverlessllm.ingest.leftovers import sweep
from serverlessllm.ingest.messages import WorkRequest
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.ingest.space import WorkSpace
from serverlessllm.metadata.base import ABSENT, LeaseLost
from serverlessllm.metadata.registry import JobChanged, JobClaim, Registry, Resync
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.telemetry.logs import log
from serverlessllm.telemetry.spans import span
from serverlessllm.telemetry.table import INGEST_BYTES, INGESTS

_log = log("ingest")

OnProgress = Callable[[JobRecord], None]


class Runner(msgspec.Struct, frozen=True, kw_only=True):
    """What every job of a process needs."""

    registry: Registry
    store: CheckpointStore
    settings: IngestSettings
    clock: Clock
    owner: str
    """Of this process's claims; another name for every process and start."""
    work_dir: Path
    space: WorkSpace
    turns: asyncio.Semaphore
    """Conversions at once: following somebody else's job takes no turn."""


async def run_job(
    runner: Runner, model: ModelId, spec: ModelSpec, on_progress: OnProgress
) -> ModelRecord:
    """Return when the model's checkpoint is published: by us, or by whoever has the job.

    Raises:
        ModelNotFound: it was registered, and was deleted before it was published.
        SLLMError: why the job failed, here or there.
    """
    registered = False
    for _ in range(runner.settings.claims_max):
        stored = await runner.registry.get_model(model)
        registered = registered or stored is not None
        if stored is not None and await _is_published(runner, stored.record, spec):
            return stored.record
        async with runner.turns:
            try:
                taken = await runner.registry.claim_job(
                    model, runner.owner, runner.settings.lease_s
                )
            except LeaseLost:
                continue  # we were stopped for longer than a lease, right in there
            if isinstance(taken, JobClaim):
                try:
                    owned = _Owned(runner, taken, spec, on_progress, registered=registered)
                    return await owned.run()
                except Fenced:
                    _log.warning("claim lost", model=model, epoch=taken.epoch)
                    continue
        ended = await _followed(runner, model, taken, on_progress)
        if ended is not None and ended.error is not None:
            raise error_of(ended.error)
        await sweep(runner.work_dir, runner.store)  # of a claim that we once lost to them
    raise Fenced(
        f"the ingest of {model} lost its owner {runner.settings.claims_max} times: check that the "
        "machines' clocks run and the metadata store answers"
    )


async def _is_published(runner: Runner, record: ModelRecord, spec: ModelSpec) -> bool:
    """Whether the record names a checkpoint of this source that the store still has."""
    if record.checkpoint is None or record.spec.source != spec.source:
        return False
    return await runner.store.find(record.checkpoint.prefix) == record.checkpoint


async def _followed(
    runner: Runner, model: ModelId, seen: JobRecord, on_progress: OnProgress
) -> JobRecord | None:
    """The final record of somebody else's job; None when its owner died or gave it up."""
    on_progress(seen)
    snapshot = await runner.registry.snapshot()
    now = next((job for job in snapshot.jobs if job.model == model), None)
    if now is None or _is_final(now):
        return now
    async with aclosing(runner.registry.watch(snapshot.revision)) as changes:
        async for change in changes:
            match change:
                case JobChanged(model=changed, job=job) if changed == model:
                    if job is None or _is_final(job):
                        return job
                    on_progress(job)
                case Resync():
                    return None  # claiming again tells where it stands
                case _:
                    pass
    return None


def _is_final(job: JobRecord) -> bool:
    return job.stage in {JobStage.DONE, JobStage.FAILED}


class _Owned:
    """A job that this process has claimed; `registered`: the model was, when it was asked for."""

    def __init__(
        self,
        runner: Runner,
        claim: JobClaim,
        spec: ModelSpec,
        on_progress: OnProgress,
        *,
        registered: bool,
    ) -> None:
        self._runner = runner
        self._claim = claim
        self._spec = spec
        self._on_progress = on_progress
        self._was_registered = registered
        self._record = JobRecord(
            model=claim.model, owner=claim.owner, epoch=claim.epoch, stage=JobStage.RESOLVING
        )
        self._changed = asyncio.Event()
        self._kept_s = runner.clock.now_s()

    async def run(self) -> ModelRecord:
        """Work under the claim; without it, stop. Raises Fenced when it is lost."""
        registry = self._runner.registry
        try:
            self._on_progress(self._record)
            if self._was_registered and self._claim.model_revision == ABSENT:
                raise ModelNotFound(
                    f"model {self._claim.model} was deleted before its ingest began", param="model"
                )
            with span("ingest.job", model=self._claim.model) as stage:
                ref = await self._work_while_ours()
                stage.note(bytes_moved=ref.size_bytes)
            spec = await self._current_spec()
            stored = await registry.publish_model(
                self._claim, ModelRecord(spec=spec, checkpoint=ref)
            )
            INGEST_BYTES.inc(by=ref.size_bytes)
            await self._finish(JobStage.DONE, None)
        except (Fenced, asyncio.CancelledError):
            await self._give_up()
            raise
        except SLLMError as error:
            await self._finish(JobStage.FAILED, error)
            raise
        except BaseException:
            await self._give_up()
            raise
        return stored.record

    async def _current_spec(self) -> ModelSpec:
        """What the operator wants by now. Raises Conflict when it is another source."""
        stored = await self._runner.registry.get_model(self._claim.model)
        if stored is None:
            return self._spec
        if stored.record.spec.source != self._spec.source:
            raise Conflict(
                f"model {self._claim.model} got another source while it was ingested: try again"
            )
        return stored.record.spec

    async def _work_while_ours(self) -> CheckpointRef:
        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep())
                writer = group.create_task(self._write())
                ref = await self._conversion(await self._registered()).run()
                keeper.cancel()
                writer.cancel()
        except ExceptionGroup as failures:
            raise _first(failures) from None
        return ref

    async def _registered(self) -> CheckpointRef | None:
        """What the model's record names as the checkpoint of this source."""
        stored = await self._runner.registry.get_model(self._claim.model)
        if stored is None or stored.record.spec.source != self._spec.source:
            return None
        return stored.record.checkpoint

    def _conversion(self, registered: CheckpointRef | None) -> Conversion:
        runner = self._runner
        if self._spec.source is None:
            raise InvalidRequest(f"model {self._claim.model} has no source", param="source")
        return Conversion(
            WorkRequest(
                model=self._claim.model,
                source=self._spec.source,
                settings=runner.settings,
                parent=os.getpid(),
            ),
            store=runner.store,
            work_dir=runner.work_dir,
            space=runner.space,
            clock=runner.clock,
            registered=registered,
            observe=self._observe,
            before_publish=lambda: runner.registry.update_job(self._claim, self._record),
        )

    def _observe(self, stage: JobStage, bytes_done: int, bytes_total: int | None) -> None:
        self._record = msgspec.structs.replace(
            self._record, stage=stage, bytes_done=bytes_done, bytes_total=bytes_total
        )
        self._changed.set()
        self._on_progress(self._record)

    async def _keep(self) -> None:
        """Keep the lease. A metadata store that is away costs us the claim only in time."""
        runner = self._runner
        while True:
            await runner.clock.sleep(runner.settings.lease_s / 3)
            try:
                await runner.registry.keep_job(self._claim)
                self._kept_s = runner.clock.now_s()
            except MetadataUnavailable:
                if runner.clock.now_s() - self._kept_s >= runner.settings.lease_s:
                    raise Fenced(
                        f"the ingest of {self._claim.model} could not keep its lease"
                    ) from None

    async def _write(self) -> None:
        """Write progress when there is some, at most every `progress_interval_s`."""
        runner = self._runner
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await runner.registry.update_job(self._claim, self._record)
            except MetadataUnavailable:
                self._changed.set()  # `_keep` decides how long that may last
            await runner.clock.sleep(runner.settings.progress_interval_s)

    async def _finish(self, stage: JobStage, error: SLLMError | None) -> None:
        """Record how it ended; that it cannot be recorded does not change how it ended."""
        record = msgspec.structs.replace(
            self._record, stage=stage, error=record_of(error) if error is not None else None
        )
        self._on_progress(record)
        INGESTS.inc("ok" if error is None else error.code)
        try:
            await self._runner.registry.finish_job(self._claim, record)
        except (Fenced, MetadataUnavailable) as lost:
            _log.warning("job's end not recorded", model=self._claim.model, reason=lost.code)

    async def _give_up(self) -> None:
        try:
            await self._runner.registry.release_job(self._claim)
        except MetadataUnavailable:
            return  # then the lease runs out


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    """The failure that counts: that the claim is lost, before what happened because of it."""
    flat = [
        _first(failure) if isinstance(failure, ExceptionGroup) else failure
        for failure in failures.exceptions
    ]
    return next((failure for failure in flat if isinstance(failure, Fenced)), flat[0])

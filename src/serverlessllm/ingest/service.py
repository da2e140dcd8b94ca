"""The one door to ingestion: `ensure` that a model has a published checkpoint."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from pathlib import Path

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import JobRecord
from serverlessllm.core.errors import (
    Conflict,
    Draining,
    InvalidRequest,
    SLLMError,
    TooManyRequests,
)
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.ingest.jobs import OnProgress, Runner, run_job
from serverlessllm.ingest.leftovers import sweep
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.ingest.space import WorkSpace
from serverlessllm.metadata.registry import Registry
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.telemetry.logs import log

_log = log("ingest")


class _Failure(msgspec.Struct, frozen=True, kw_only=True):
    error: SLLMError
    source: str
    until_s: float


class _Job:
    """One running job and who wants to hear of it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.listeners: list[OnProgress] = []
        self.last: JobRecord | None = None
        self.task: asyncio.Task[ModelRecord] | None = None

    def tell(self, record: JobRecord) -> None:
        self.last = record
        for listener in tuple(self.listeners):
            listener(record)


class Ingestion:
    """Single flight in this process by a table of tasks, in the cluster by the job's claim."""

    def __init__(
        self,
        registry: Registry,
        store: CheckpointStore,
        settings: IngestSettings,
        clock: Clock,
        *,
        work_dir: Path,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._runner = Runner(
            registry=registry,
            store=store,
            settings=settings,
            clock=clock,
            owner=f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}",
            work_dir=work_dir,
            space=WorkSpace(work_dir, settings.space_margin_bytes),
            turns=asyncio.Semaphore(settings.jobs_max),
        )
        self._jobs: dict[ModelId, _Job] = {}
        self._failures: dict[ModelId, _Failure] = {}
        self._closing = False

    async def start(self) -> None:
        """Make the work directory; remove what a killed process had finished."""
        await asyncio.to_thread(self._runner.work_dir.mkdir, 0o700, True, True)
        await sweep(self._runner.work_dir, self._runner.store)

    async def close(self) -> None:
        """Stop the jobs: their claims are given up, their work is gone on with later."""
        self._closing = True
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ensure(
        self, model: ModelId, spec: ModelSpec, on_progress: OnProgress | None = None
    ) -> ModelRecord:
        """Return when the model's checkpoint is published and registered.

        Any number may wait for one model: one job runs, in the whole cluster. A caller that is
        cancelled leaves; the job goes on to its end.

        Raises:
            InvalidRequest: the spec has no source.
            Conflict: another source of this model is being ingested right now.
            TooManyRequests: this process has `jobs_waiting_max` jobs already.
            SLLMError: why the job failed; the same for everybody, and for `failure_cache_s` for
                who comes later.
        """
        if spec.source is None:
            raise InvalidRequest(f"model {model} has no source to ingest from", param="source")
        self._refuse_failed(model, spec.source)
        job = self._jobs.get(model) or self._begin(model, spec, spec.source)
        if job.source != spec.source:
            raise Conflict(f"model {model} is being ingested from another source; try again later")
        assert job.task is not None
        if on_progress is not None:
            job.listeners.append(on_progress)
            if job.last is not None:
                on_progress(job.last)
        try:
            return await asyncio.shield(job.task)
        except SLLMError as error:
            raise again(error) from None
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise Draining("this server is shutting down; the ingest goes on later") from None
        finally:
            if on_progress is not None:
                job.listeners.remove(on_progress)

    def _begin(self, model: ModelId, spec: ModelSpec, source: str) -> _Job:
        if self._closing:
            raise Draining("this server is shutting down; another one will ingest the model")
        if len(self._jobs) >= self._settings.jobs_waiting_max:
            raise TooManyRequests(
                "too many models are being ingested: try again later", retry_after_s=30.0
            )
        job = self._jobs[model] = _Job(source)
        job.task = asyncio.create_task(
            run_job(self._runner, model, spec, job.tell), name=f"ingest {model}"
        )
        job.task.add_done_callback(lambda task: self._end(model, source, task))
        return job

    def _end(self, model: ModelId, source: str, task: asyncio.Task[ModelRecord]) -> None:
        del self._jobs[model]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SLLMError):
            self._failures[model] = _Failure(
                error=error,
                source=source,
                until_s=self._clock.now_s() + self._settings.failure_cache_s,
            )
        elif error is not None:
            _log.error("ingest failed by a bug", model=model, exc_info=error)

    def _refuse_failed(self, model: ModelId, source: str) -> None:
        now_s = self._clock.now_s()
        for name in [name for name, failure in self._failures.items() if failure.until_s <= now_s]:
            del self._failures[name]
        failure = self._failures.get(model)
        if failure is not None and failure.source == source:
            raise again(failure.error)


def again(error: SLLMError) -> SLLMError:
    """The same error for another waiter: an exception belongs to the one who raises it."""
    copy = error.__class__.__new__(error.__class__)
    SLLMError.__init__(copy, error.message, param=error.param, retry_after_s=error.retry_after_s)
    return copy

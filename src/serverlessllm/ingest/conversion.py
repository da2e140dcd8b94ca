"""One checkpoint: a converter process, and the upload that follows what it writes.

Fetching, converting and publishing overlap: the worker reads ranges ahead of itself, and each
chunk it has written goes to the store while it writes the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import JobStage
from serverlessllm.core.errors import SLLMError, Unavailable
from serverlessllm.core.failures import error_of, single_error
from serverlessllm.core.models import CheckpointRef
from serverlessllm.ingest.errors import SourceChanged, WorkerCrashed
from serverlessllm.ingest.leftovers import remove_folder, work_folder
from serverlessllm.ingest.messages import Done, Failed, Progress, Resolved, WorkRequest
from serverlessllm.ingest.process import WorkerGone, WorkerProcess
from serverlessllm.ingest.space import WorkSpace
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.layout import prefix_of
from serverlessllm.store.upload import Upload
from serverlessllm.telemetry.logs import log

_log = log("ingest")

Observe = Callable[[JobStage, int, int | None], None]
"""Told the stage, the bytes that are done, and the bytes in all once they are known."""


class Conversion:
    """Makes and publishes the checkpoint of one model. `run` is called once.

    `registered` is what the model's record names so far: a store that holds anything else under
    its prefix is damaged. `before_publish` is awaited right before the `.idx` is created: what it
    raises stops that.
    """

    def __init__(
        self,
        request: WorkRequest,
        *,
        store: CheckpointStore,
        work_dir: Path,
        space: WorkSpace,
        clock: Clock,
        registered: CheckpointRef | None,
        observe: Observe,
        before_publish: Callable[[], Awaitable[None]],
    ) -> None:
        self._request = request
        self._settings = request.settings
        self._store = store
        self._work_dir = work_dir
        self._space = space
        self._clock = clock
        self._registered = registered
        self._observe = observe
        self._before_publish = before_publish
        self._folder: Path | None = None
        self._done_bytes = 0
        self._ready: tuple[Path, int] | None = None
        self._more = asyncio.Event()

    async def run(self) -> CheckpointRef:
        """Convert and publish; a converter that dies is started again where it was.

        Raises:
            SLLMError: of the source, the checkpoint, the disk or the store. The work folder
                stays when a later try can go on with it.
        """
        crashes, best_bytes = 0, -1
        pause_s = self._settings.worker_retry_min_s
        while True:
            try:
                return await self._attempt()
            except WorkerGone as gone:
                if self._done_bytes > best_bytes:
                    crashes, best_bytes = 0, self._done_bytes
                    pause_s = self._settings.worker_retry_min_s
                crashes += 1
                self._note_crash(gone, crashes)
            except SLLMError as error:
                if self._folder is not None and not _may_go_on(error):
                    await remove_folder(self._folder)
                raise
            if crashes >= self._settings.worker_crashes_max:
                raise WorkerCrashed(
                    f"model {self._request.model}: the converter died {crashes} times at the same "
                    "place; the server's log has its last lines"
                )
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, self._settings.worker_retry_max_s)

    async def _attempt(self) -> CheckpointRef:
        async with WorkerProcess(self._request, self._clock) as worker:
            resolved = await worker.report()
            if isinstance(resolved, Failed):
                raise _failure(resolved)
            if not isinstance(resolved, Resolved):
                raise WorkerGone("spoke out of turn", "")
            prefix = prefix_of(self._request.model, resolved.revision)
            self._folder = folder = work_folder(self._work_dir, prefix)
            ref = await self._published(prefix)
            if ref is None:
                with self._space.reserve(resolved.source_bytes, folder):
                    ref = await self._publish_behind(worker, prefix, resolved.source_bytes)
        await remove_folder(folder)
        return ref

    async def _published(self, prefix: str) -> CheckpointRef | None:
        """What the store holds already; a damaged checkpoint is removed, to be made again."""
        ref = await self._store.find(prefix)
        registered = self._registered
        if ref is not None and (
            registered is None or registered.prefix != prefix or ref == registered
        ):
            return ref
        if await self._store.head(prefix) is not None:
            _log.warning("removes a damaged checkpoint from the store", prefix=prefix)
            await self._store.delete(prefix)
        return None

    async def _publish_behind(
        self, worker: WorkerProcess, prefix: str, size_bytes: int
    ) -> CheckpointRef:
        assert self._folder is not None
        async with self._store.upload(prefix, size_bytes) as upload:
            self._observe(JobStage.CONVERTING, 0, size_bytes)
            await worker.proceed(str(self._folder))
            done = await self._follow(worker, upload)
            self._observe(JobStage.PUBLISHING, done.size_bytes, done.size_bytes)
            index = await asyncio.to_thread(Path(done.idx_path).read_bytes)
            await self._before_publish()
            return await upload.publish(Path(done.bin_path), index)

    async def _follow(self, worker: WorkerProcess, upload: Upload) -> Done:
        """Listen to the worker, and send what it has finished; until it is done."""
        with single_error():
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(self._send(upload))
                done = await self._listen(worker)
                self._ready = None
                self._more.set()
                await sender
        return done

    async def _listen(self, worker: WorkerProcess) -> Done:
        while True:
            report = await worker.report()
            match report:
                case Progress():
                    self._done_bytes = report.bytes_done
                    self._ready = (Path(report.path), report.bytes_done)
                    self._more.set()
                    self._observe(JobStage.CONVERTING, report.bytes_done, report.bytes_total)
                case Done():
                    return report
                case Failed():
                    raise _failure(report)
                case Resolved():
                    raise WorkerGone("spoke out of turn", "")

    async def _send(self, upload: Upload) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            if self._ready is None:
                return
            await upload.advance(*self._ready)

    def _note_crash(self, gone: WorkerGone, crashes: int) -> None:
        _log.warning(
            "converter died",
            model=self._request.model,
            how=gone.how,
            crashes=crashes,
            stderr_tail=gone.log_tail,
        )


def _failure(report: Failed) -> SLLMError:
    error = error_of(report.error)
    error.param = report.param
    error.retry_after_s = report.retry_after_s
    return error


def _may_go_on(error: SLLMError) -> bool:
    """Whether the same conversion may get further later."""
    lasting = error.permanent or isinstance(error, SourceChanged)
    return isinstance(error, Unavailable) and not lasting

"""The weights of one instance: their load, and what an engine gets that begins before its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from serverlessllm.agent.arrivals import ArrivalsPipe
from serverlessllm.agent.downloads import Downloads
from serverlessllm.agent.instance import Instance
from serverlessllm.backends.base import ARRIVALS_FD, WEIGHTS_FD
from serverlessllm.checkpoint.index import IDX_NAME, Index
from serverlessllm.core.agentapi import HopTiming, LoadEvent
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import LoadFailed, SLLMError
from serverlessllm.loader.arrivals import Arriving
from serverlessllm.loader.progress import QUEUE, LoadProgress
from serverlessllm.loader.references import Resident
from serverlessllm.telemetry import log, span

_log = log("agent")


class Weights:
    """An instance's checkpoint, on its way to DRAM or there and held; or none, for a model
    without one."""

    def __init__(self, instance: Instance, downloads: Downloads, clock: Clock) -> None:
        self._instance = instance
        self._downloads = downloads
        self._clock = clock
        self._arriving: Arriving | None = None
        self._resident: Resident | None = None
        self._file = -1
        """What the checkpoint fills, read-only."""
        self._pipe: ArrivalsPipe | None = None
        self.known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the index is known although the bytes still move; not without that."""

    @property
    def index(self) -> Index | None:
        """Once it is known."""
        known = self._resident or self._arriving
        return None if known is None else known.index

    @property
    def arriving(self) -> bool:
        """Whether an engine that starts now has to wait for what it needs."""
        return self._resident is None and self._file >= 0

    @property
    def bin_path(self) -> Path | None:
        known = self._resident or self._arriving
        return None if known is None else known.bin_path

    async def load(self) -> None:
        """Bring them to DRAM.

        Raises:
            SLLMError: what `Loader.load` raises; an engine that was started has been killed then.
        """
        instance = self._instance
        asked_s = self._clock.now_s()
        instance.queue_s = asked_s - instance.queued_s
        if instance.checkpoint is None:
            return
        try:
            with span("agent.load", model=instance.model):
                self._resident, waited_s = await self._downloads.load(
                    instance.checkpoint,
                    CacheLevel.DRAM,
                    self._report,
                    urgent=True,
                    on_arriving=self._arrives,
                )
        except SLLMError:
            instance.load_failed = True
            if instance.process is not None:  # what it waits for will never come
                instance.process.kill()
            raise
        instance.queue_s = asked_s - instance.queued_s + waited_s
        instance.became_whole(self._resident.hops, self._clock.now_s())
        if self._pipe is not None:
            self._pipe.finish()
        self._close_file()

    async def index_path(self, run_dir: Path) -> Path | None:
        """The `.idx`: beside the `.bin`, or, while that is not whole, a copy in `run_dir`."""
        if self._resident is None and self._arriving is not None:
            path = run_dir / IDX_NAME
            await asyncio.to_thread(path.write_bytes, self._arriving.index_bytes)
            return path
        return None if self._resident is None else self._resident.index_path

    def lend(self, lent: contextlib.ExitStack) -> dict[str, int]:
        """What an engine inherits that may begin before everything is there, by the name of its
        variable; `lent` closes our copies.

        Raises:
            LoadFailed: the agent has too many open files.
        """
        try:
            if self._resident is not None:
                whole = os.open(self._resident.bin_path, os.O_RDONLY | os.O_CLOEXEC)
                lent.callback(os.close, whole)
                return {WEIGHTS_FD: whole}
            if self._arriving is None:
                return {}
            self._pipe = ArrivalsPipe(self._arriving)
        except OSError as error:
            raise LoadFailed(
                f"the engine cannot be told of its weights ({error.strerror})", retry_after_s=5.0
            ) from error
        self._instance.arriving = True
        lent.callback(os.close, self._pipe.read_end)
        lent.callback(os.close, self._file)
        file, self._file = self._file, -1
        return {WEIGHTS_FD: file, ARRIVALS_FD: self._pipe.read_end}

    def hang_up(self) -> None:
        """Tell the engine nothing more: it need not wait for what has not arrived. Idempotent."""
        if self._pipe is not None:
            self._pipe.close()

    def release(self) -> None:
        """The load has ended and so has the engine: give everything back."""
        self.hang_up()
        self._close_file()
        if self._resident is not None:
            self._resident.release()

    def _arrives(self, arriving: Arriving) -> None:
        try:
            self._file = arriving.open()
        except OSError as error:  # the engine starts later, then
            _log.warning("not started early", instance=self._instance.id, error=repr(error))
            return
        self._arriving = arriving
        self._instance.queue_s = self._clock.now_s() - self._instance.queued_s
        self.known.set_result(None)

    def _report(self, progress: LoadProgress) -> None:
        instance = self._instance
        if progress.hop != QUEUE:
            instance.moved = (
                HopTiming(
                    hop=progress.hop, bytes_moved=progress.bytes_done, seconds=progress.elapsed_s
                ),
            )
        instance.progressed(
            LoadEvent(
                state=instance.state,
                stage=progress.hop,
                bytes_done=progress.bytes_done,
                bytes_total=progress.bytes_total,
                eta_s=progress.eta_s,
            )
        )

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

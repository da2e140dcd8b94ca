"""The main process's side of `--workers N`: N processes that serve one port, kept alive.

Each place has sockets of its own on the port and one worker at a time, and one task that starts the
next one when that ends or is told to leave. A worker that crashes is started again at once, then
with growing pauses; while a pause lasts, the place's sockets are closed, so that the kernel sends
its clients to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.rest.quota import Quotas
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.waits import settled
from serverlessllm.orchestrator.workers.hearing import Hearing
from serverlessllm.orchestrator.workers.messages import (
    FromWorker,
    KeysSpent,
    RenewCertificate,
    Start,
    frame,
)
from serverlessllm.orchestrator.workers.ports import Port, reserve
from serverlessllm.orchestrator.workers.process import WorkerProcess
from serverlessllm.orchestrator.workers.publisher import Publisher
from serverlessllm.orchestrator.workers.sharing import share_spent
from serverlessllm.telemetry.figures import Figures, collect, counted, render, total
from serverlessllm.telemetry.logs import log
from serverlessllm.telemetry.table import WORKER_CRASHES, WORKERS

_log = log("workers")
_CRASHES_IN_A_ROW = 5
"""So many without a life in between are a loop."""
_LIFE_S = 60.0
"""Who lived so long did not end of what ended those before it."""
_END_S_MAX = 5.0
"""For a killed process to be gone."""


def worker_count(settings: OrchestratorSettings) -> int:
    """How many processes serve clients; 1: the main process alone."""
    return settings.workers or len(os.sched_getaffinity(0))


class _Place:
    """One of the N: who has it now, and how its last ones ended."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker: WorkerProcess | None = None
        self.sockets: list[socket.socket] = []
        self.crashes = 0
        """In a row."""

    @property
    def serves(self) -> bool:
        worker = self.worker
        return worker is not None and worker.listening.done() and not worker.left.done()

    def close(self) -> None:
        while self.sockets:
            self.sockets.pop().close()


class Workers:
    """Owns the processes, their sockets and the tasks that keep them."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        template: Start,
        view: ClusterView,
        room: WaitingRoom,
        quotas: Quotas,
        clock: Clock,
    ) -> None:
        """`template` is what every worker is told first, but for its number, the address and its
        sockets."""
        self._settings = settings
        self._template = template
        self._quotas = quotas
        self._clock = clock
        self._hearing = Hearing(view, room, quotas)
        self._publisher = Publisher(view)
        view.observer = self._publisher
        self._places = [_Place(number) for number in range(worker_count(settings))]
        self._port: Port | None = None
        self._processes: set[WorkerProcess] = set()
        """Those that have not ended, the leaving ones among them."""
        self._tasks: list[asyncio.Task[None]] = []
        self._gone: Figures = ()
        """Counts of those that have ended."""

    async def start(self, listen: Address) -> Address:
        """Return when every worker serves the address; the address in fact.

        Raises:
            ValueError: the address is a unix socket, or a worker refuses its settings.
            OSError: the address cannot be had, or a worker ended.
        """
        port = self._port = await reserve(listen)
        for place in self._places:
            await self._start(place)
        for place in self._places:
            assert place.worker is not None
            await self._until_listening(place.worker)
        for place in self._places:
            task = asyncio.create_task(self._keep(place), name=f"worker {place.number}")
            self._tasks.append(task)
        share = share_spent(self._quotas, self._share, self._clock, self._settings.worker_share_s)
        self._tasks.append(asyncio.create_task(self._watch(), name="workers' watch"))
        self._tasks.append(asyncio.create_task(share, name="sharing"))
        return port.address

    def not_ready(self) -> str:
        """Why no request can come in; empty when some can."""
        if any(place.serves for place in self._places):
            return ""
        return "no worker serves clients; the log says why"

    @property
    def pids(self) -> list[int]:
        """Of the workers that serve, by place."""
        return [place.worker.pid for place in self._places if place.worker and place.serves]

    def waiting_for(self) -> dict[ModelId, int]:
        """Requests that wait in this process, by model."""
        return self._hearing.waiting_for()

    def renew_certificate(self) -> None:
        """Have every worker read the certificate's files again."""
        for process in self._processes:
            process.tell(RenewCertificate())

    async def metrics(self) -> bytes:
        """Of this process and all workers, those that have ended included: what was counted never
        goes back. A worker that does not answer in time is shown as it was."""
        asked = [asyncio.ensure_future(each.ask_figures()) for each in self._processes]
        if asked:
            answers = asyncio.gather(*asked, return_exceptions=True)
            try:
                await settled(self._clock, answers, self._settings.worker_figures_s_max)
            finally:
                for each in asked:
                    each.cancel()
                await answers
        serving = sum(place.serves for place in self._places)
        WORKERS.set(serving, "serving")
        WORKERS.set(len(self._processes) - serving, "coming or going")
        told = [each.figures for each in self._processes]
        gone = self._gone
        return await asyncio.to_thread(lambda: render(total([collect(), gone, *told])))

    async def drain(self) -> None:
        """Return when every worker has finished what it had, or its time is over."""
        await self._stop_keeping()
        processes = tuple(self._processes)
        for process in processes:
            process.drain()
        self._close_sockets()
        if processes:
            ended = asyncio.gather(*(process.ended for process in processes))
            await settled(self._clock, asyncio.shield(ended), self._drain_s_max)
        await self.close()

    async def close(self) -> None:
        """End all workers at once. Idempotent."""
        await self._stop_keeping()
        self._close_sockets()
        for process in tuple(self._processes):
            process.signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S_MAX):
                    await asyncio.shield(process.ended)
        await self._hearing.close()
        if self._port is not None:
            self._port.close()
            self._port = None

    @property
    def _drain_s_max(self) -> float:
        """A worker's own deadlines, and time to be late."""
        edge = self._template.edge
        finish_s = self._settings.drain_finish_s
        return edge.drain_accept_s + finish_s + edge.drain_cut_s + _END_S_MAX

    async def _stop_keeping(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _close_sockets(self) -> None:
        """Ours: a worker has its own copies, and with the last copy a listener ends."""
        for place in self._places:
            place.close()

    async def _start(self, place: _Place) -> None:
        """A new process for the place.

        Raises:
            OSError: it, or a socket for it, cannot be had.
        """
        assert self._port is not None
        if not place.sockets:
            place.sockets = self._port.share()
        process = WorkerProcess(self._publisher, self._heard, self._clock.now_s)
        start = msgspec.structs.replace(
            self._template,
            number=place.number,
            listen=self._port.address,
            listeners=tuple(each.fileno() for each in place.sockets),
        )
        await process.start(start, place.sockets)
        process.tell(KeysSpent(spent=self._quotas.missing()))
        self._processes.add(process)
        process.ended.add_done_callback(lambda _: self._ended(process))
        place.worker = process

    async def _until_listening(self, process: WorkerProcess) -> None:
        """Raises OSError or ValueError when it does not come to that."""
        limit_s = self._settings.worker_start_s_max
        if not await settled(self._clock, process.listening, limit_s):
            process.signal(signal.SIGKILL)
            raise OSError(f"a worker did not listen within {limit_s:g} s")
        if process.listening.cancelled():
            raise OSError(
                f"a worker ended with status {await process.ended} before it listened; its last "
                "words are on stderr"
            )
        process.listening.result()

    async def _keep(self, place: _Place) -> None:
        """For as long as nobody cancels this, somebody serves at the place."""
        while True:
            if place.worker is not None:
                await self._until_left(place, place.worker)
                place.worker = None
            pause_s = self._pause_s(place.crashes)
            if pause_s > 0:
                place.close()
                await self._clock.sleep(pause_s)
            try:
                await self._start(place)
            except OSError as error:
                place.crashes += 1
                _log.error("a worker cannot be started", worker=place.number, reason=str(error))

    async def _until_left(self, place: _Place, worker: WorkerProcess) -> None:
        """Return when the place needs another worker; `crashes` says how this one ended."""
        began_s = self._clock.now_s()
        await worker.left
        if not worker.ended.done():
            _log.info("a worker leaves, another one takes its place", pid=worker.pid)
            place.crashes = 0
            return
        WORKER_CRASHES.inc()
        lived = self._clock.now_s() - began_s >= _LIFE_S
        place.crashes = 1 if lived else place.crashes + 1
        say = _log.error if place.crashes >= _CRASHES_IN_A_ROW else _log.warning
        say(
            "a worker crashed",
            worker=place.number,
            pid=worker.pid,
            status=worker.ended.result(),
            crashes=place.crashes,
            pause_s=self._pause_s(place.crashes),
        )

    def _pause_s(self, crashes: int) -> float:
        settings = self._settings
        if crashes <= 1:
            return 0.0
        pause_s: float = settings.worker_restart_s_min * 2.0 ** min(crashes - 2, 30)
        return min(pause_s, settings.worker_restart_s_max)

    async def _watch(self) -> None:
        """Kill who hangs: the kernel goes on sending it its part of the clients."""
        settings = self._settings
        pause_s = settings.worker_silent_s_max / 4
        while True:
            slept_from_s = self._clock.now_s()
            await self._clock.sleep(pause_s)
            now_s = self._clock.now_s()
            if now_s - slept_from_s > 2 * pause_s:
                continue  # it is this process that slept
            for process in tuple(self._processes):
                limit_s = settings.worker_silent_s_max
                if not process.listening.done():
                    limit_s = settings.worker_start_s_max
                if now_s - process.heard_s > limit_s:
                    _log.error("a worker hangs and is killed", pid=process.pid)
                    process.signal(signal.SIGKILL)

    def _share(self, spent: KeysSpent, source: WorkerProcess | None = None) -> None:
        """Tell every worker but the one that said it."""
        data = frame(spent)
        for process in self._processes:
            if process is not source:
                process.channel.send_frame(data)

    def _heard(self, process: WorkerProcess, message: FromWorker) -> None:
        if isinstance(message, KeysSpent):
            self._share(message, process)
        self._hearing.hear(process, message)

    def _ended(self, process: WorkerProcess) -> None:
        self._processes.discard(process)
        self._hearing.forget(process)
        self._gone = counted(total([self._gone, process.figures]))

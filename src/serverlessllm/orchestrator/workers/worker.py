"""One worker: the hot path of an orchestrator on a copy of its view; anything else is passed on."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.tls import load_certificate, server_tls
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.orchestrator.gauges import RequestGauges
from serverlessllm.orchestrator.rest.guard import Guard
from serverlessllm.orchestrator.rest.idempotency import IDEMPOTENCY_HEADER
from serverlessllm.orchestrator.rest.inference import Inference
from serverlessllm.orchestrator.rest.quota import Quotas
from serverlessllm.orchestrator.rest.routes import HOT_PATHS, Routes, render
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.vigil import Vigil
from serverlessllm.orchestrator.workers.loads import WishedLoads, WorkerRoom
from serverlessllm.orchestrator.workers.messages import (
    Alive,
    AskFigures,
    FiguresAre,
    FromWorker,
    KeysSpent,
    RenewCertificate,
    Start,
    ToWorker,
)
from serverlessllm.orchestrator.workers.mirror import Mirror
from serverlessllm.orchestrator.workers.passing import Passing
from serverlessllm.orchestrator.workers.sharing import note_spent, share_spent
from serverlessllm.telemetry.figures import collect
from serverlessllm.telemetry.guard import keep_running
from serverlessllm.telemetry.logs import log

_log = log("worker")
_ALIVE_S = 1.0
_RESTART_S = 1.0
"""Pause before a background task that ended by a bug is started again."""


class Worker:
    """Made of what the main process said first; `tell` sends to it, `hear` gets what it says."""

    def __init__(self, start: Start, clock: Clock, tell: Callable[[FromWorker], None]) -> None:
        # What failed moments ago is remembered where it was tried.
        settings = msgspec.structs.replace(start.settings, failure_cache_s=0.0)
        self._start = start
        self._clock = clock
        self._tell = tell
        self._view = Mirror(tell)
        self._has_view = asyncio.Event()
        """Once the whole view has come."""
        self._quotas = Quotas(clock)
        self._upstreams = Upstreams(start.upstream, clock)
        # As many as clients may be: none of them waits here for another one's cold model.
        most = msgspec.structs.replace(
            start.upstream, connections_per_address_max=start.edge.connections_max
        )
        self._to_front = Upstreams(most, clock)
        self._passing = Passing(self._to_front, start.front)
        router = Router(self._view, start.scheduler, settings.agent_silent_s, clock)
        self._loads = WishedLoads(self._view, tell)
        self._room = WorkerRoom(self._loads, settings, clock, tell)
        self._vigil = Vigil(
            settings, view=self._view, router=router, upstreams=self._upstreams, clock=clock
        )
        self._guard = Guard(settings, start.listen, view=self._view, quotas=self._quotas)
        self._routes = Routes(
            settings,
            guard=self._guard,
            inference=Inference(
                settings,
                limits=start.limits,
                view=self._view,
                router=router,
                room=self._room,
                upstreams=self._upstreams,
                clock=clock,
                token=start.token,
            ),
            view=self._view,
            upstreams=self._upstreams,
            management=start.front,
            not_ready=lambda: "",
            metrics=self._no_metrics,
            clock=clock,
        )
        self._edge = EdgeServer(
            self._handle,
            start.edge,
            render,
            clock,
            self._routes.answer_headers,
            refuses=self._guard.refuses,
            stepped=True,
            quick=self._routes.quick,
        )
        self._gauges = RequestGauges()
        self._tls: ssl.SSLContext | None = None
        self._background: list[asyncio.Task[None]] = []
        self._collecting: asyncio.Task[None] | None = None

    def hear(self, message: ToWorker) -> None:
        """What concerns the cluster, the limits or the figures."""
        if self._view.apply(message):
            self._has_view.set()
        elif self._loads.hear(message):
            return
        elif isinstance(message, KeysSpent):
            note_spent(self._quotas, self._view, message)
        elif isinstance(message, RenewCertificate):
            self._renew_certificate()
        elif isinstance(message, AskFigures) and self._collecting is None:
            self._collecting = asyncio.create_task(self._answer_figures(), name="figures")

    async def start(self) -> None:
        """Serve clients, on the sockets that were inherited.

        Raises:
            OSError, ValueError: what the settings ask for cannot be had.
        """
        await self._has_view.wait()  # who knows no model yet would deny those that there are
        self._run("vigil", self._vigil.run)
        self._run("alive", self._stay_alive)
        self._run("sharing", self._share)
        settings = self._start.settings
        self._tls = server_tls(settings.tls_certificate, settings.tls_key)
        for descriptor in self._start.listeners:
            bound = socket.socket(fileno=descriptor)
            await self._edge.start(self._start.listen, bound, self._tls)

    async def drain(self) -> None:
        """Take requests a while longer, finish the running ones, tell the last figures."""
        await self._edge.drain(self._start.settings.drain_finish_s)
        await self.close()
        await self._tell_figures()

    async def close(self) -> None:
        """Stop at once; also ends what `drain` left."""
        await self._edge.close()
        tasks, self._background = self._background, []
        if self._collecting is not None:
            tasks.append(self._collecting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._room.close()
        await self._to_front.close()
        await self._upstreams.close()

    async def _handle(self, request: Request) -> None:
        if request.path in HOT_PATHS and request.headers.get(IDEMPOTENCY_HEADER) is None:
            await self._routes.handle(request)
        else:
            self._guard.check(request, None)
            await self._passing.serve(request, with_body=not self._guard.refuses(request))

    def _renew_certificate(self) -> None:
        settings = self._start.settings
        if self._tls is None or settings.tls_certificate is None or settings.tls_key is None:
            return
        try:
            load_certificate(self._tls, settings.tls_certificate, settings.tls_key)
        except ValueError as error:
            _log.error("the old certificate stays", reason=str(error))

    def _run(self, name: str, main: Callable[[], Awaitable[None]]) -> None:
        kept = keep_running(name, main, out=_log, clock=self._clock, restart_s=_RESTART_S)
        self._background.append(asyncio.create_task(kept, name=name))

    async def _stay_alive(self) -> None:
        while True:
            await self._clock.sleep(_ALIVE_S)
            self._tell(Alive())

    async def _share(self) -> None:
        interval_s = self._start.settings.worker_share_s
        await share_spent(self._quotas, self._tell, self._clock, interval_s)

    @staticmethod
    async def _no_metrics() -> bytes:
        """The main process shows all."""
        return b""

    async def _answer_figures(self) -> None:
        try:
            await self._tell_figures()
        finally:
            self._collecting = None

    async def _tell_figures(self) -> None:
        self._gauges.set(self._routes.running(), self._room.waiting_for())
        self._tell(FiguresAre(figures=await asyncio.to_thread(collect)))

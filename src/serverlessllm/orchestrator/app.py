"""One orchestrator: the view, the router, the waiting room and the routes, started and ended."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import Address
from serverlessllm.edge.server import EdgeServer
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.tls import load_certificate, server_tls
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.metadata.registry import Registry
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.agents import AgentClient
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.feed import Feed
from serverlessllm.orchestrator.gauges import RequestGauges
from serverlessllm.orchestrator.loads import Loads
from serverlessllm.orchestrator.operations import Operations
from serverlessllm.orchestrator.replicas import keep_replicas
from serverlessllm.orchestrator.rest.documents import Documents
from serverlessllm.orchestrator.rest.front import Front
from serverlessllm.orchestrator.rest.guard import Guard, is_local
from serverlessllm.orchestrator.rest.inference import Inference
from serverlessllm.orchestrator.rest.internal import InternalServer
from serverlessllm.orchestrator.rest.management import Management
from serverlessllm.orchestrator.rest.messages import Messages
from serverlessllm.orchestrator.rest.models import Models
from serverlessllm.orchestrator.rest.quota import Quotas
from serverlessllm.orchestrator.rest.responses import Responses
from serverlessllm.orchestrator.rest.routes import Routes, render
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.seams import DeletesCheckpoints, Ingests
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.vigil import Vigil
from serverlessllm.orchestrator.workers.messages import Start
from serverlessllm.orchestrator.workers.supervisor import Workers, worker_count
from serverlessllm.scheduler.settings import SchedulerSettings
from serverlessllm.telemetry.guard import keep_running
from serverlessllm.telemetry.logs import log
from serverlessllm.telemetry.metrics import render_metrics
from serverlessllm.telemetry.settings import TelemetrySettings
from serverlessllm.telemetry.table import AGENTS

if TYPE_CHECKING:
    from serverlessllm.orchestrator.grpc.server import GrpcServer

_log = log("orchestrator")
_RESTART_S = 1.0
"""Pause before a background task that ended by a bug is started again."""


class Orchestrator:
    """Stateless: any number of them serve the same cluster.

    `token` is the cluster's, sent to agents; `run_dir` a private directory with a short path, for
    unix sockets.
    """

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        registry: Registry,
        ingestion: Ingests,
        store: DeletesCheckpoints,
        clock: Clock,
        token: str,
        run_dir: Path,
        scheduler: SchedulerSettings | None = None,
        edge: EdgeSettings | None = None,
        upstream: UpstreamSettings | None = None,
        limits: RequestLimits | None = None,
        telemetry: TelemetrySettings | None = None,
    ) -> None:
        upstream, limits = upstream or UpstreamSettings(), limits or RequestLimits()
        scheduler = scheduler or SchedulerSettings()
        self._settings = settings
        self._clock = clock
        self._edge_settings = self._grpc_edge_settings = edge or EdgeSettings()
        self._upstreams = Upstreams(upstream, clock)
        self.view = ClusterView()
        self.quotas = Quotas(clock)
        self._router = Router(self.view, scheduler, settings.agent_silent_s, clock)
        agents = AgentClient(self._upstreams, settings, token)
        loads = Loads(
            settings,
            view=self.view,
            places=self._router,
            agents=agents,
            ingestion=ingestion,
            clock=clock,
        )
        self._room = WaitingRoom(loads, settings, clock)
        self._limits = limits
        self._feed = Feed(self.view, registry, settings, clock)
        self._vigil = Vigil(
            settings, view=self.view, router=self._router, upstreams=self._upstreams, clock=clock
        )
        self._inference = Inference(
            settings,
            limits=limits,
            view=self.view,
            router=self._router,
            room=self._room,
            upstreams=self._upstreams,
            clock=clock,
            token=token,
        )
        operations = Operations(
            settings,
            view=self.view,
            room=self._room,
            agents=agents,
            registry=registry,
            ingestion=ingestion,
            store=store,
        )
        management = Management(
            settings,
            operations=operations,
            view=self.view,
            router=self._router,
            room=self._room,
            clock=clock,
        )
        self._internal = InternalServer(management.app, run_dir)
        self._front = Front(self._upstreams, run_dir)
        self._responses = Responses(settings, limits=limits, front=self._front, clock=clock)
        self._messages = Messages(settings, limits=limits, front=self._front)
        self._documents = Documents(limits)
        self._workers: Workers | None = None
        if worker_count(settings) > 1:
            start = Start(
                number=0,
                listen=settings.listen,
                listeners=(),
                front=self._front.address,
                token=token,
                settings=settings,
                edge=self._edge_settings,
                upstream=upstream,
                limits=limits,
                scheduler=scheduler,
                telemetry=telemetry or TelemetrySettings(),
            )
            self._workers = self._have_workers(start)
        self._tls: ssl.SSLContext | None = None
        self._edge: EdgeServer | None = None
        self._grpc: GrpcServer | None = None
        self.grpc_address: Address | None = None
        """Where gRPC is served, port 0 resolved; None: nowhere."""
        self._routes: Routes | None = None
        self._background: list[asyncio.Task[None]] = []
        self._draining = False
        self._gauges = RequestGauges()

    def _have_workers(self, start: Start) -> Workers:
        """Processes that serve the public address; only they come to this one's own edge, and they
        drain before it."""
        self._edge_settings = msgspec.structs.replace(self._edge_settings, drain_accept_s=0.0)
        return Workers(
            self._settings,
            template=start,
            view=self.view,
            room=self._room,
            quotas=self.quotas,
            clock=self._clock,
        )

    async def start(self, listen: Address | None = None) -> Address:
        """Serve on `listen` (the setting's by default); the address in fact, port 0 resolved.

        Raises:
            ValueError: other machines reach the address, and no API key is set.
            OSError: the address cannot be had.
        """
        listen = listen or self._settings.listen
        try:
            return await self._start(listen)
        except BaseException:
            await self.close()
            raise

    async def _start(self, listen: Address) -> Address:
        self._tls = server_tls(self._settings.tls_certificate, self._settings.tls_key)
        management = await self._internal.start()
        self._run("feed", self._feed.run)
        await self._feed.first_list()
        self._check_public(listen)
        self._run("vigil", self._vigil.run)
        self._run("replicas", self._keep_replicas)
        models = Models(self._settings, view=self.view, room=self._room)
        guard = Guard(self._settings, listen, view=self.view, quotas=self.quotas)
        self._routes = routes = Routes(
            self._settings,
            guard=guard,
            inference=self._inference,
            view=self.view,
            upstreams=self._upstreams,
            management=management,
            not_ready=self._not_ready,
            metrics=self._metrics,
            clock=self._clock,
            routes=(
                *models.routes,
                *self._responses.routes,
                *self._messages.routes,
                *self._documents.routes,
            ),
        )
        self._edge = EdgeServer(
            routes.handle,
            self._edge_settings,
            render,
            self._clock,
            routes.answer_headers,
            refuses=guard.refuses,
            stepped=True,
            quick=routes.quick,
        )
        # Bounded by the clients' own: refused there, a request that was taken would fail halfway.
        await self._edge.start(self._front.address, counted=False)
        await self._start_grpc(guard)
        if self._workers is not None:
            return await self._workers.start(listen)
        return await self._edge.start(listen, tls=self._tls)

    async def _start_grpc(self, guard: Guard) -> None:
        if self._settings.grpc_listen is None:
            return
        # Imported only here: it takes a tenth of a second and 33 MB.
        from serverlessllm.orchestrator.grpc.server import GrpcServer

        self._check_public(self._settings.grpc_listen)
        self._grpc = GrpcServer(
            self._settings,
            limits=self._limits,
            front=self._front,
            view=self.view,
            room=self._room,
            edge=self._grpc_edge_settings,
            not_ready=self._not_ready,
            check_key=guard.check_key,
            clock=self._clock,
        )
        self.grpc_address = await self._grpc.start(self._settings.grpc_listen)
        _log.info("serving gRPC", address=self.grpc_address)

    def reload_certificate(self) -> None:
        """Show new connections what the certificate's files hold now.

        Raises:
            ValueError: they are not good; the old certificate stays.
        """
        certificate, key = self._settings.tls_certificate, self._settings.tls_key
        if self._tls is not None and certificate is not None and key is not None:
            load_certificate(self._tls, certificate, key)
            if self._workers is not None:
                self._workers.renew_certificate()
            if self._grpc is not None:
                self._grpc.reload_certificate()

    async def drain(self) -> None:
        """What SIGTERM asks: not ready, take requests a while longer, finish the running ones."""
        self._draining = True
        await asyncio.gather(self._drain_http(), self._drain_grpc())
        await self.close()

    async def _drain_http(self) -> None:
        if self._workers is not None:
            await self._workers.drain()
        if self._edge is not None:
            await self._edge.drain(self._settings.drain_finish_s)

    async def _drain_grpc(self) -> None:
        if self._grpc is not None:
            # The edge's goodbyes are to arrive.
            edge = self._grpc_edge_settings
            await self._grpc.drain(self._settings.drain_finish_s + edge.drain_cut_s)

    async def close(self) -> None:
        """Stop at once; also ends what `drain` left. Idempotent."""
        if self._grpc is not None:
            await self._grpc.close()
            self._grpc = None
        if self._workers is not None:
            await self._workers.close()
        if self._edge is not None:
            await self._edge.close()
            self._edge = None
        tasks, self._background = self._background, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._room.close()
        await self._internal.close()
        await self._upstreams.close()

    def _run(self, name: str, main: Callable[[], Awaitable[None]]) -> None:
        kept = keep_running(name, main, out=_log, clock=self._clock, restart_s=_RESTART_S)
        self._background.append(asyncio.create_task(kept, name=name))

    async def _keep_replicas(self) -> None:
        await keep_replicas(self.view, self._router, self._room, self._settings, self._clock)

    def _check_public(self, listen: Address) -> None:
        settings, view = self._settings, self.view
        # While nobody knows of keys the guard lets nobody in.
        keys = settings.api_key_sha256 or view.keys_asked or not view.listed
        asks = keys if settings.require_key is None else settings.require_key
        if not (is_local(listen) or asks or settings.allow_public_without_key):
            raise ValueError(
                f"listen address {listen}: other machines could reach it, and no API key is asked "
                "for. Make a key (`sllm key create`), or accept that everybody there may use and "
                "change everything: --allow-remote"
            )

    def _not_ready(self) -> str:
        """Why no request should be sent here; empty when it may."""
        if self._draining:
            return "this server is shutting down"
        return "" if self._workers is None else self._workers.not_ready()

    async def _metrics(self) -> bytes:
        self._set_gauges()
        if self._workers is not None:
            return await self._workers.metrics()
        return await asyncio.to_thread(render_metrics)  # 0.2 s of 300 models' series

    def _set_gauges(self) -> None:
        now_s, silent_s = self._clock.now_s(), self._settings.agent_silent_s
        suspect = sum(seen.suspect(now_s, silent_s) for seen in self.view.agents.values())
        AGENTS.set(suspect, "suspect")
        AGENTS.set(len(self.view.agents) - suspect, "alive")
        running = {} if self._routes is None else self._routes.running()
        here = self._room if self._workers is None else self._workers
        self._gauges.set(running, here.waiting_for())

"""One agent: composed, started, drained and closed."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

from blake3 import blake3

from serverlessllm.agent.api import AgentApi, render_refusal
from serverlessllm.agent.catalog import Catalog
from serverlessllm.agent.chunks import Chunks
from serverlessllm.agent.downloads import Downloads
from serverlessllm.agent.heartbeat import Heartbeat
from serverlessllm.agent.inference import Inference
from serverlessllm.agent.instances import Instances
from serverlessllm.agent.life import Host
from serverlessllm.agent.machine import available_memory_bytes, cpus
from serverlessllm.agent.orders import Orders
from serverlessllm.agent.report import models_here
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.agent.watchdog import Watchdog
from serverlessllm.backends.base import Node
from serverlessllm.backends.orphans import kill_orphans
from serverlessllm.backends.registry import Backends
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import AgentRecord
from serverlessllm.core.errors import Conflict, Draining, Fenced, SLLMError
from serverlessllm.core.ids import Address, AgentId, ModelId
from serverlessllm.edge.server import EdgeServer
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.loader.service import Loader
from serverlessllm.metadata.registry import Registry
from serverlessllm.telemetry import log
from serverlessllm.telemetry.guard import keep_running

_log = log("agent")


class Agent:
    """The daemon of a node: brings checkpoints near, runs backends, relays requests to them.

    It starts and closes `loader`; `token` is the cluster's; `run_dir` a private directory with a
    short path for unix sockets (a directory of the agent's own is made in it); `log_dir` takes
    the backends' output; `environ` is what backends inherit a chosen part of.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        agent: AgentId,
        registry: Registry,
        loader: Loader,
        backends: Backends,
        clock: Clock,
        token: str,
        run_dir: Path,
        log_dir: Path,
        environ: Mapping[str, str] | None = None,
        processes: BackendSettings | None = None,
        edge: EdgeSettings | None = None,
        upstream: UpstreamSettings | None = None,
    ) -> None:
        self._settings = settings
        self._agent = agent
        self._loader = loader
        self._clock = clock
        self._run_dir = run_dir / f"a-{blake3(agent.encode()).hexdigest()[:8]}"
        self._log_dir = log_dir
        self._usable = backends.usable
        self._upstreams = Upstreams(upstream or UpstreamSettings(), clock)
        self._heartbeat = Heartbeat(
            registry, agent, settings, clock, record=self.record, on_fenced=self._fenced
        )
        self._catalog = Catalog(registry, loader, settings, clock, on_read=self._registered)
        downloads = Downloads(loader, settings, clock)
        node = Node(cpus=settings.cpus or cpus(), dram_free_bytes=available_memory_bytes())
        self._processes = processes or BackendSettings()
        self._templates = Templates(
            self._processes,
            clock=clock,
            environ=environ or {},
            run_dir=self._run_dir,
            log_dir=log_dir,
        )
        host = Host(
            settings=settings,
            processes=self._processes,
            backends=backends,
            downloads=downloads,
            upstreams=self._upstreams,
            clock=clock,
            node=node,
            run_dir=self._run_dir,
            log_dir=log_dir,
            environ=environ or {},
            templates=self._templates,
        )
        self._instances = Instances(
            host,
            memory_budget_bytes=settings.memory_budget_bytes or node.dram_free_bytes // 2,
            dram=self._catalog,
            on_change=self._heartbeat.changed,
        )
        self._watchdog = Watchdog(self._instances, self._upstreams, settings, clock)
        self._api = AgentApi(
            inference=Inference(self._instances, self._upstreams, settings),
            orders=Orders(self._instances, downloads, self._catalog, loader, settings, clock),
            chunks=Chunks(self._catalog, loader),
            token=token,
            chunks_max=settings.chunks_max,
            status=self.record,
        )
        self._server = EdgeServer(self._api.handle, edge or EdgeSettings(), render_refusal, clock)
        self._tasks: list[asyncio.Task[None]] = []
        self._lock = -1
        self._address = Address("")
        self._accepting = True
        self._closed = False

    async def start(self, listen: Address | None = None) -> Address:
        """Kill what an earlier agent left running, serve, and register; the address in fact.

        A metadata store that is away delays only the registration.

        Raises:
            Conflict: an agent of this id runs on this machine already.
            OSError: the address cannot be had.
        """
        self._take_run_dir()
        try:
            await self._loader.start()
            self._address = await self._server.start(
                listen or self._settings.listen or Address(f"unix:{self._run_dir / 'agent.sock'}")
            )
        except BaseException:
            await self.close()
            raise
        self._instances.start()
        for module in self._processes.templates_preload:
            self._templates.warm(module)
        self._run("heartbeat", self._heartbeat.run)
        self._run("catalog", self._catalog.run)
        self._run("watchdog", self._watchdog.run)
        await self._heartbeat.tried.wait()
        self._api.ready = True
        _log.info("agent serves", agent=self._agent, address=self._address)
        return self._address

    async def drain(self) -> None:
        """What SIGTERM asks: not ready, take requests a while longer, finish the running ones."""
        self._api.ready = self._accepting = False
        self._heartbeat.changed()
        self._instances.refuse(Draining("this agent is shutting down", retry_after_s=1.0))
        await self._server.drain(self._settings.drain_finish_s)

    async def close(self) -> None:
        """Stop every instance and task; the lease is given back last. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._api.ready = self._accepting = False
        await self._server.close()
        await self._instances.close()
        await self._templates.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._upstreams.close()
        await self._loader.close()
        await self._heartbeat.leave()
        self._leave_run_dir()

    def record(self) -> AgentRecord:
        """What a heartbeat and `GET /status` say."""
        dram, nvme = self._loader.usage()
        return AgentRecord(
            agent=self._agent,
            epoch=self._heartbeat.epoch,
            address=self._settings.advertise or self._address,
            accepting=self._accepting and self._api.refusal is None,
            backends=self._usable,
            dram=dram,
            nvme=nvme,
            bandwidth=dict(self._loader.bandwidth()),
            models=models_here(self._instances, self._catalog),
        )

    def _take_run_dir(self) -> None:
        """Our own directory, with nothing alive in it."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._run_dir / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise Conflict(
                f"an agent with the id {self._agent!r} runs on this machine already: "
                "give this one another (agent.id)"
            ) from None
        killed = kill_orphans(self._run_dir)
        if killed:
            _log.warning("killed what an earlier agent left", processes=len(killed))

    def _leave_run_dir(self) -> None:
        """Take the socket away, and let another agent of this id in."""
        if self._address.startswith("unix:"):
            Path(self._address.removeprefix("unix:")).unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _registered(self, models: Collection[ModelId]) -> None:
        """Models that were deleted have no history here."""
        self._instances.keep_only(models)

    def _fenced(self, fenced: bool) -> None:
        """Another agent has our id: serve nobody until it is gone."""
        error: SLLMError | None = None
        if fenced:
            error = Fenced(f"a newer agent has the id {self._agent}", retry_after_s=1.0)
            self._instances.stop_all()
        self._api.refusal = error
        if self._accepting:
            self._instances.refuse(error)

    def _run(self, name: str, main: Callable[[], Awaitable[None]]) -> None:
        restart_s = self._settings.task_restart_s
        kept = keep_running(name, main, out=_log, clock=self._clock, restart_s=restart_s)
        self._tasks.append(asyncio.create_task(kept, name=f"agent-{name}"))

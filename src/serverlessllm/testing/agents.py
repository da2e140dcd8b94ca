"""A whole agent in this process, on real tiers, a real store and real backends; and its client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from serverlessllm.agent.app import Agent
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.registry import Backends
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_file
from serverlessllm.core.agentapi import (
    KEEP_ALIVE_HEADER,
    MODEL_HEADER,
    TOKEN_HEADER,
    LoadEvent,
    LoadRequest,
    UnloadRequest,
)
from serverlessllm.core.clock import Clock, SystemClock
from serverlessllm.core.cluster import AgentRecord, CacheLevel, ModelOnAgent
from serverlessllm.core.ids import Address, AgentId, ModelId
from serverlessllm.core.models import CheckpointRef, ModelSpec
from serverlessllm.core.units import MIB
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Response, Upstreams
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.metadata.base import Metadata
from serverlessllm.metadata.registry import Registry
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.metadata import FakeMetadata
from serverlessllm.testing.waiting import eventually

TOKEN = "the-cluster's"  # noqa: S105 - a test's


class Machine:
    """The directories of one machine and what lies in them; agents on it come and go."""

    def __init__(self, root: Path, short: Path, shm: Path) -> None:
        self.root = root
        self.run_dir = short
        self.dram_dir = shm
        self.store: CheckpointStore = open_store(
            (root / "store").as_uri(), StoreSettings(), SystemClock()
        )
        self.metadata: Metadata = FakeMetadata(SystemClock())
        self.loader = LoaderSettings(
            dram_dir=str(shm),
            dram_budget_bytes=64 * MIB,
            nvme_dir=str(root / "nvme"),
            nvme_budget_bytes=128 * MIB,
        )

    async def publish(self, gguf: Path, name: str) -> CheckpointRef:
        """Convert a GGUF file and put it into the store."""
        folder = self.root / "converted" / name
        folder.mkdir(parents=True)
        done = await asyncio.to_thread(convert, open_file(gguf, model=name), folder)
        return await self.store.publish(f"{name}/r1", done.bin_path, done.idx_path.read_bytes())

    @contextlib.asynccontextmanager
    async def agent(
        self,
        *,
        name: str = "one",
        clock: Clock | None = None,
        processes: BackendSettings | None = None,
        loader: LoaderSettings | None = None,
        backends: Backends | None = None,
        **settings: Any,
    ) -> AsyncIterator[AgentClient]:
        """A started agent's client; the agent is closed at the end."""
        clock = clock or SystemClock()
        agent = Agent(
            msgspec.structs.replace(AgentSettings(memory_budget_bytes=4096 * MIB), **settings),
            agent=AgentId(name),
            registry=Registry(self.metadata),
            loader=Loader(loader or self.loader, store=self.store, clock=clock, data_dir=self.root),
            backends=backends or Backends(),
            clock=clock,
            token=TOKEN,
            run_dir=self.run_dir,
            log_dir=self.root / "logs",
            environ=os.environ,
            processes=processes,
            edge=EdgeSettings(drain_accept_s=0.0),
        )
        client = Upstreams(UpstreamSettings(), SystemClock())
        try:
            yield AgentClient(await agent.start(), client, agent)
        finally:
            await client.close()
            await agent.close()


@contextlib.asynccontextmanager
async def machine(root: Path) -> AsyncIterator[Machine]:
    """A fresh machine; its shared memory and sockets are removed at the end."""
    short = Path(tempfile.mkdtemp(prefix="sllm-t-", dir="/tmp"))
    shm = Path(tempfile.mkdtemp(prefix="sllm-t-", dir="/dev/shm"))
    try:
        yield Machine(root, short, shm)
    finally:
        shutil.rmtree(short, ignore_errors=True)
        shutil.rmtree(shm, ignore_errors=True)


class AgentClient:
    """What an orchestrator says to an agent, in one call each."""

    def __init__(self, address: Address, client: Upstreams, agent: Agent | None) -> None:
        self.address = address
        self.client = client
        self._agent = agent

    @property
    def agent(self) -> Agent:
        """The agent itself, when it runs in this process."""
        assert self._agent is not None
        return self._agent

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> Any:
        """`async with` → the raw response."""
        lines = [(name.replace("_", "-"), value) for name, value in headers.items()]
        return self.client.send(self.address, method, path, [(TOKEN_HEADER, TOKEN), *lines], body)

    async def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, Any, Response]:
        """Status, decoded body (None when it is not JSON), and the response for its headers."""
        async with self.send(method, path, body, **headers) as response:
            data = await response.read(64 * MIB)
            try:
                return response.status, msgspec.json.decode(data), response
            except msgspec.DecodeError:
                return response.status, data, response

    async def load(
        self,
        spec: ModelSpec,
        checkpoint: CheckpointRef | None = None,
        on_event: Callable[[LoadEvent], None] | None = None,
        path: str = "/load",
        **fields: Any,
    ) -> LoadEvent:
        """The last event of a load; an answer other than 200 is one, too."""
        order = LoadRequest(spec=spec, checkpoint=checkpoint, **fields)
        async with self.send("POST", path, msgspec.json.encode(order)) as response:
            if response.status != 200:
                said = msgspec.json.decode(await response.read())["error"]
                return msgspec.convert(
                    {
                        "state": "failed",
                        "error": {
                            "code": said["code"],
                            "message": said["message"],
                            "status": response.status,
                        },
                    },
                    LoadEvent,
                )
            event = None
            async for line in response.lines():
                event = msgspec.json.decode(line, type=LoadEvent)
                if on_event is not None:
                    on_event(event)
        assert event is not None
        return event

    async def unload(
        self, model: str, level: CacheLevel = CacheLevel.DRAM, *, force: bool = False
    ) -> int:
        """The status of an unload."""
        order = UnloadRequest(model=ModelId(model), cache_level=level, force=force)
        return (await self.ask("POST", "/unload", msgspec.json.encode(order)))[0]

    async def chat(
        self, model: str, *, keep_alive_s: float | None = None, **fields: object
    ) -> tuple[int, Any, Response]:
        """One chat; status, body, response."""
        headers = {MODEL_HEADER: model}
        if keep_alive_s is not None:
            headers[KEEP_ALIVE_HEADER] = str(keep_alive_s)
        return await self.ask("POST", "/v1/chat/completions", chat_body(model, **fields), **headers)

    async def stream(self, model: str, **fields: object) -> list[str]:
        """The data of every event of a streamed chat, as far as it came."""
        found: list[str] = []
        async with self.send(
            "POST",
            "/v1/chat/completions",
            chat_body(model, stream=True, **fields),
            **{MODEL_HEADER: model},
        ) as response:
            assert response.status == 200, await response.read()
            async for line in response.lines():
                if line.startswith(b"data: "):
                    found.append(line[6:].decode())  # noqa: PERF401 - kept when it breaks off
        return found

    async def status(self) -> AgentRecord:
        """What the agent says of itself."""
        async with self.send("GET", "/status") as response:
            return msgspec.json.decode(await response.read(), type=AgentRecord)

    async def model(self, model: str) -> ModelOnAgent | None:
        """One row of the status."""
        return next((m for m in (await self.status()).models if m.model == model), None)

    async def until(self, model: str, holds: Callable[[ModelOnAgent], bool]) -> ModelOnAgent:
        """The model's row once `holds` says yes of it; asks again and again."""
        rows: list[ModelOnAgent] = []

        async def seen() -> bool:
            row = await self.model(model)
            if row is not None and holds(row):
                rows.append(row)
            return bool(rows)

        await eventually(seen)
        return rows[0]


def chat_body(model: str, **fields: object) -> bytes:
    """A chat's body."""
    messages = [{"role": "user", "content": "What is 2+2?"}]
    return msgspec.json.encode({"model": model, "messages": messages} | fields)


def fake_spec(name: str = "fake-model", **options: object) -> ModelSpec:
    """A model of the fake backend; options as `FakeOptions` names them."""
    return ModelSpec(
        model=ModelId(name),
        backend="fake",
        options={key: str(value).lower() for key, value in options.items()},
    )

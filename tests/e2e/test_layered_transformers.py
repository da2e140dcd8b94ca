"""Layered streaming for real: the transformers engine answers on layers whose successors still lie
in the store, or on nvme."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import Index, layers
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.core.units import GIB, KIB
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.testing.checkpoints import write_random_safetensors
from serverlessllm.testing.cluster import Cluster, ClusterSettings, running
from serverlessllm.testing.stores import GatedStore
from serverlessllm.testing.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = ModelId("layers")
SPEC = ModelSpec(
    model=MODEL, backend="transformers", options={"context": "256", "threads": "1", "slots": "1"}
)
CHUNK_BYTES = 64 * KIB
LAYERS = 6
WAIT_S = 60.0
JSON = [("content-type", "application/json")]


class LastLayerHeld(GatedStore):
    """Holds back only what its limit and `held_bytes` both say."""

    held_bytes = range(0)

    async def read_range(self, prefix: str, offset: int, size: int) -> memoryview:
        if overlaps(self.held_bytes, offset, size):
            return await super().read_range(prefix, offset, size)
        return await super(GatedStore, self).read_range(prefix, offset, size)


def overlaps(held: range, offset: int, size: int) -> bool:
    return offset < held.stop and held.start < offset + size


class System:
    """A cluster with one agent, and a checkpoint of many chunks in its store."""

    def __init__(
        self, cluster: Cluster, store: LastLayerHeld, index: Index, client: Upstreams
    ) -> None:
        self.cluster = cluster
        self.store = store
        self.index = index
        self._client = client
        last = next(one for one in layers(index) if one.name == f"model.layers.{LAYERS - 1}")
        self.last_chunk = (last.offset + last.size_bytes // 2) // index.chunk_bytes
        """In the middle of the last layer, and no other's."""

    @property
    def last_bytes(self) -> range:
        offset, size = self.index.chunk_range(self.last_chunk)
        return range(offset, offset + size)

    async def ask(self, method: str, path: str, body: object = None, at: str = "") -> Any:
        sent = b"" if body is None else msgspec.json.encode(body)
        address = Address(at or self.cluster.url)
        async with self._client.send(address, method, path, JSON, sent) as response:
            data = await response.read()
            assert response.status == 200, data
            return msgspec.json.decode(data or b"null")

    async def knows_model(self) -> bool:
        address = Address(self.cluster.url)
        async with self._client.send(address, "GET", f"/api/models/{MODEL}") as response:
            await response.read()
            return response.status == 200

    async def chat(self) -> str:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "the cold model wakes"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        answer = await self.ask("POST", "/v1/chat/completions", body)
        content: str = answer["choices"][0]["message"]["content"]
        return content

    async def unload(self, level: CacheLevel) -> None:
        await self.ask("POST", "/api/unload", {"model": MODEL, "cache_level": level})

    def instances(self) -> tuple[Instance, ...]:
        return tuple(self.cluster.agents["a"]._instances.all())

    async def trace(self) -> Any:
        """What the engine tells of its start; None before it is ready."""
        ready = [instance for instance in self.instances() if instance.usable]
        return await self.ask("GET", "/trace", at=ready[0].address) if ready else None

    async def began(self) -> dict[str, float]:
        """When each layer first computed."""
        trace = await self.trace() or {"layers": []}
        return {layer["layer"]: layer["computed_at_s"] for layer in trace["layers"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    folder = tmp_path_factory.mktemp("hf")
    source = write_random_safetensors(folder / "raw", layers=LAYERS, dtype="F32")
    made = await asyncio.to_thread(
        convert, open_folder(source, model=MODEL), folder, chunk_bytes=CHUNK_BYTES
    )
    agent = AgentSettings(memory_budget_bytes=2 * GIB)
    async with running(agents=0, settings=ClusterSettings(agent=agent)) as cluster:
        store = cluster.store = LastLayerHeld(cluster.directory / "store")
        ref = await store.publish(f"{MODEL}/r1", made.bin_path, made.idx_path.read_bytes())
        await cluster.registry.put_model(ModelRecord(spec=SPEC, checkpoint=ref))
        await cluster.add_agent("a")
        client = Upstreams(UpstreamSettings(), SystemClock())
        system = System(cluster, store, made.index, client)

        try:
            await eventually(system.knows_model)
            yield system
        finally:
            await client.close()


Gate = Callable[[System, pytest.MonkeyPatch], AbstractContextManager[Callable[[], None]]]


@contextmanager
def store_gate(system: System, _: pytest.MonkeyPatch) -> Any:
    system.store.held_bytes = system.last_bytes
    system.store.let(0)
    try:
        yield system.store.let
    finally:
        system.store.let()


@contextmanager
def nvme_gate(system: System, monkeypatch: pytest.MonkeyPatch) -> Any:
    opened = threading.Event()
    honest = DirectFile.read_into

    def gated(self: DirectFile, view: memoryview, offset: int, size: int) -> None:
        if overlaps(system.last_bytes, offset, size):
            assert opened.wait(WAIT_S)
        honest(self, view, offset, size)

    monkeypatch.setattr(DirectFile, "read_into", gated)
    try:
        yield opened.set
    finally:
        opened.set()


@pytest.mark.parametrize(
    ("tier", "gate", "hop"),
    [
        pytest.param(CacheLevel.STORE, store_gate, "store→dram", id="store"),
        pytest.param(CacheLevel.NVME, nvme_gate, "nvme→dram", id="nvme"),
    ],
)
async def test_its_first_layers_compute_before_its_last_one_is_there(
    system: System, monkeypatch: pytest.MonkeyPatch, tier: CacheLevel, gate: Gate, hop: str
) -> None:
    unstreamed = await unstreamed_answer(system)
    await system.unload(tier)
    with gate(system, monkeypatch) as open_gate:
        asking = asyncio.ensure_future(system.chat())

        async def all_but_the_last_layer_began() -> bool:
            return f"model.layers.{LAYERS - 2}" in await system.began()

        await eventually(all_but_the_last_layer_began)
        assert not asking.done()
        assert str(system.last_chunk) not in (await system.trace())["chunks"]
        open_gate()
        assert await asking == unstreamed
    trace, began = await system.trace(), await system.began()
    assert len(trace["chunks"]) == len(system.index.chunks)
    assert began["model.layers.0"] < trace["chunks"][str(system.last_chunk)]
    assert began[f"model.layers.{LAYERS - 1}"] >= trace["chunks"][str(system.last_chunk)]
    assert set(began) >= {f"model.layers.{layer}" for layer in range(LAYERS)}
    last_load = (await system.ask("GET", f"/api/models/{MODEL}"))["last_load"]
    assert [one["hop"] for one in last_load["hops"] if one["bytes_moved"]] == [hop]


async def unstreamed_answer(system: System) -> str:
    """Of an engine that found everything in DRAM."""
    await system.chat()
    await system.unload(CacheLevel.DRAM)
    answer = await system.chat()
    assert await system.trace() == {"layers": [], "chunks": {}}
    return answer

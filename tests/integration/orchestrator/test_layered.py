"""A cold request on an engine that starts before its bytes are there, from the client's side."""

from __future__ import annotations

import contextlib
import json

from crc32c import crc32c

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.testing.cluster import running
from serverlessllm.testing.stores import CHUNK_BYTES, GatedStore, publish_random
from serverlessllm.testing.waiting import eventually

CHUNKS = 5
SPEC = ModelSpec(
    model=ModelId("layers"), backend="fake", options={"layered": "true", "tokens": str(CHUNKS)}
)
ASK = json.dumps({"model": "layers", "stream": True, "prompt": "hello"}).encode()
JSON = [("content-type", "application/json")]


@contextlib.asynccontextmanager
async def cluster_of(store_gives_bytes):
    """A cluster with one agent, its store, and what each chunk of its model says."""
    async with running(agents=0) as cluster:
        store = cluster.store = GatedStore(cluster.directory / "store")
        ref, chunks = await publish_random(store, cluster.directory, "layers", chunks=CHUNKS)
        await cluster.add_agent("a")
        await cluster.registry.put_model(ModelRecord(spec=SPEC, checkpoint=ref))
        store.let(store_gives_bytes)
        client = Upstreams(UpstreamSettings(), SystemClock())

        async def registered():
            url = Address(cluster.url)
            async with client.send(url, "GET", "/api/models/layers") as response:
                await response.read()
                return response.status == 200

        try:
            await eventually(registered, within_s=20.0)
            yield cluster, store, client, [f"{crc32c(chunk):08x}" for chunk in chunks]
        finally:
            await client.close()


async def texts(response):
    async for line in response.lines():
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            if choice["text"]:
                yield choice["text"]


async def test_its_first_token_comes_before_its_last_byte():
    async with cluster_of(2 * CHUNK_BYTES) as (cluster, store, client, said):
        address = Address(cluster.url)

        async def moved_bytes():
            async with client.send(address, "GET", "/api/models/layers") as response:
                hops = json.loads(await response.read())["last_load"]["hops"]
            return sum(hop["bytes_moved"] for hop in hops)

        heard = []
        async with client.send(address, "POST", "/v1/completions", JSON, ASK) as response:
            assert response.status == 200, await response.read()
            async for text in texts(response):
                heard.append(text)
                if len(heard) == 2:
                    assert store.held > 0
                    early_bytes = await moved_bytes()
                    store.let()
        assert heard == said
        size_bytes = (await cluster.registry.get_model(SPEC.model)).record.checkpoint.size_bytes

        async def complete():
            return await moved_bytes() == size_bytes

        await eventually(complete, within_s=20.0)
        assert early_bytes < size_bytes

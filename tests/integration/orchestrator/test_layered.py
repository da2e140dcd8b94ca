"""A cold request on an engine that starts before its bytes are there, from the client's side."""

from __future__ import annotations

import asyncio
import contextlib
import json
from functools import partial

import grpc
import pytest
from crc32c import crc32c

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import StoreUnavailable
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.orchestrator.grpc.proto.serverlessllm_pb2 import InferenceRequest
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.testing.cluster import ClusterSettings, running
from serverlessllm.testing.rpc import OPENAI, connected, read, read_all
from serverlessllm.testing.stores import CHUNK_BYTES, GatedStore, publish_random
from serverlessllm.testing.waiting import eventually

CHUNKS = 5
SPEC = ModelSpec(
    model=ModelId("layers"), backend="fake", options={"layered": "true", "tokens": str(CHUNKS)}
)
ASK = json.dumps({"model": "layers", "stream": True, "prompt": "hello"}).encode()
ASK_WHOLE = json.dumps({"model": "layers", "prompt": "hello"}).encode()
JSON = [("content-type", "application/json")]


@contextlib.asynccontextmanager
async def cluster_of(store_gives_bytes, **settings):
    """A cluster with one agent, its store, and what each chunk of its model says."""
    front = OrchestratorSettings(comment_interval_s=0.02, stream_grace_s=0.0, **settings)
    async with running(agents=0, settings=ClusterSettings(orchestrator=front)) as cluster:
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
            await eventually(registered)
            yield cluster, store, client, [f"{crc32c(chunk):08x}" for chunk in chunks]
        finally:
            await client.close()


async def texts(response, comments=None, errors=None):
    async for line in response.lines():
        if comments is not None and line.startswith(b": "):
            comments.append(json.loads(line[2:]))
        if line.startswith(b'data: {"error"'):
            errors.append(json.loads(line[6:])["error"])
        elif line.startswith(b"data: {"):
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

        await eventually(complete)
        assert early_bytes < size_bytes


async def test_a_grpc_client_of_a_whole_answer_is_told_while_it_is_being_given():
    settings = {"grpc_listen": "http://127.0.0.1:0"}
    async with (
        cluster_of(0, **settings) as (cluster, store, _, said),
        connected(cluster.front.grpc_address) as rpc,
    ):
        asked = InferenceRequest(json=ASK_WHOLE.decode())
        call = rpc.open(OPENAI, "Completions", [asked])
        assert (await read(call)).HasField("progress")
        await until_ready_early(cluster)
        store.let(2 * CHUNK_BYTES)
        while not (await read(call)).progress.bytes_done:
            pass
        store.let()
        *_, last = await read_all(call)
        assert await call.code() is grpc.StatusCode.OK
        assert json.loads(last.chunk.json)["choices"][0]["text"] == "".join(said)


class Reading:
    """A stream that is read as it comes."""

    def __init__(self, client, address):
        self.comments = []
        self.texts = []
        self.errors = []
        self.done = asyncio.ensure_future(self._run(client, address))

    async def _run(self, client, address):
        async with client.send(address, "POST", "/v1/completions", JSON, ASK) as response:
            self.status = response.status
            async for text in texts(response, self.comments, self.errors):
                self.texts.append(text)


async def until_ready_early(cluster):
    """Return once the engine is ready and waits for bytes."""

    def ready():
        return [i for i in cluster.agents["a"]._instances.all() if i.usable and i.arriving]

    await eventually(ready)


def commented(reading: Reading, count: int) -> bool:
    return len(reading.comments) > count


async def test_who_streams_hears_of_the_bytes_until_its_first_token():
    async with cluster_of(0) as (cluster, store, client, said):
        address = Address(cluster.url)
        first = Reading(client, address)
        await until_ready_early(cluster)
        second = Reading(client, address)  # it never saw the engine start
        for each in (first, second):
            await eventually(partial(told, each, 0))
        store.let(CHUNK_BYTES - 1)  # nothing more
        for each in (first, second):
            count = len(each.comments)
            await eventually(partial(commented, each, count + 2))
            assert each.texts == []
        store.let()
        for each in (first, second):
            await each.done
            assert (each.status, each.texts, each.errors) == (200, said, [])


def told(reading, done_bytes):
    return [
        comment
        for comment in reading.comments
        if comment["state"] == "loading"
        and comment.get("bytes", 0) == done_bytes
        and comment.get("total")
    ]


@pytest.mark.parametrize("wait_s", ["0", "0.2"])
async def test_who_waits_for_bytes_is_sent_away_when_its_time_is_over(wait_s):
    async with cluster_of(0) as (cluster, store, client, said):
        address = Address(cluster.url)
        reading = Reading(client, address)
        await until_ready_early(cluster)
        headers = [*JSON, ("x-sllm-wait", wait_s)]

        async def ask():
            async with client.send(
                address, "POST", "/v1/completions", headers, ASK_WHOLE
            ) as response:
                return response.status, json.loads(await response.read())

        async def sent_away():
            status, body = await ask()
            assert (status, body["error"]["code"]) == (503, "model_loading")
            loading = body["loading"]  # `starting` until the agent's word of the engine comes
            return loading["state"] == "loading" and loading["total"] > loading["bytes"]

        await eventually(sent_away)
        store.let()
        await reading.done
        assert reading.texts == said

        async def answered():
            return (await ask())[0] == 200

        await eventually(answered)


async def test_who_waits_within_its_time_is_answered():
    async with cluster_of(0) as (cluster, store, client, said):
        address = Address(cluster.url)
        async with asyncio.TaskGroup() as group:

            async def ask():
                async with client.send(
                    address, "POST", "/v1/completions", JSON, ASK_WHOLE
                ) as response:
                    return response.status, json.loads(await response.read())

            first = group.create_task(ask())
            await until_ready_early(cluster)
            second = group.create_task(ask())
            await eventually(lambda: store.held)
            store.let()
        for status, body in (first.result(), second.result()):
            assert (status, body["choices"][0]["text"]) == (200, "".join(said))


async def test_bytes_that_do_not_come_end_the_stream_with_the_reason():
    async with cluster_of(0) as (cluster, store, client, _):
        reading = Reading(client, Address(cluster.url))
        await until_ready_early(cluster)
        await eventually(lambda: told(reading, 0))
        store.fail(StoreUnavailable("the store has gone"))
        await reading.done
        assert reading.texts == []
        assert [error["code"] for error in reading.errors] == ["store_unavailable"]


async def test_who_leaves_while_bytes_move_leaves_nothing():
    async with cluster_of(0) as (cluster, store, client, _):
        reading = Reading(client, Address(cluster.url))
        await until_ready_early(cluster)
        (instance,) = cluster.agents["a"]._instances.all()
        await eventually(lambda: instance.running)
        reading.done.cancel()
        await eventually(lambda: not instance.running)
        assert cluster.front._room.loading == 1
        store.let()
        await eventually(lambda: not cluster.front._room.loading)
        assert not instance.arriving

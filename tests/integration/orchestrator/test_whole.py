"""The real parts together: agents, loader, backends, ingestion and store behind the front door."""

from __future__ import annotations

import asyncio
import collections
import os
import signal
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.cluster import ClusterSettings, running

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client_of():
    clients = []

    def make(url):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        clients.append(client)
        return client

    return make


async def post(client, path, body):
    return await client.post(path.replace("/api", "../api", 1), body=body, cast_to=object)


async def create(client, name, **fields):
    await post(client, "/api/models", {"model": name, "backend": "fake", **fields})


async def test_a_fake_model_cold_and_warm_for_an_openai_client(client_of):
    async with running(agents=2) as cluster, client_of(cluster.url) as client:
        await create(client, "m", options={"tokens": "4"})
        for _ in range(2):
            stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
            parts = [p.choices[0].delta.content or "" async for p in stream if p.choices]
            assert "".join(parts)
        whole = await client.chat.completions.create(model="m", messages=HELLO)
        assert whole.choices[0].message.content == "".join(parts)


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_a_cold_stream_in_chunks_is_one_answer(client_of, route):
    """Clients that tell answers apart by `id` see one, from its first progress to its end."""
    front = OrchestratorSettings(comment_interval_s=0.02, stream_grace_s=0.0)
    async with (
        running(settings=ClusterSettings(orchestrator=front)) as cluster,
        client_of(cluster.url) as client,
    ):
        await create(client, "m", options={"tokens": "4", "start_s": "0.2"})
        asked = {"model": "m", "stream": True, "extra_headers": {"x-sllm-progress": "chunk"}}
        for cold in (True, False):
            if route == "chat":
                stream = await client.chat.completions.create(messages=HELLO, **asked)
            else:
                stream = await client.completions.create(prompt="hello", **asked)
            chunks = [chunk async for chunk in stream]
            ((name, _),) = {(chunk.id, chunk.created) for chunk in chunks}
            assert name.startswith("chatcmpl-" if route == "chat" else "cmpl-")
            assert chunks[-1].choices[0].finish_reason
            told = [chunk for chunk in chunks if chunk.model_extra.get("loading")]
            assert bool(told) is cold


async def test_two_hundred_clients_one_ingest_one_load(client_of, tmp_path):
    """A real checkpoint, converted and published, loaded once, answered by llama.cpp."""
    source = write_random_gguf(tmp_path / "tiny.gguf")
    async with running(agents=1) as cluster, client_of(cluster.url) as client:
        await post(client, "/api/models", {"model": "tiny", "source": f"file://{source}"})

        async def ask():
            try:
                await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
            except openai.APIStatusError as error:
                return error.status_code, "retry-after" in error.response.headers
            return 200, False

        found = collections.Counter(await asyncio.gather(*(ask() for _ in range(200))))
        assert set(found) <= {(200, False), (429, True), (503, True)}
        assert found[200, False] >= 1
        assert len(await cluster.store.list()) == 1
        placed = [m for a in await cluster.registry.list_agents() for m in a.models]
        assert [m.instances for m in placed] == [1]


async def test_a_killed_backend_is_replaced(client_of):
    async with running(agents=1) as cluster, client_of(cluster.url) as client:
        await create(client, "m")
        await client.chat.completions.create(model="m", messages=HELLO)
        for pid in backends_of(cluster):
            os.kill(pid, signal.SIGKILL)
        answer = await client.chat.completions.create(model="m", messages=HELLO)
        assert answer.choices[0].message.content


def backends_of(cluster):
    """Processes whose command line names the cluster's directory."""
    name = str(cluster.directory).encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                if name in Path(entry, "cmdline").read_bytes():
                    yield int(entry.name)


async def test_an_agent_that_closes_leaves_the_other_to_serve(client_of):
    async with running(agents=2) as cluster, client_of(cluster.url) as client:
        await create(client, "m")
        await client.chat.completions.create(model="m", messages=HELLO)
        holder = next(
            a.agent
            for a in await cluster.registry.list_agents()
            if any(m.instances for m in a.models)
        )
        await cluster.agents.pop(holder).close()
        answer = await client.chat.completions.create(model="m", messages=HELLO)
        assert answer.choices[0].message.content


async def test_a_client_that_leaves_frees_the_backend(client_of):
    async with running(agents=1) as cluster, client_of(cluster.url) as client:
        await create(client, "m", options={"slots": "1", "token_s": "0.05", "tokens": "1000"})
        stream = await client.chat.completions.create(
            model="m", messages=HELLO, stream=True, max_tokens=1000
        )
        await anext(aiter(stream))
        await stream.close()
        answer = await asyncio.wait_for(
            client.chat.completions.create(model="m", messages=HELLO, max_tokens=1), 2.0
        )
        assert answer.choices[0].message.content


async def test_unload_and_delete_take_everything_away(client_of, tmp_path):
    source = write_random_gguf(tmp_path / "tiny.gguf")
    async with running(agents=1) as cluster, client_of(cluster.url) as client:
        await post(client, "/api/models", {"model": "tiny", "source": f"file://{source}"})
        await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
        unloaded = await post(client, "/api/unload", {"model": "tiny"})
        assert unloaded["agents"] == ["agent-0"]
        assert list(backends_of(cluster)) == []
        await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
        deleted = await client.delete("../api/models/tiny", cast_to=object)
        assert deleted["bytes_freed"] > 0
        assert await cluster.store.list() == ()
        assert [p.name for p in cluster.dram_dir.iterdir() if p.suffix == ".bin"] == []
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="tiny", messages=HELLO)

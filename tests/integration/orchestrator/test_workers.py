"""Several processes on one port: each serves what is warm, all know the same, one acts."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serverlessllm.core.apikeys import ApiKey, NewApiKey
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.kept import Kept, one_of_each
from serverlessllm.testing.waiting import eventually

CHAT = "/v1/chat/completions"


def chat(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


@asynccontextmanager
async def each_worker(made, count: int = 2) -> AsyncIterator[list[Kept]]:
    """A connection to every worker; when this is entered, all know what the main process knows."""
    await made.front._workers.metrics()  # answered in turn, after every change before it
    found = await one_of_each(made.url, count)
    try:
        yield list(found.values())
    finally:
        for kept in found.values():
            await kept.close()


async def with_key(made, requests_per_minute: int | None = None) -> tuple[ApiKey, dict[str, str]]:
    """An API key that the main process knows of, and the header that proves it."""
    key, text = await made.registry.create_api_key(
        NewApiKey(name="k", requests_per_minute=requests_per_minute)
    )
    await made.until(lambda: bool(made.front.view.api_keys))
    return key, {"authorization": f"Bearer {text}"}


async def figure(made, name: str, *labels: str) -> float:
    text = (await made.ask("/metrics")).body.decode()
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in labels)
    )


async def test_every_worker_answers_what_is_warm_and_the_sum_is_shown(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    before = await figure(made, "sllm_requests_total", 'status="200"')
    running = await figure(made, "sllm_requests_running")  # of this process's earlier tests, too
    async with each_worker(made) as workers:
        for number, kept in enumerate(workers, 1):
            for _ in range(3 * number):
                whole = await kept.ask("POST", CHAT, chat("m"))
                assert (whole.status, json.loads(whole.body)["object"]) == (200, "o")
                assert "ttft" in whole.headers["server-timing"]
            await kept.send("POST", CHAT, chat("m", stream=True))
            streamed = await kept.answer()
            assert streamed.body.endswith(b"data: [DONE]\n\n")
    assert await figure(made, "sllm_requests_total", 'status="200"') - before == 11
    assert await figure(made, "sllm_requests_running") == running
    assert made.agents[0].loads == []
    assert len(made.agents[0].requests) == 11


async def test_what_is_not_hot_is_the_main_processs_and_comes_back_as_it_is(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    async with each_worker(made) as workers:
        for kept in workers:
            models = await kept.ask("GET", "/v1/models")
            assert [each["id"] for each in json.loads(models.body)["data"]] == ["m"]
            assert {"server-timing", "openai-processing-ms"} <= models.headers.keys()
            agents = await kept.ask("GET", "/api/agents?x=1")
            assert len(json.loads(agents.body)["agents"]) == 1
            assert (await kept.ask("GET", "/readyz")).status == 200
            assert (await kept.ask("GET", "/nothing")).status == 404
            assert (await kept.ask("GET", CHAT)).status == 405
            head = await kept.ask("HEAD", "/livez")
            assert head.status == 200
            named = await kept.ask("GET", "/v1/models", headers={"x-request-id": "mine"})
            assert named.headers["x-request-id"] == "mine"
            page = await kept.ask("GET", "/v1/models", headers={"origin": "http://evil"})
            assert page.status == 403
            foreign = await kept.ask("GET", "/v1/models", headers={"host": "evil.example"})
            assert foreign.status == 403


async def test_an_answer_is_kept_for_whichever_worker_is_asked_again(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    async with each_worker(made) as workers:
        told = [
            await kept.ask("POST", CHAT, chat("m"), {"idempotency-key": "k"}) for kept in workers
        ]
    assert [each.status for each in told] == [200, 200]
    assert told[0].body == told[1].body
    assert len(made.agents[0].requests) == 1


async def test_a_model_and_an_alias_made_meanwhile_are_known_to_all_at_once(cluster):
    made = await cluster(workers=2)
    async with each_worker(made) as (one, other):
        assert (await other.ask("POST", CHAT, chat("n"))).status == 404
        created = {"model": "n", "backend": "fake", "aliases": ["nick"]}
        assert (await one.ask("POST", "/api/models", created)).status == 201
        for kept in (other, one):
            assert (await kept.ask("POST", CHAT, chat("nick"))).status == 200
        assert (await one.ask("DELETE", "/api/models/n")).status < 300
        assert (await other.ask("POST", CHAT, chat("nick"))).status == 404
    assert len(made.agents[0].loads) == 1


async def test_a_revoked_key_opens_nothing_at_any_worker(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    key, bearer = await with_key(made)
    async with each_worker(made) as workers:
        for kept in workers:
            assert (await kept.ask("POST", CHAT, chat("m"))).status == 401
            assert (await kept.ask("POST", CHAT, chat("m"), bearer)).status == 200
            assert (await kept.ask("GET", "/v1/models")).status == 401
            assert (await kept.ask("GET", "/v1/models", headers=bearer)).status == 200
            assert (await kept.ask("GET", "/api/agents", headers=bearer)).status == 403
        await made.registry.revoke_api_key(key.id)

        async def refused_by_all() -> bool:
            told = [await kept.ask("POST", CHAT, chat("m"), bearer) for kept in workers]
            return [each.status for each in told] == [401, 401]

        await eventually(refused_by_all)


async def test_what_a_key_spends_at_one_worker_is_missing_at_the_other(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    key, bearer = await with_key(made, requests_per_minute=1)
    async with each_worker(made) as (one, other):
        assert (await one.ask("POST", CHAT, chat("m"), bearer)).status == 200
        await eventually(lambda: made.front.quotas.of(key).requests.left < 1)
        await made.front._workers.metrics()  # what the main process knows, the other one does
        for kept in (other, one):
            refused = await kept.ask("POST", CHAT, chat("m"), bearer)
            assert refused.status == 429
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(made.agents[0].requests) == 1


async def test_fifty_cold_requests_at_all_workers_are_one_load(cluster):
    made = await cluster(workers=2)
    await made.register("cold")
    agent = made.agents[0]
    agent.load_gate.clear()
    async with each_worker(made) as workers:
        for kept in workers:
            await kept.send("POST", CHAT, chat("cold", stream=True))
        for kept in workers:
            status, headers = await kept.head()
            assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            comment = b""
            while b'"nvme' not in comment:  # how far the one load is, told to all
                comment = await kept.chunk()
                assert comment.startswith(b": ")
        crowd = [asyncio.create_task(made.chat("cold")) for _ in range(48)]
        await eventually(lambda: len(agent.loads) == 1)
        waiting = 'sllm_requests_waiting{model="cold"} '
        await eventually(lambda: _shows(made, waiting + "50.0"))
        agent.load_gate.set()
        assert {answer.status for answer in await asyncio.gather(*crowd)} == {200}
        for kept in workers:
            body = b""
            while piece := await kept.chunk():
                body += piece
            assert body.endswith(b"data: [DONE]\n\n")
    assert len(agent.loads) == 1
    assert not await _shows(made, waiting)


async def _shows(made, text: str) -> bool:
    return text in (await made.ask("/metrics")).body.decode()


async def test_a_cold_model_that_is_not_waited_for_is_told_of_by_every_worker(cluster):
    made = await cluster(workers=2)
    await made.register("cold")
    agent = made.agents[0]
    agent.load_gate.clear()
    async with each_worker(made) as workers:
        for kept in workers:
            told = await kept.ask("POST", CHAT, chat("cold"), {"x-sllm-wait": "0"})
            assert told.status == 503
            assert json.loads(told.body)["error"]["code"] == "model_loading"
            assert json.loads(told.body)["loading"]["state"] in {"queued", "loading"}
        await eventually(lambda: len(agent.loads) == 1)
        agent.load_gate.set()
        for kept in workers:
            assert (await kept.ask("POST", CHAT, chat("cold"))).status == 200
    assert (len(agent.loads), agent.cancelled) == (1, 0)


async def test_a_client_that_leaves_a_worker_is_gone_for_everybody(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    await made.register("cold")
    agent = made.agents[0]
    agent.load_gate.clear()
    agent.first_gate.clear()
    async with each_worker(made) as (one, other):
        await one.send("POST", CHAT, chat("cold"))
        await eventually(lambda: len(agent.loads) == 1)
        await other.send("POST", CHAT, chat("m"))
        await eventually(lambda: agent.running == 1)
    await eventually(lambda: agent.cancelled == 2)
    assert agent.running == 0


async def test_an_agent_that_died_is_left_by_all_workers(cluster):
    made = await cluster(agents=2, workers=2)
    await made.warm("m")
    dead, alive = made.agents
    async with each_worker(made) as workers:
        await dead.kill()
        for kept in workers:
            for _ in range(4):
                assert (await kept.ask("POST", CHAT, chat("m"))).status == 200
        assert made.front.view.agents[dead.agent].failed
        assert not made.front.view.agents[alive.agent].failed


async def test_a_model_that_is_not_where_it_was_is_loaded_again_once(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    agent = made.agents[0]
    async with each_worker(made) as workers:
        agent.ready.clear()
        for kept in workers:
            assert (await kept.ask("POST", CHAT, chat("m"))).status == 200
    assert len(agent.loads) == 1


async def test_a_queue_that_is_too_long_asks_for_one_more_replica(cluster):
    made = await cluster(agents=2, workers=2)
    busy, idle = made.agents
    await made.register("m", max_replicas=2)
    await made.warm("m", busy)
    busy.first_gate.clear()
    async with each_worker(made) as workers:
        crowd = [asyncio.create_task(made.chat("m")) for _ in range(40)]
        await eventually(lambda: len(idle.loads) == 1)
        busy.first_gate.set()
        assert {answer.status for answer in await asyncio.gather(*crowd)} == {200}
        assert workers
    assert [load.spec.model for load in idle.loads] == [ModelId("m")]


async def test_nothing_is_left_of_workers_when_they_are_closed(cluster):
    await cluster(workers=1)
    before, tasks, children = open_descriptors(), asyncio.all_tasks(), _children()
    made = await cluster(workers=3)
    assert len(_children()) == len(children) + 3
    async with each_worker(made, 3):
        pass
    await made.close()
    assert _children() == children
    assert not list(made.directory.glob("*.sock"))
    await eventually(lambda: asyncio.all_tasks() <= tasks)
    await eventually(lambda: open_descriptors() <= before)


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_a_unix_socket_is_no_port(cluster):
    made = await cluster(workers=2)
    with pytest.raises(ValueError, match=r"orchestrator\.workers to 1"):
        await made.front._workers.start(Address(f"unix:{made.directory}/x.sock"))

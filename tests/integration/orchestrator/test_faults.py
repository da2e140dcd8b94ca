"""Agents that die, hang or refuse; a metadata store that goes away; a server that drains."""

from __future__ import annotations

import asyncio
import gc

import msgspec
import pytest

from serverlessllm.core.errors import TooManyRequests
from serverlessllm.openai.errors import ErrorBody
from serverlessllm.orchestrator.rest.call import Call

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def last_event(body):
    return msgspec.json.decode(body.split(b"data: ")[-1].strip(), type=ErrorBody).error


async def test_an_agent_killed_before_the_request_costs_latency_only(cluster):
    c = await cluster(agents=2)
    await c.warm("m")
    await c.agents[0].kill()
    answers = await asyncio.gather(*(c.chat("m") for _ in range(10)))
    assert {a.status for a in answers} == {200}


@pytest.mark.parametrize("stream", [True, False])
async def test_an_agent_that_dies_before_the_head_costs_latency_only(cluster, stream):
    c = await cluster(agents=2)
    await c.warm("m")
    c.agents[0].die_before_head = True
    for _ in range(6):
        assert (await c.chat("m", stream=stream)).status == 200


async def test_an_agent_that_dies_in_the_middle_ends_the_stream_with_an_error_event(cluster):
    c = await cluster(agents=2)
    await c.warm("m", c.agents[0])
    c.agents[0].die_after_tokens = 2
    answer = await c.chat("m", stream=True)
    assert b'"content": " two"' in answer.body
    assert last_event(answer.body).code == "backend_died"
    assert b"[DONE]" not in answer.body


async def test_the_only_agent_dies_and_comes_back(cluster):
    c = await cluster(agent_wait_s=5.0)
    await c.warm("m")
    await c.agents[0].kill()
    asking = asyncio.create_task(c.chat("m"))
    await c.until(lambda: c.front._room.waiting == 1)
    await c.add_agent()
    assert (await asking).status == 200


async def test_the_only_agent_dies_for_good(cluster):
    c = await cluster(agent_wait_s=0.1)
    await c.warm("m")
    await c.agents[0].kill()
    answer = await c.chat("m")
    assert (answer.status, answer.code) == (503, "no_capacity")
    assert "retry-after" in answer.headers


async def test_an_agent_that_hangs_loses_its_requests_to_another(cluster):
    c = await cluster(agents=2, agent_probe_after_s=0.2, agent_probe_s_max=1.0)
    await c.warm("m")
    hung = c.agents[0]
    gate = asyncio.Event()
    handle = hung._handle

    async def hang(request):
        await gate.wait()
        await handle(request)

    hung._server.handler = hang
    asking = [asyncio.create_task(c.chat("m", stream=i % 2 == 0)) for i in range(6)]
    assert {(await answer).status for answer in asking} == {200}
    gate.set()


async def test_an_agent_that_hangs_in_the_middle_of_a_stream_ends_it_with_an_error(cluster):
    c = await cluster(agent_probe_after_s=0.2, agent_probe_s_max=0.1)
    await c.warm("m")
    agent = c.agents[0]
    agent.token_gate.clear()
    asking = asyncio.create_task(c.chat("m", stream=True))
    await c.until(lambda: agent.running == 1)
    gate = asyncio.Event()

    async def hang(request):
        await gate.wait()

    agent._server.handler = hang
    assert last_event((await asking).body).code == "backend_died"


async def test_an_agent_whose_heartbeat_alone_is_late_keeps_its_requests(cluster):
    c = await cluster(agent_probe_after_s=0.1, agent_probe_s_max=10.0)
    await c.warm("m")
    agent = c.agents[0]
    agent.first_gate.clear()
    asking = asyncio.create_task(c.chat("m"))
    await c.until(lambda: agent.running == 1)
    await c.until(lambda: agent.probes >= 3)
    agent.first_gate.set()
    assert (await asking).status == 200
    assert len(agent.requests) == 1


async def test_a_refusal_is_never_retried_without_end(cluster):
    c = await cluster(agents=4)
    await c.warm("m")
    for agent in c.agents:
        agent.refuse = TooManyRequests("full", retry_after_s=3.0)
    answer = await c.chat("m")
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "queue_full", "3")
    assert sum(len(agent.requests) for agent in c.agents) == 3


async def test_a_backends_400_is_passed_on_and_not_retried(cluster):
    c = await cluster(agents=2)
    await c.warm("m")

    async def refuse(request, asked):
        request.respond(400, (("content-type", "application/json"),), b'{"error":{}}')

    for agent in c.agents:
        agent._generate = refuse
    answer = await c.chat("m")
    assert (answer.status, answer.body) == (400, b'{"error":{}}')
    assert sum(len(agent.requests) for agent in c.agents) == 1


async def test_retries_have_a_budget_of_their_own(cluster):
    c = await cluster(agents=2, retry_min=0, retry_share=0.0)
    await c.warm("m")
    for agent in c.agents:
        agent.die_before_head = True
    assert (await c.chat("m")).code == "backend_died"
    assert sum(len(agent.requests) for agent in c.agents) == 1


async def test_requests_that_lost_their_agent_leave_nothing(cluster):
    c = await cluster(
        agent_probe_after_s=0.05, agent_probe_s_max=0.05, retry_min=0, retry_share=0.0
    )
    gate = asyncio.Event()

    async def hang(request):
        await gate.wait()

    for _ in range(3):
        await c.warm("m")
        c.agents[0]._server.handler = hang
        assert (await c.chat("m")).code == "backend_died"
        c.agents[0]._server.handler = c.agents[0]._handle
    gate.set()
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Call]


async def test_a_metadata_store_that_goes_away_stops_changes_only(cluster):
    c = await cluster()
    await c.warm("m")
    await c.register("cold")
    database = c.directory / "metadata.db"
    for path in c.directory.glob("metadata.db*"):
        path.unlink()
    database.mkdir()
    await c.metadata.close()
    assert (await c.chat("m")).status == 200
    assert (await c.chat("cold")).status == 200
    assert (await c.ask("/v1/models")).status == 200
    answer = await c.ask("/api/models", {"model": "other"})
    assert (answer.status, answer.code) == (503, "metadata_unavailable")
    assert (await c.ask("/readyz")).status == 200


async def test_draining_finishes_what_runs_and_takes_nothing_new(cluster):
    c = await cluster(drain_accept_s=2.0, drain_finish_s=60.0)
    await c.warm("m")
    agent = c.agents[0]
    agent.token_gate.clear()
    client = await c.open({**ASK, "stream": True})
    await client.read_until(b"one")
    draining = asyncio.create_task(c.front.drain())
    await c.until(lambda: c.front._draining)
    ready = await c.ask("/readyz")
    assert (ready.status, ready.code) == (503, "overloaded")
    assert (await c.ask("/livez")).status == 200
    agent.token_gate.set()
    await client.read_until(b"[DONE]")
    await client.leave()
    await draining


async def test_what_does_not_finish_in_time_ends_with_an_error_event(cluster):
    c = await cluster(drain_finish_s=0.1, stream_grace_s=0.01, comment_interval_s=0.02)
    await c.warm("m")
    await c.register("cold")
    agent = c.agents[0]
    agent.token_gate.clear()
    agent.load_gate.clear()
    asking = [
        asyncio.create_task(c.chat("m", stream=True)),
        asyncio.create_task(c.chat("cold")),
    ]
    cold = await c.open({**ASK, "model": "cold", "stream": True})
    await cold.read_until(b": {")  # its first comment
    await c.until(lambda: agent.running == 1 and c.front._room.waiting == 2)
    await c.front.drain()
    warm, whole = await asyncio.gather(*asking)
    assert last_event(warm.body).code == "backend_died"
    assert b'"draining"' in await cold.reader.read()
    await cold.leave()
    assert (whole.status, whole.code) == (503, "draining")

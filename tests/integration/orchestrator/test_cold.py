"""A model that is not ready: one load, many waiters, and what they see."""

from __future__ import annotations

import asyncio
import collections
import json
from typing import Any

import msgspec
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from serverlessllm.core.errors import (
    LoadFailed,
    NoCapacity,
    SourceUnavailable,
    UnsupportedCheckpoint,
)
from serverlessllm.openai.errors import ErrorBody

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def test_two_hundred_clients_cause_one_ingest_and_one_load(cluster):
    c = await cluster(waiters_per_model_max=150)
    await c.register("org/cold", source="hf://org/cold")
    c.agents[0].load_gate.clear()
    asking = [asyncio.create_task(c.chat("org/cold", stream=i % 2 == 0)) for i in range(200)]
    await c.until(lambda: sum(task.done() for task in asking) == 50)
    c.agents[0].load_gate.set()
    answers = await asyncio.gather(*asking)
    assert collections.Counter(a.status for a in answers) == {200: 150, 429: 50}
    assert all("retry-after" in a.headers for a in answers if a.status == 429)
    assert {a.code for a in answers if a.status == 429} == {"queue_full"}
    assert (c.ingestion.ran, len(c.agents[0].loads)) == (1, 1)


async def test_an_agent_with_a_full_queue_makes_429_not_a_second_load(cluster):
    c = await cluster()
    await c.register("m")
    c.agents[0].queue_max = 8
    c.agents[0].first_gate.clear()
    asking = [asyncio.create_task(c.chat("m")) for _ in range(40)]
    await c.until(lambda: sum(task.done() for task in asking) == 32)
    c.agents[0].first_gate.set()
    answers = await asyncio.gather(*asking)
    assert collections.Counter(a.status for a in answers) == {200: 8, 429: 32}
    assert len(c.agents[0].loads) == 1


async def test_a_stream_begins_at_once_and_tells_how_far_the_load_is(cold):
    client = await cold.open(
        {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    )
    head = await client.read_until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"text/event-stream" in head
    for name in (b"x-request-id", b"server-timing", b"openai-processing-ms"):
        assert name in head
    while True:
        line = await client.read_until(b"\n")
        if b"bytes" in line:
            break
    progress = json.loads(line.removeprefix(b": "))
    assert progress == {"state": "loading", "stage": "nvme→dram", "bytes": 5, "total": 10}
    cold.agents[0].load_gate.set()
    rest = await client.read_until(b"data: [DONE]")
    assert b"three" in rest
    await client.leave()


async def test_a_cold_answer_explains_itself(cluster):
    c = await cluster()
    await c.register("m")
    answer = await c.chat("m")
    timing = dict(t.split(";dur=") for t in answer.headers["server-timing"].split(", "))
    assert (float(timing["read"]), float(timing["start"])) == (250.0, 500.0)
    show = (await c.ask("/api/models/m")).json()
    assert show["last_load"]["agent"] == "a1"
    assert [hop["hop"] for hop in show["last_load"]["hops"]] == ["nvme→dram", "start"]


async def test_after_the_wait_budget_comes_model_loading_and_the_load_goes_on(cluster):
    c = await cluster()
    await c.register("m")
    c.agents[0].load_gate.clear()
    answer = await c.chat("m", headers=(("x-sllm-wait", "0.1"),))
    assert (answer.status, answer.code) == (503, "model_loading")
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert answer.json()["loading"] == {
        "state": "loading", "stage": "nvme→dram", "bytes": 5, "total": 10,
    }  # fmt: skip
    again = await c.chat("m", headers=(("x-sllm-wait", "0.1"),))  # waits for the same load
    assert (again.status, again.code) == (503, "model_loading")
    assert c.agents[0].cancelled == 0
    c.agents[0].load_gate.set()
    await c.until(lambda: bool(c.agents[0].ready))
    assert (await c.chat("m")).status == 200
    assert len(c.agents[0].loads) == 1


async def test_fail_fast_answers_at_once_also_a_stream(cluster):
    c = await cluster()
    await c.register("m")
    c.agents[0].load_gate.clear()
    for stream in (False, True):
        answer = await c.chat("m", stream=stream, headers=(("x-sllm-wait", "0"),))
        assert (answer.status, answer.code) == (503, "model_loading")


async def test_a_wish_that_cannot_be_understood_is_refused_whatever_the_model_does(cluster):
    c = await cluster()
    await c.warm("m")
    for header in (("x-sllm-wait", "soon"), ("x-sllm-progress", "loud")):
        answer = await c.chat("m", headers=(header,))
        assert answer.status == 400
        assert answer.json()["error"]["param"].lower() == header[0]


async def test_a_client_that_drops_comments_is_told_by_chunks(cluster):
    c = await cluster(comment_interval_s=0.02, stream_grace_s=0.01)
    await c.register("m", aliases=["short"])
    c.agents[0].load_gate.clear()
    for path, body, kind in (
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "hi"}]},
            ChatCompletionChunk,
        ),
        ("completions", {"prompt": "hi"}, Completion),
    ):
        client = await c.open(
            {**body, "model": "short", "stream": True}, f"/v1/{path}", {"x-sllm-progress": "chunk"}
        )
        await client.read_until(b"\r\n\r\n")
        seen: list[dict[str, Any]] = []
        while not any(chunk["loading"]["total"] for chunk in seen):
            line = await client.read_until(b"\n\n")
            assert b"\n: " not in line
            seen.append(json.loads(line.partition(b"data: ")[2]))
        (name,) = {chunk["id"] for chunk in seen}
        assert name.startswith("chatcmpl-" if kind is ChatCompletionChunk else "cmpl-")
        for chunk in seen:
            (choice,) = chunk["choices"]
            assert choice.get("delta", choice.get("text")) in ({}, "")
            assert (chunk["model"], choice["finish_reason"]) == ("short", None)
            kind.construct(**chunk)
        if kind is ChatCompletionChunk:
            kind.model_validate(chunk)
        assert seen[-1]["loading"] == {
            "state": "loading", "stage": "nvme→dram", "bytes": 5, "total": 10,
        }  # fmt: skip
        await client.leave()
    c.agents[0].load_gate.set()


async def test_a_failed_load_tells_every_waiter_the_same_and_is_remembered(cluster):
    c = await cluster(load_agents_max=1)
    await c.register("m")
    agent = c.agents[0]
    agent.load_gate.clear()
    asking = [asyncio.create_task(c.chat("m")) for _ in range(5)]
    await c.until(lambda: c.front._room.waiting == 5)
    agent.load_error = LoadFailed("the engine said no")
    agent.load_gate.set()
    answers = await asyncio.gather(*asking)
    assert {(a.status, a.code) for a in answers} == {(503, "load_failed")}
    assert {a.json()["error"]["message"] for a in answers} == {"the engine said no"}
    agent.load_error = None
    assert (await c.chat("m")).code == "load_failed"
    assert len(agent.loads) == 1


async def test_a_refused_load_goes_to_the_next_best_agent(cluster):
    c = await cluster(agents=3)
    await c.register("m")
    c.agents[0].load_error = NoCapacity("full")
    c.agents[1].load_error = NoCapacity("full")
    assert (await c.chat("m")).status == 200
    assert [len(agent.requests) for agent in c.agents] == [0, 0, 1]


async def test_a_permanent_failure_is_not_tried_elsewhere(cluster):
    c = await cluster(agents=2)
    await c.register("org/m", source="hf://org/m")
    c.ingestion.error = UnsupportedCheckpoint("a pickle")
    answer = await c.chat("org/m")
    assert (answer.status, answer.code) == (503, "unsupported_checkpoint")
    assert answer.headers["x-should-retry"] == "false"
    assert [agent.loads for agent in c.agents] == [[], []]


async def test_a_hub_that_does_not_answer_is_said_in_the_stream_as_an_event(cluster):
    c = await cluster(stream_grace_s=0.0, comment_interval_s=0.02, agent_wait_s=0.2)
    c.ingestion.error = SourceUnavailable("the hub does not answer")
    answer = await c.chat("org/m", stream=True)
    if answer.status == 200:
        assert b'"code":"source_unavailable"' in answer.body
        assert b"[DONE]" not in answer.body
    else:
        assert answer.code == "source_unavailable"


async def test_a_load_that_fails_after_comments_ends_in_an_error_event(cluster):
    c = await cluster(stream_grace_s=0.0, comment_interval_s=0.02, load_agents_max=1)
    await c.register("m")
    agent = c.agents[0]
    agent.load_gate.clear()
    client = await c.open(
        {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    )
    head = await client.read_until(b"\r\n\r\n")
    await client.read_until(b"\n: ")
    agent.load_error = LoadFailed("the engine said no")
    agent.load_gate.set()
    rest = await client.read_until(b"\r\n0\r\n\r\n")
    await client.leave()
    event = rest.split(b"data: ")[-1].partition(b"\n\n")[0]
    error = msgspec.json.decode(event, type=ErrorBody).error
    assert head.startswith(b"HTTP/1.1 200")
    assert error.code == "load_failed"
    assert b"[DONE]" not in rest


async def test_without_any_agent_a_request_waits_for_one_to_come(cluster):
    c = await cluster(agents=0, agent_wait_s=5.0)
    await c.register("m")
    asking = asyncio.create_task(c.chat("m"))
    await c.until(lambda: c.front._room.waiting == 1)
    await c.add_agent()
    assert (await asking).status == 200


async def test_without_any_agent_there_is_no_capacity(cluster):
    c = await cluster(agents=0, agent_wait_s=0.05)
    await c.register("m")
    answer = await c.chat("m")
    assert (answer.status, answer.code) == (503, "no_capacity")
    await c.add_agent()
    await c.until(lambda: len(c.front.view.agents) == 1)
    assert (await c.chat("m")).status == 200  # the negative cache knows of the new agent


async def test_an_agent_that_has_lost_the_model_is_asked_to_load_it(cluster):
    c = await cluster()
    await c.warm("m")
    c.agents[0].ready.clear()
    assert (await c.chat("m")).status == 200
    assert len(c.agents[0].loads) == 1


async def test_a_crowd_at_an_agent_that_has_lost_the_model_costs_latency_only(cluster):
    c = await cluster()
    await c.warm("m")
    c.agents[0].ready.clear()
    answers = await asyncio.gather(*(c.chat("m", stream=i % 2 == 0) for i in range(40)))
    assert {answer.status for answer in answers} == {200}
    assert len(c.agents[0].loads) == 1


async def test_min_replicas_are_loaded_without_a_request_and_again_when_lost(cluster):
    c = await cluster(agents=2)
    await c.register("m", min_replicas=2)
    await c.until(lambda: all("m" in agent.ready for agent in c.agents))
    agent, other = c.agents
    agent.ready.clear()
    await agent.beat()
    await c.until(lambda: "m" in agent.ready)
    assert (len(agent.loads), len(other.loads)) == (2, 1)
    assert agent.requests == other.requests == []


async def test_a_queue_that_costs_more_than_a_load_scales_out(cluster):
    c = await cluster(agents=2)
    await c.warm("m", c.agents[0])
    c.agents[0].first_gate.clear()
    asking = [asyncio.create_task(c.chat("m")) for _ in range(30)]
    await c.until(lambda: "m" in c.agents[1].ready)
    await c.until(lambda: len(c.agents[0].requests) > 0)
    c.agents[0].first_gate.set()
    assert {(await task).status for task in asking} == {200}
    assert (await c.chat("m")).status == 200


async def test_a_full_agent_sends_the_request_to_a_load_elsewhere(cluster):
    c = await cluster(agents=2)
    await c.warm("m", c.agents[0])
    c.agents[0].queue_max = 0
    assert (await c.chat("m")).status == 200
    assert len(c.agents[1].requests) == 1


async def test_a_models_status_says_how_far_it_is(cluster):
    c = await cluster(load_agents_max=1, failure_cache_s=60.0)
    await c.register("m", aliases=["short"])

    async def status(name="short"):
        return (await c.ask(f"/v1/models/{name}")).json()["status"]

    cold = {
        "state": "cold", "stage": "", "bytes": 0, "total": None, "agents_ready": 0,
        "cache_level": "",
    }  # fmt: skip
    assert await status() == cold
    agent = c.agents[0]
    agent.load_gate.clear()
    asking = asyncio.create_task(c.chat("m"))
    await c.until(lambda: c.front._room.progress_of("m") is not None)
    while (seen := await status())["total"] is None:
        assert seen["state"] == "loading"
    assert seen == cold | {"state": "loading", "stage": "nvme→dram", "bytes": 5, "total": 10}
    agent.load_error = LoadFailed("the engine said no")
    agent.load_gate.set()
    await asking
    failed = await status()
    assert (failed["state"], failed["error"]["code"]) == ("failed", "load_failed")
    assert len(agent.loads) == 1, "looking wakes nothing"
    agent.load_error = None
    await c.warm("m")
    listed = (await c.ask("/v1/models")).json()["data"]
    assert [(model["id"], model["status"]["state"]) for model in listed] == [("m", "ready")]
    assert (await status())["agents_ready"] == 1

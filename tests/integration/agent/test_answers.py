"""Answers on their way through an agent: a scripted engine on one side, a client on the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from serverlessllm.agent.operations import InstanceEngine
from serverlessllm.backends.dialect import Operation
from serverlessllm.core.agentapi import (
    ANSWER_HEADER,
    MODEL_HEADER,
    REFUSED_HEADER,
    TOKEN_HEADER,
    USAGE_HEADER,
)
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.openai.answers import Asked, Kind
from serverlessllm.openai.errors import render_error
from serverlessllm.testing.agents import TOKEN, AgentClient, Machine, chat_body
from serverlessllm.testing.strict import check_chunks, check_stream, check_whole
from serverlessllm.testing.waiting import eventually, settled

Script = Callable[[Request], Awaitable[None]]
MODEL = "org/model"
JSON = (("content-type", "application/json"),)
EVENTS = (("content-type", "text/event-stream"),)
USAGE = b'"usage":{"prompt_tokens":3,"completion_tokens":2}'
WHOLE = b'{"choices":[{"message":{"content":"Hi"}}],%b}' % USAGE
FIRST = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":null}}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
COUNTS = b'data: {"choices":[],%b}\n\n' % USAGE
DONE = b"data: [DONE]\n\n"
STREAM = Asked(kind=Kind.CHAT, model=MODEL, stream=True)


def text(content: str) -> bytes:
    choice = {"index": 0, "delta": {"content": content}}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


class Engine:
    """Answers as it is told; knows what it was asked."""

    def __init__(self) -> None:
        self.script: Script
        self.asked: list[Any] = []
        self.left = asyncio.Event()
        """Set when an answer was given up."""

    async def handle(self, request: Request) -> None:
        if request.method == "GET":
            request.respond(200, JSON, b"{}")
            return
        self.asked.append(json.loads(await request.body()))
        try:
            await self.script(request)
        except asyncio.CancelledError:
            self.left.set()
            raise

    def says(self, *pieces: bytes, headers: Any = EVENTS, finish: bool = True) -> None:
        """Answer with these, one after the other."""

        async def script(request: Request) -> None:
            request.start(200, headers)
            for piece in pieces:
                await request.write(piece)
            if finish:
                request.finish()
            else:
                await asyncio.Event().wait()

        self.script = script


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def agent(engine: Engine, machine: Machine) -> AsyncIterator[AgentClient]:
    server = EdgeServer(
        engine.handle, EdgeSettings(drain_accept_s=0.0), render_error, SystemClock()
    )
    url = await server.start(Address("http://127.0.0.1:0"))
    try:
        async with machine.agent(answer_bytes_max=100_000) as agent:
            ready = await agent.load(ModelSpec(model=ModelId(MODEL), url=f"{url}/v1"))
            assert ready.state == "ready", ready
            yield agent
    finally:
        await server.close()


async def test_a_whole_answer_is_complete_and_counted(engine: Engine, agent: AgentClient) -> None:
    engine.says(WHOLE, headers=JSON)
    status, answer, response = await agent.chat(MODEL)
    assert status == 200
    check_whole(Asked(kind=Kind.CHAT, model=MODEL), json.dumps(answer).encode())
    assert response.headers.get(USAGE_HEADER) == "3 2"
    assert REFUSED_HEADER not in (response.headers.get("trailer") or "")


async def test_the_client_sees_the_name_it_used_and_the_engine_its_own(
    engine: Engine, agent: AgentClient
) -> None:
    engine.says(WHOLE, headers=JSON)
    body = chat_body("alias", keep_alive="1m")
    path = "/v1/chat/completions"
    _, answer, _ = await agent.ask("POST", path, body, **{MODEL_HEADER: MODEL})
    assert answer["model"] == "alias"
    assert engine.asked[0]["model"] == MODEL
    assert "keep_alive" not in engine.asked[0]


async def test_a_streams_counts_are_asked_for_and_kept_from_who_did_not(
    engine: Engine, agent: AgentClient
) -> None:
    engine.says(FIRST, text("Hi"), END, COUNTS, DONE)
    async with agent.send(
        "POST", "/v1/chat/completions", chat_body(MODEL, stream=True), **{MODEL_HEADER: MODEL}
    ) as response:
        assert response.headers.get("trailer") == USAGE_HEADER
        body = (await response.read()).decode()
        assert response.link.trailers == b"%b: 3 2\r\n" % USAGE_HEADER.encode()
    check_stream(STREAM, [event.removeprefix("data: ") for event in body.split("\n\n") if event])
    assert "usage" not in body
    assert engine.asked[0]["stream_options"] == {"include_usage": True}


async def test_connections_to_the_engine_are_used_again(engine: Engine, agent: AgentClient) -> None:
    engine.says(FIRST, text("Hi"), END, DONE)
    upstreams = agent.agent._upstreams
    (address,) = upstreams._pools
    before = upstreams.opened(address)
    for _ in range(5):
        assert (await agent.stream(MODEL))[-1] == "[DONE]"
    engine.says(WHOLE, headers=JSON)
    assert (await agent.chat(MODEL))[0] == 200
    assert upstreams.opened(address) <= before + 1


async def test_so_is_the_connection_of_a_stream_that_a_dialect_reads(
    engine: Engine, agent: AgentClient
) -> None:
    heard = asyncio.Queue[bytes]()

    async def script(request: Request) -> None:
        request.start(200, EVENTS)
        await request.write(FIRST + DONE)
        await heard.get()  # the body's end comes later than its last event
        request.finish()

    engine.script = script
    upstreams = agent.agent._upstreams
    slots = agent.agent._instances.slots(ModelId(MODEL))
    assert slots is not None
    async with slots.lease(None) as instance:
        dialects = InstanceEngine(instance, upstreams, Operation.CHAT, "r", 1000)
        before = upstreams.opened(instance.address)
        for _ in range(5):
            async for data in dialects.stream("/v1/chat/completions", b"{}"):
                heard.put_nowait(data)
        assert upstreams.opened(instance.address) <= before + 1


async def test_each_event_comes_out_before_the_next_goes_in(
    engine: Engine, agent: AgentClient
) -> None:
    heard = asyncio.Queue[None]()

    async def script(request: Request) -> None:
        request.start(200, EVENTS)
        for event in (FIRST, text("a"), text("b")):
            await request.write(event)
            await heard.get()
        await request.write(END + DONE)
        request.finish()

    engine.script = script
    contents = []
    async with agent.send(
        "POST", "/v1/chat/completions", chat_body(MODEL, stream=True), **{MODEL_HEADER: MODEL}
    ) as response:
        async for line in response.lines():
            if line.startswith(b"data: {"):
                heard.put_nowait(None)
                contents.append(json.loads(line[6:])["choices"][0]["delta"].get("content"))
    assert contents == ["", "a", "b", None]


async def test_a_name_that_the_client_has_seen_is_kept(engine: Engine, agent: AgentClient) -> None:
    named = b'data: {"id":"chatcmpl-own","created":7,"choices":[{"index":0,"delta":{}}]}\n\n'
    engine.says(named, END + DONE)
    for promised, status in (("name 1700000000", 200), ("name", 400), (" 1", 400), ("n x", 400)):
        async with agent.send(
            "POST",
            "/v1/chat/completions",
            chat_body(MODEL, stream=True),
            **{MODEL_HEADER: MODEL, ANSWER_HEADER: promised},
        ) as response:
            assert response.status == status
            if status == 200:
                lines = [line[6:] async for line in response.lines() if line[:7] == b"data: {"]
                seen = {(chunk["id"], chunk["created"]) for chunk in map(json.loads, lines)}
                assert seen == {("chatcmpl-name", 1_700_000_000)}
            else:
                assert json.loads(await response.read())["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b'data: {"error":{"message":"too long","code":400}}\n\n', 400),
        (b"<html>", 502),
        (b"data: {{\n\n", 502),
        (b"", 502),
        (DONE, 502),
    ],
)
async def test_a_failure_before_the_first_event_has_a_status(
    engine: Engine, agent: AgentClient, said: bytes, status: int
) -> None:
    engine.says(said)
    got, answer, response = await agent.chat(MODEL, stream=True)
    assert got == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    # The request, or the engine, would fare no better elsewhere.
    assert response.headers.get(REFUSED_HEADER) is None


@pytest.mark.parametrize("said", [b'data: {"error":"x"}\n\n', b"data: {{\n\n"])
async def test_a_failure_later_is_an_event_and_the_engine_is_let_go(
    engine: Engine, agent: AgentClient, said: bytes
) -> None:
    engine.says(FIRST, text("Hi"), said, text("lost"), finish=False)
    *events, last = await agent.stream(MODEL)
    assert json.loads(last)["error"]["code"] == "backend_protocol_error"
    check_chunks(STREAM, [json.loads(event) for event in events])
    assert "lost" not in "".join(events)
    await asyncio.wait_for(engine.left.wait(), 60)


async def test_an_early_end_is_no_end(engine: Engine, agent: AgentClient) -> None:
    engine.says(FIRST, text("Hi"))
    *_, last = await agent.stream(MODEL)
    assert json.loads(last)["error"]["code"] == "backend_protocol_error"


@pytest.mark.parametrize(
    ("said", "stream"),
    [(WHOLE, True), (FIRST + END, False), (b"x" * 200_000, False), (b"{", False), (b"", False)],
)
async def test_an_answer_of_another_form_is_none(
    engine: Engine, agent: AgentClient, said: bytes, stream: bool
) -> None:
    engine.says(said, headers=JSON)
    status, answer, _ = await agent.chat(MODEL, stream=stream)
    assert (status, answer["error"]["code"]) == (502, "backend_protocol_error")


async def test_an_error_with_status_200_is_one(engine: Engine, agent: AgentClient) -> None:
    engine.says(b'{"error":{"message":"no such tool","code":400}}', headers=JSON)
    for stream in (True, False):
        status, answer, _ = await agent.chat(MODEL, stream=stream)
        assert (status, answer["error"]["message"]) == (400, "no such tool")


@pytest.mark.parametrize(
    ("route", "field"),
    [("chat/completions", "messages"), ("completions", "prompt"), ("embeddings", "input")],
)
@pytest.mark.parametrize("as_event", [True, False])
async def test_what_is_longer_than_the_context_is_named(
    engine: Engine, agent: AgentClient, route: str, field: str, as_event: bool
) -> None:
    said = b'{"error":{"message":"too long","type":"exceed_context_size_error","code":400}}'
    stream = as_event and field != "input"
    if as_event:
        engine.says(b"data: %b\n\n" % said if stream else said, headers=EVENTS if stream else JSON)
    else:

        async def refuse(request: Request) -> None:
            request.respond(400, JSON, said)

        engine.script = refuse
    prompt = [{"role": "user", "content": "hi"}] if field == "messages" else "hi"
    body = json.dumps({"model": MODEL, field: prompt, "stream": stream}).encode()
    path = f"/v1/{route}"
    status, answer, _ = await agent.ask("POST", path, body, **{MODEL_HEADER: MODEL})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == field


async def test_a_slow_reader_holds_its_engine_back(engine: Engine, agent: AgentClient) -> None:
    total = 4_000
    piece = text("x" * 10_000)
    sent = 0

    async def script(request: Request) -> None:
        nonlocal sent
        request.start(200, EVENTS)
        for _ in range(total):
            await request.write(piece)
            sent += 1
        await request.write(END + DONE)
        request.finish()

    engine.script = script
    async with agent.send(
        "POST", "/v1/chat/completions", chat_body(MODEL, stream=True), **{MODEL_HEADER: MODEL}
    ) as response:
        response.link.pause()
        await eventually(lambda: sent)
        # What the sockets and buffers of two hops hold, and no more.
        assert await settled(lambda: sent) * len(piece) < 20_000_000
        response.link.resume()
        size = 0
        done = False
        async for line in response.lines():
            size += line.count(b"x" * 10_000)
            done = done or line == b"data: [DONE]"
    assert (size, done) == (total, True)


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_is_not_answered_any_more(
    engine: Engine, agent: AgentClient, stream: bool
) -> None:
    engine.says(FIRST, text("Hi"), finish=False)
    asking = asyncio.ensure_future(agent.chat(MODEL, stream=stream))
    await eventually(lambda: bool(engine.asked))
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(engine.left.wait(), 60)


async def test_an_old_client_gets_a_stream_without_chunks(
    engine: Engine, agent: AgentClient
) -> None:
    engine.says(FIRST, text("Hi"), END, DONE)
    body = chat_body(MODEL, stream=True)
    reader, writer = await asyncio.open_unix_connection(agent.address.removeprefix("unix:"))
    head = (
        "POST /v1/chat/completions HTTP/1.0\r\n"
        f"{TOKEN_HEADER}: {TOKEN}\r\n{MODEL_HEADER}: {MODEL}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    got = (await reader.read()).split(b"\r\n\r\n", 1)[1].decode()
    writer.close()
    await writer.wait_closed()
    check_stream(STREAM, [event.removeprefix("data: ") for event in got.split("\n\n") if event])


async def test_the_engines_death_before_its_first_event_lets_another_be_asked(
    engine: Engine, agent: AgentClient
) -> None:
    async def script(request: Request) -> None:
        request.start(200, EVENTS)
        await request.write(b": nothing yet\n\n")
        request.abort()

    engine.script = script
    status, answer, response = await agent.chat(MODEL, stream=True)
    assert (status, answer["error"]["code"]) == (502, "backend_died")
    assert response.headers.get(REFUSED_HEADER) == "backend_died"


async def test_its_death_later_is_told(engine: Engine, agent: AgentClient) -> None:
    async def script(request: Request) -> None:
        request.start(200, EVENTS)
        await request.write(FIRST + text("Hi") + b'data: {"choi')
        request.abort()

    engine.script = script
    *_, last = await agent.stream(MODEL)
    assert json.loads(last)["error"]["code"] == "backend_died"

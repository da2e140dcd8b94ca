"""`/v1/messages` through the front door, for Anthropic's own client."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import anthropic
import pytest

from serverlessllm.core.errors import LoadFailed

HI = [{"role": "user", "content": "hi"}]
ASK = {"model": "m", "max_tokens": 8, "messages": HI}
STREAM = {**ASK, "stream": True}


def client_of(c, key="any") -> Any:
    return anthropic.AsyncAnthropic(
        base_url=c.url, api_key=key, max_retries=0, _strict_response_validation=True
    )


def body_of(raised) -> Any:
    return raised.value.body


async def test_anthropics_client_finds_what_it_knows(warm):
    async with client_of(warm) as client:
        whole = await client.messages.create(
            model="m", max_tokens=8, messages=HI, system="Be kind."
        )
        assert (whole.content[0].text, whole.stop_reason) == ("one two three", "end_turn")
        assert whole._request_id
        async with client.messages.stream(model="m", max_tokens=8, messages=HI) as stream:
            assert "".join([text async for text in stream.text_stream]) == "one two three"
            assert (await stream.get_final_message()).stop_reason == "end_turn"
    assert json.loads(warm.agents[0].bodies[0])["messages"][0]["role"] == "system"


async def test_errors_are_anthropics(cluster):
    c = await cluster(api_key_sha256=[hashlib.sha256(b"good").hexdigest()])
    await c.register("m")
    async with client_of(c, "bad") as client:
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            await client.messages.create(model="m", max_tokens=8, messages=HI)
    assert body_of(unknown)["error"]["type"] == "authentication_error"
    assert unknown.value.request_id == body_of(unknown)["request_id"]
    async with client_of(c, "good") as client:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="x", max_tokens=8, messages=HI)
        assert body_of(missing)["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError) as bad:
            await client.messages.create(model="m", max_tokens=0, messages=HI)
        assert body_of(bad)["error"]["message"].startswith("max_tokens: ")
        c.agents[0].load_gate.clear()
        with pytest.raises(anthropic.APIStatusError) as loading:
            await client.messages.create(
                model="m", max_tokens=8, messages=HI, extra_headers={"x-sllm-wait": "0"}
            )
        assert (loading.value.status_code, loading.value.type) == (503, "overloaded_error")
        assert body_of(loading)["loading"]["state"]
        assert int(loading.value.response.headers["retry-after"]) >= 1


async def test_other_methods_are_refused_in_the_same_shape(warm):
    answer = await warm.ask("/v1/messages", method="GET")
    assert answer.status == 405
    assert answer.json()["type"] == "error"


async def test_a_stream_of_a_cold_model_begins_with_comments(cold):
    async with client_of(cold) as client:
        stream = await client.messages.create(model="m", max_tokens=8, messages=HI, stream=True)
        cold.agents[0].load_gate.set()
        types = [event.type async for event in stream]  # whoever reads events sees no comment
    assert (types[0], types[-1]) == ("message_start", "message_stop")


async def test_progress_as_a_ping_for_those_who_ask(cold):
    raw = await cold.open(STREAM, "/v1/messages", {"x-sllm-progress": "chunk"})
    before = await raw.read_until(b'"loading":{')
    assert b'event: ping\ndata: {"type":"ping","loading":{' in before
    assert b"message_start" not in before
    cold.agents[0].load_gate.set()
    await raw.read_until(b"event: message_stop")
    await raw.leave()


async def test_a_load_that_fails_in_a_stream_is_an_error_event(cold):
    agent = cold.agents[0]
    async with client_of(cold) as client:
        stream = await client.messages.create(model="m", max_tokens=8, messages=HI, stream=True)
        agent.load_error = LoadFailed("it does not fit")
        agent.load_gate.set()
        with pytest.raises(anthropic.APIStatusError) as failed:
            [event async for event in stream]
    assert body_of(failed)["error"]["type"] == "overloaded_error"


async def test_an_answer_that_breaks_off_ends_with_an_error_event(warm):
    warm.agents[0].die_after_tokens = 2
    answer = await warm.ask("/v1/messages", STREAM)
    text = answer.body.decode()
    assert text.rstrip().rpartition("\n\n")[2].startswith("event: error\n")
    assert "message_delta" not in text
    assert "message_stop" not in text


@pytest.mark.parametrize("streamed", [True, False])
async def test_who_leaves_stops_the_generation(warm, streamed):
    agent = warm.agents[0]
    agent.first_gate.clear()
    raw = await warm.open({**ASK, "stream": streamed}, "/v1/messages")
    await warm.until(lambda: agent.running == 1)
    await raw.leave()
    await warm.until(lambda: agent.cancelled == 1)


async def test_a_drain_tells_those_who_hear(cluster):
    c = await cluster(drain_finish_s=0.05)
    await c.warm("m")
    c.agents[0].token_gate.clear()
    raw = await c.open(STREAM, "/v1/messages")
    await raw.read_until(b'"text":"one"')
    draining = asyncio.create_task(c.front.drain())
    told = await raw.read_until(b"event: error\n")
    assert b"message_stop" not in told
    await raw.leave()
    await draining

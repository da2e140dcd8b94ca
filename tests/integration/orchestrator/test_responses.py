"""`/v1/responses` through the front door: told as it comes, kept, cold, broken off, left."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import openai
import pytest

from serverlessllm.core.apikeys import NewApiKey
from serverlessllm.core.errors import LoadFailed
from serverlessllm.testing.waiting import eventually, settled

ASK = {"model": "m", "input": "hi"}
STREAM = {**ASK, "stream": True}


def events_of(text):
    """The typed events of a stream, without its comments."""
    frames = [frame for frame in text.split("\n\n") if frame.startswith("event: ")]
    return [json.loads(frame.split("\ndata: ")[1]) for frame in frames]


async def ask(c, path="/v1/responses", body=None, *, key=None, **more):
    headers = () if key is None else (("authorization", f"Bearer {key}"),)
    return await c.ask(path, body, headers=headers, **more)


async def stream(c, body=None):
    answer = await ask(c, body=body or STREAM)
    assert answer.status == 200
    return events_of(answer.body.decode())


def client_of(c) -> Any:
    return openai.AsyncOpenAI(
        base_url=f"{c.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    )


async def test_an_openai_client_goes_on_from_a_response(warm):
    async with client_of(warm) as client:
        first = await client.responses.create(model="m", input="hi", instructions="Be kind.")
        assert first.output_text == "one two three"
        pieces = await client.responses.create(
            model="m", input="more", stream=True, previous_response_id=first.id
        )
        second = [event async for event in pieces][-1].response
        assert (second.output_text, second.previous_response_id) == ("one two three", first.id)
        assert json.loads(warm.agents[0].bodies[-1])["messages"] == [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "one two three"},
            {"role": "user", "content": "more"},
        ]
        assert await client.responses.retrieve(second.id) == second
        listed = [item async for item in client.responses.input_items.list(second.id, limit=2)]
        assert [item.role for item in listed] == ["user", "assistant", "user"]
        assert listed[1] == first.output[0]
        third = await client.responses.create(
            model="m", input=[{"type": "item_reference", "id": listed[0].id}, *second.output]
        )
        assert [i.id async for i in client.responses.input_items.list(third.id, order="asc")] == [
            listed[0].id,
            second.output[0].id,
        ]
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.create(model="m", input="x", previous_response_id=first.id)
        assert gone.value.code == "previous_response_not_found"
        assert gone.value.param == "previous_response_id"
        # What came of it has all that it needs.
        await client.responses.create(model="m", input="x", previous_response_id=second.id)
        with pytest.raises(openai.BadRequestError):
            await client.responses.cancel(second.id)


async def test_what_shall_not_be_stored_is_not(warm):
    made = (await ask(warm, body={**ASK, "store": False})).json()
    streamed = (await stream(warm, {**STREAM, "store": False}))[-1]["response"]
    for response in (made, streamed):
        assert response["store"] is False
        assert (await ask(warm, f"/v1/responses/{response['id']}")).code == "response_not_found"


async def test_each_key_has_its_own_responses(cluster):
    keys = [hashlib.sha256(key).hexdigest() for key in (b"mine", b"yours")]
    c = await cluster(api_key_sha256=keys)
    await c.warm("m")
    assert (await ask(c, body=ASK)).status == 401
    made = (await ask(c, body=ASK, key="mine")).json()
    path = f"/v1/responses/{made['id']}"
    assert (await ask(c, path, key="mine")).status == 200
    assert (await ask(c, path, key="yours")).code == "response_not_found"
    assert (await ask(c, path, key="yours", method="DELETE")).code == "response_not_found"
    more = {**ASK, "previous_response_id": made["id"]}
    assert (await ask(c, body=more, key="yours")).code == "previous_response_not_found"
    reference = {**ASK, "input": [{"type": "item_reference", "id": made["output"][0]["id"]}]}
    answer = await ask(c, body=reference, key="yours")
    assert (answer.status, answer.code) == (404, "item_not_found")
    assert (await ask(c, body=reference, key="mine")).status == 200


async def test_a_response_counts_once_against_its_keys_limits(cluster):
    c = await cluster()
    await c.warm("m")
    asked = NewApiKey(name="k", models=("m",), requests_per_minute=2, tokens_per_minute=10_000)
    key, text = await c.registry.create_api_key(asked)
    await c.until(lambda: key.sha256 in c.front.view.api_keys)
    for left in ("1", "0"):
        answer = await ask(c, body=STREAM, key=text)
        assert (answer.status, answer.headers["x-ratelimit-remaining-requests"]) == (200, left)
    answer = await ask(c, body=ASK, key=text)
    assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    answer = await c.ask(
        "/v1/messages",
        {"model": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]},
        headers=(("x-api-key", text),),
    )
    assert (answer.status, answer.json()["error"]["type"]) == (403, "permission_error")


async def test_pages_of_input_items(warm):
    items = [{"id": f"msg_{i}", "role": "user", "content": str(i)} for i in range(5)]
    made = (await ask(warm, body={**ASK, "input": items})).json()
    path = f"/v1/responses/{made['id']}/input_items"
    page = (await ask(warm, f"{path}?limit=2&after=msg_3")).json()
    assert [item["id"] for item in page["data"]] == ["msg_2", "msg_1"]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("msg_2", "msg_1", True)
    page = (await ask(warm, f"{path}?order=asc&after=msg_4")).json()
    assert (page["data"], page["has_more"]) == ([], False)
    for query, param in (
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=x", "after"),
    ):
        answer = await ask(warm, f"{path}?{query}")
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)


async def test_what_is_not_there_and_what_is_not_served(warm):
    made = (await ask(warm, body=ASK)).json()
    path = f"/v1/responses/{made['id']}"
    for method, where, code in (
        ("GET", "/v1/responses/resp_x", "response_not_found"),
        ("GET", "/v1/responses/resp_x/input_items", "response_not_found"),
        ("DELETE", "/v1/responses/resp_x", "response_not_found"),
        ("POST", "/v1/responses/resp_x/cancel", "response_not_found"),
        ("POST", f"{path}/cancel", "invalid_request"),
        ("GET", f"{path}?stream=true", "invalid_request"),
        ("GET", f"{path}/other", "not_found"),
        ("POST", path, "not_found"),
        ("GET", "/v1/responses", "method_not_allowed"),
        ("PUT", path, "method_not_allowed"),
        ("DELETE", f"{path}/input_items", "method_not_allowed"),
    ):
        assert (await ask(warm, where, method=method)).code == code, (method, where)


async def test_the_chats_headers_are_passed_on(cluster):
    c = await cluster()
    await c.register("m")
    answer = await ask(c, body=ASK)
    timing = dict(term.split(";dur=") for term in answer.headers["server-timing"].split(", "))
    assert (float(timing["read"]), float(timing["start"])) == (250.0, 500.0)
    assert answer.headers["x-request-id"]


async def test_bad_input_is_told_in_this_apis_words(warm):
    image = {"type": "input_image", "image_url": "http://stranger/x.png"}
    asked = {**ASK, "input": [{"role": "user", "content": [image]}]}
    error = (await ask(warm, body=asked)).json()["error"]
    assert error["param"].startswith("input[0].content[0]")
    assert error["message"].startswith(error["param"])
    answer = await ask(warm, body={**ASK, "model": "nobody"})
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert answer.headers["x-should-retry"] == "false"
    answer = await warm.ask("/v1/responses", b"{}", headers=(("content-type", "text/plain"),))
    assert answer.status in {400, 415}
    assert warm.agents[0].bodies == []


async def test_who_does_not_wait_is_told_how_far_the_load_is(cluster):
    c = await cluster()
    await c.register("m")
    c.agents[0].load_gate.clear()
    answer = await c.ask("/v1/responses", ASK, headers=(("x-sllm-wait", "0"),))
    body = answer.json()
    assert (answer.status, body["error"]["code"]) == (503, "model_loading")
    assert body["loading"]["state"]
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_stream_of_a_cold_model_begins_with_comments(cold):
    client = await cold.open(STREAM, "/v1/responses")
    head = await client.read_until(b"\r\n\r\n")
    assert b"200 OK" in head
    assert b"text/event-stream" in head
    assert b'"bytes"' in await client.read_until(b'"bytes":5')
    cold.agents[0].load_gate.set()
    rest = (await client.read_until(b'"type":"response.completed"')).decode()
    assert rest.index("response.created") < rest.index("one")
    await client.leave()


async def test_progress_as_an_event_for_those_who_ask(cold):
    client = await cold.open(STREAM, "/v1/responses", {"x-sllm-progress": "chunk"})
    before = (await client.read_until(b'"loading":{')).decode()
    cold.agents[0].load_gate.set()
    rest = (await client.read_until(b"event: response.completed\n")).decode()
    await client.leave()
    assert before.count("event: response.created") == 1
    assert "event: response.created" not in rest
    assert "event: response.output_text.done" in rest


async def test_a_load_that_fails_in_a_stream_is_an_error_event(cold):
    agent = cold.agents[0]
    client = await cold.open(STREAM, "/v1/responses")
    await client.read_until(b'"bytes"')
    agent.load_error = LoadFailed("it does not fit")
    agent.load_gate.set()
    text = (await client.read_until(b"\r\n0\r\n\r\n")).decode()
    await client.leave()
    (event,) = (json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: "))
    assert (event["type"], event["sequence_number"]) == ("error", 0)
    assert event["code"] == event["error"]["code"] == "load_failed"


async def test_an_answer_that_breaks_off_has_failed_and_is_not_kept(warm):
    warm.agents[0].die_after_tokens = 2
    events = await stream(warm)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert (await ask(warm, f"/v1/responses/{last['response']['id']}")).status == 404


async def test_an_agent_that_dies_before_its_answer_is_no_answer(warm):
    warm.agents[0].die_before_head = True
    answer = await ask(warm, body=STREAM)
    assert answer.status in {502, 503}


@pytest.mark.parametrize("streamed", [True, False])
async def test_who_leaves_stops_the_generation(warm, streamed):
    agent = warm.agents[0]
    agent.first_gate.clear()
    client = await warm.open({**ASK, "stream": streamed}, "/v1/responses")
    await warm.until(lambda: agent.running == 1)
    await client.leave()
    await warm.until(lambda: agent.cancelled == 1)
    await warm.until(lambda: warm.front._router.in_flight == 0)


async def test_who_leaves_in_the_middle_stops_the_generation(warm):
    agent = warm.agents[0]
    agent.token_gate.clear()
    client = await warm.open(STREAM, "/v1/responses")
    await client.read_until(b'"delta":"one"')
    await client.leave()
    await warm.until(lambda: agent.cancelled == 1)
    assert len(warm.front._responses.kept) == 0


async def test_each_piece_is_told_when_it_comes(warm):
    agent = warm.agents[0]
    agent.token_gate.clear()
    client = await warm.open(STREAM, "/v1/responses")
    await client.read_until(b'"delta":"one"')  # the others have not been made
    agent.token_gate.set()
    await client.read_until(b'"type":"response.completed"')
    await client.leave()


async def test_a_drain_tells_those_who_hear(cluster):
    c = await cluster(drain_finish_s=0.05)
    await c.warm("m")
    c.agents[0].token_gate.clear()
    client = await c.open(STREAM, "/v1/responses")
    await client.read_until(b'"delta":"one"')
    draining = asyncio.create_task(c.front.drain())
    told = await client.read_until(b'"type":"response.failed"')
    assert b"response.completed" not in told
    await client.leave()
    await draining


class Counted:
    """Tokens that are made when they are sent."""

    def __init__(self, count, size_bytes):
        self.left = count
        self._token = "x" * size_bytes

    def __iter__(self):
        while self.left:
            self.left -= 1
            yield self._token


async def test_who_does_not_read_holds_up_the_answer_and_nothing_grows(warm):
    agent = warm.agents[0]
    tokens = agent.tokens = Counted(128, 256 << 10)
    client = await warm.open(STREAM, "/v1/responses")
    client.writer.transport.pause_reading()
    await warm.until(lambda: tokens.left < 128)
    assert await settled(lambda: tokens.left) > 64
    client.writer.transport.resume_reading()
    await client.leave()
    await warm.until(lambda: agent.cancelled == 1)


async def test_an_answer_has_a_bound(cluster):
    c = await cluster(translated_bytes_max=2000)
    await c.warm("m")
    c.agents[0].tokens = ["x" * 600] * 8
    answer = await ask(c, body=ASK)
    assert (answer.status, answer.code) == (502, "backend_protocol_error")
    events = await stream(c)
    assert events[-1]["type"] == "response.failed"
    assert len(c.front._responses.kept) == 0


async def test_requests_of_our_own_take_no_client_s_connection(cluster):
    c = await cluster(edge={"connections_max": 1})
    await c.warm("m")
    assert (await c.ask("/v1/chat/completions", {"model": "m", "messages": []})).status == 400
    for _ in range(2):
        answer = await ask(c, body=ASK)
        assert (answer.status, answer.json()["status"]) == (200, "completed")


async def test_a_small_request_may_not_refer_to_much(cluster):
    c = await cluster(conversation_bytes_max=100_000)
    await c.warm("m")
    item = {"type": "message", "role": "user", "id": "long", "content": "x" * 60_000}
    first = (await ask(c, body={"model": "m", "input": [item]})).json()
    reference = {"type": "item_reference", "id": "long"}
    twice = await ask(c, body={"model": "m", "input": [reference, reference]})
    assert (twice.status, twice.code) == (413, "request_too_large")
    assert (await ask(c, body={"model": "m", "input": [reference]})).status == 200
    again = {**ASK, "input": [reference], "previous_response_id": first["id"]}
    assert (await ask(c, body=again)).status == 413
    assert (await ask(c, body={**ASK, "previous_response_id": first["id"]})).status == 200


async def test_a_conversation_has_a_bound_of_items(cluster):
    c = await cluster()
    await c.warm("m")
    body = {
        "model": "m",
        "input": [{"type": "reasoning"}] * 16_383 + [{"role": "user", "content": "hi"}],
    }
    first = await ask(c, body=body)
    assert first.status == 200
    more = await ask(c, body={**ASK, "previous_response_id": first.json()["id"]})
    assert (more.status, more.json()["error"]["param"]) == (400, "input")


async def test_each_route_is_counted_beside_the_chat_that_it_becomes(warm):
    async def count(route, status):
        text = (await warm.ask("/metrics")).body.decode()
        start = f'sllm_requests_total{{model="",route="{route}",status="{status}"}} '
        found = [line for line in text.splitlines() if line.startswith(start)]
        return float(found[0].removeprefix(start)) if found else 0.0

    asks = [
        ("/v1/responses", ASK, (), "/v1/responses", 200),
        ("/v1/responses", STREAM, (), "/v1/responses", 200),
        ("/v1/responses", {**ASK, "model": "none"}, (), "/v1/responses", 404),
        ("/v1/responses", {}, (), "/v1/responses", 400),
        ("/v1/responses", ASK, (("idempotency-key", "k"),), "/v1/responses", 200),
        ("/v1/responses", ASK, (("idempotency-key", "k"),), "/v1/responses", 200),
        ("/v1/responses/resp_none", None, (), "/v1/responses/", 404),
        ("/v1/messages", {"model": "m"}, (), "/v1/messages", 400),
        ("/v1/models", None, (), "/v1/models", 200),
    ]
    for path, body, headers, route, status in asks:
        before = await count(route, status)
        assert (await warm.ask(path, body, headers=headers)).status == status
        assert await count(route, status) == before + 1, (path, status)
    left = await count("/v1/responses", 499)
    warm.agents[0].token_gate.clear()
    client = await warm.open(STREAM, "/v1/responses")
    await client.read_until(b"output_text.delta")
    await client.leave()
    await warm.until(lambda: warm.agents[0].cancelled == 1)

    async def counted():
        return await count("/v1/responses", 499) == left + 1

    await eventually(counted)

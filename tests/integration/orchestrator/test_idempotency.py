"""`Idempotency-Key`: sent twice, answered once."""

from __future__ import annotations

import asyncio

import pytest

from serverlessllm.core.apikeys import NewApiKey

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


def under(key, *more):
    return (("idempotency-key", key), *more)


async def warm(cluster, **settings):
    c = await cluster(**settings)
    await c.warm("m")
    return c, c.agents[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_request_gets_the_same_answer_and_nobody_is_asked_again(cluster, stream):
    c, agent = await warm(cluster)
    body = {**CHAT, "stream": stream}
    first = await c.ask(PATH, body, headers=under("one"))
    again = await c.ask(PATH, body, headers=under("one"))
    assert (first.status, again.status) == (200, 200)
    assert again.body == first.body
    assert again.headers["content-type"] == first.headers["content-type"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert again.headers["server-timing"]
    assert len(agent.requests) == 1
    other = await c.ask(PATH, body, headers=under("two"))
    assert "idempotency-replayed" not in other.headers
    await c.ask(PATH, body)
    assert len(agent.requests) == 3


async def test_the_same_key_with_another_body_is_refused(cluster):
    c, agent = await warm(cluster)
    await c.ask(PATH, CHAT, headers=under("one"))
    answer = await c.ask(PATH, {**CHAT, "seed": 1}, headers=under("one"))
    assert (answer.status, answer.code) == (400, "idempotency_key_reused")
    assert len(agent.requests) == 1
    # Another path is another matter.
    embedded = await c.ask("/v1/embeddings", {"model": "m", "input": "x"}, headers=under("one"))
    assert embedded.status == 200


async def test_while_the_first_is_answered_the_second_is_told_to_come_back(cluster):
    c, agent = await warm(cluster)
    agent.first_gate.clear()
    first = asyncio.ensure_future(c.ask(PATH, CHAT, headers=under("one")))
    await c.until(lambda: bool(agent.requests))
    answer = await c.ask(PATH, CHAT, headers=under("one"))
    assert (answer.status, answer.code) == (409, "idempotency_in_progress")
    assert "x-should-retry" not in answer.headers
    agent.first_gate.set()
    assert (await first).status == 200
    replayed = await c.ask(PATH, CHAT, headers=under("one"))
    assert replayed.headers["idempotency-replayed"] == "true"


async def test_what_failed_is_tried_again(cluster):
    c, agent = await warm(cluster, retries_max=0)
    agent.die_before_head = True
    assert (await c.ask(PATH, CHAT, headers=under("one"))).status >= 500
    agent.die_before_head = False
    await agent.beat()
    await c.until(lambda: not c.front.view.agents[agent.agent].failed)
    answer = await c.ask(PATH, CHAT, headers=under("one"))
    assert answer.status == 200
    assert "idempotency-replayed" not in answer.headers


async def test_a_refused_request_is_refused_anew(cluster):
    c, agent = await warm(cluster)
    for _ in range(2):
        answer = await c.ask(PATH, {**CHAT, "n": -1}, headers=under("one"))
        assert answer.status == 400
        assert "idempotency-replayed" not in answer.headers
    assert (await c.ask(PATH, CHAT, headers=under("one"))).status == 200
    assert len(agent.requests) == 1


async def test_a_stream_that_broke_off_is_not_given_again(cluster):
    c, agent = await warm(cluster)
    body = {**CHAT, "stream": True}
    agent.die_after_tokens = 2
    broken = await c.ask(PATH, body, headers=under("one"))
    assert b'"error"' in broken.body
    agent.die_after_tokens = None
    await agent.beat()
    await c.until(lambda: not c.front.view.agents[agent.agent].failed)
    answer = await c.ask(PATH, body, headers=under("one"))
    assert b"[DONE]" in answer.body
    assert "idempotency-replayed" not in answer.headers


async def test_a_client_that_left_has_no_answer_to_be_given_again(cluster):
    c, agent = await warm(cluster)
    agent.first_gate.clear()
    first = asyncio.ensure_future(c.ask(PATH, CHAT, headers=under("one")))
    await c.until(lambda: bool(agent.requests))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await c.until(lambda: agent.cancelled == 1)
    agent.first_gate.set()
    answer = await c.ask(PATH, CHAT, headers=under("one"))
    assert answer.status == 200
    assert "idempotency-replayed" not in answer.headers


async def test_a_cold_models_stream_is_given_again_too(cluster):
    c = await cluster()
    await c.register("m")
    body = {**CHAT, "stream": True}
    first = await c.ask(PATH, body, headers=under("one"))
    again = await c.ask(PATH, body, headers=under("one"))
    assert first.body == again.body
    assert again.headers["idempotency-replayed"] == "true"


async def test_one_callers_key_is_not_another_ones(cluster):
    c, agent = await warm(cluster)
    bearers = []
    for name in ("alice", "bob"):
        key, text = await c.registry.create_api_key(NewApiKey(name=name))
        await c.until(lambda key=key: key.sha256 in c.front.view.api_keys)
        bearers.append(("authorization", f"Bearer {text}"))
    for bearer in bearers:
        answer = await c.ask(PATH, CHAT, headers=under("one", bearer))
        assert "idempotency-replayed" not in answer.headers
    answer = await c.ask(PATH, CHAT, headers=under("one", bearers[0]))
    assert answer.headers["idempotency-replayed"] == "true"
    assert len(agent.requests) == 2


async def test_answers_are_kept_within_bounds(cluster):
    c, agent = await warm(cluster, idempotency_keys_max=2, idempotency_answer_bytes_max=2000)
    for key in ("one", "two", "three"):
        await c.ask(PATH, CHAT, headers=under(key))
    replayed = [
        "idempotency-replayed" in (await c.ask(PATH, CHAT, headers=under(key))).headers
        for key in ("three", "two", "one")
    ]
    assert replayed == [True, True, False]
    agent.tokens = ["x" * 3000]
    for _ in range(2):  # too long to be kept
        answer = await c.ask(PATH, {**CHAT, "seed": 5}, headers=under("long"))
        assert answer.status == 200
        assert "idempotency-replayed" not in answer.headers
    counted = (await c.ask("/metrics")).body.decode()
    assert 'status="200"' in counted
    assert 'status="0"' not in counted


async def test_what_is_being_answered_takes_room_of_what_is_kept(cluster):
    c, agent = await warm(cluster, idempotency_bytes_max=5000)
    await c.ask(PATH, CHAT, headers=under("old"))
    agent.tokens = ["x" * 3000, "y"]
    agent.token_gate.clear()
    body = {**CHAT, "stream": True}
    clients = [await c.open(body, headers=dict(under(f"new{n}"))) for n in range(3)]
    for client in clients:
        await client.read_until(b"x" * 3000)
    replays = c.front._routes._replays
    assert 3000 < replays._bytes <= 5000
    agent.token_gate.set()
    for client in clients:
        await client.read_until(b"[DONE]")
        await client.leave()
    await c.until(lambda: not replays._running)
    assert sum(kept.size_bytes for kept in replays._kept.values()) == replays._bytes
    said = [
        "idempotency-replayed" in (await c.ask(PATH, body, headers=under(key))).headers
        for key in ("new0", "new1")
    ]
    assert said == [True, False]
    assert "idempotency-replayed" not in (await c.ask(PATH, CHAT, headers=under("old"))).headers


async def test_an_answer_is_forgotten_in_time(cluster):
    c, agent = await warm(cluster, idempotency_ttl_s=0.0)
    for _ in range(2):
        await c.ask(PATH, CHAT, headers=under("one"))
    assert len(agent.requests) == 2


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_has_a_length(cluster, key):
    c, agent = await warm(cluster)
    assert (await c.ask(PATH, CHAT, headers=under(key))).status == 400
    assert not agent.requests


async def test_a_key_means_nothing_where_nothing_is_made(cluster):
    c = await cluster(agents=0)
    for _ in range(2):
        answer = await c.ask("/v1/models", headers=under("one"))
        assert answer.status == 200
        assert "idempotency-replayed" not in answer.headers
        made = await c.ask("/api/models", {"model": "m"}, headers=under("one"))
    assert made.status == 409


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"model": "m", "input": "hi"}),
        (
            "/v1/messages",
            {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
        ),
    ],
)
async def test_other_dialects_are_answered_once_too(cluster, path, body, stream):
    c, agent = await warm(cluster)
    asked = {**body, "stream": stream}
    first = await c.ask(path, asked, headers=under("one"))
    again = await c.ask(path, asked, headers=under("one"))
    assert (first.status, again.status) == (200, 200)
    assert again.body == first.body
    assert again.headers["idempotency-replayed"] == "true"
    assert len(agent.requests) == 1

"""API keys through a real front door: made, used, limited, revoked."""

from __future__ import annotations

import asyncio
import hashlib

import msgspec
import pytest

from serverlessllm.core.apikeys import NewApiKey, Scope
from serverlessllm.orchestrator.rest import wire
from serverlessllm.testing.kept import Kept

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def bearer(text):
    return (("authorization", f"Bearer {text}"),)


async def make(c, name="k", **fields):
    """A key made elsewhere, once the front door has heard of it."""
    key, text = await c.registry.create_api_key(NewApiKey(name=name, **fields))
    await c.until(lambda: key.sha256 in c.front.view.api_keys)
    return key, text


async def test_the_first_key_shuts_the_door_and_the_last_does_not_open_it(cluster):
    c = await cluster()
    await c.warm("m")
    assert (await c.chat("m")).status == 200
    key, text = await make(c)
    refused = await c.chat("m")
    assert (refused.status, refused.code) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"
    for headers in (bearer(text), (("x-api-key", text),)):
        assert (await c.chat("m", headers=headers)).status == 200
    await c.registry.revoke_api_key(key.id)
    await c.until(lambda: c.front.view.api_keys[key.sha256].revoked_s is not None)
    answer = await c.chat("m", headers=bearer(text))
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert "revoked" in str(answer.json())
    assert (await c.chat("m")).status == 401


async def test_keys_are_made_listed_and_revoked_over_http(cluster):
    c = await cluster(agents=0)
    made = await c.ask("/api/keys", {"name": "boss", "scopes": ["admin"]})
    assert made.status == 201
    boss = msgspec.json.decode(made.body, type=wire.CreatedKey)
    admin = bearer(boss.key)
    # In force at once, here where it was made.
    assert (await c.ask("/api/keys")).status == 401
    body = {"name": "alice", "models": ["org/*"], "requests_per_minute": 5}
    alice = msgspec.json.decode(
        (await c.ask("/api/keys", body, headers=admin)).body, type=wire.CreatedKey
    )
    listed = await c.ask("/api/keys", headers=admin)
    assert {k.name for k in msgspec.json.decode(listed.body, type=wire.KeyList).keys} == {
        "boss",
        "alice",
    }
    for secret in (boss.key, alice.key, hashlib.sha256(alice.key.encode()).hexdigest()):
        assert secret.encode() not in listed.body
    answer = await c.ask("/api/keys", headers=bearer(alice.key))
    assert (answer.status, answer.code) == (403, "insufficient_scope")
    gone = await c.ask(f"/api/keys/{alice.id}", method="DELETE", headers=admin)
    assert msgspec.json.decode(gone.body, type=wire.KeyView).revoked_s is not None
    assert (await c.ask("/v1/models", headers=bearer(alice.key))).status == 401
    for path, status in (("/api/keys/nobody", 404), ("/api/keys/a%2fb", 404)):
        assert (await c.ask(path, method="DELETE", headers=admin)).status == status
    bad: tuple[dict[str, object], ...] = (
        {}, {"name": "x", "scope": "admin"}, {"name": "x", "scopes": ["root"]},
        {"name": "x", "requests_per_minute": 0},
    )  # fmt: skip
    for body in bad:
        assert (await c.ask("/api/keys", body, headers=admin)).status == 400


async def test_a_key_sees_and_uses_its_models_only(cluster):
    c = await cluster(on_demand_sources=())
    await c.register("other", aliases=["secret"])
    await c.register("org/m", aliases=["short"])
    await c.warm("org/m")
    _, text = await make(c, models=("short", "new/*"))
    headers = bearer(text)
    for name in ("org/m", "short"):
        assert (await c.chat(name, headers=headers)).status == 200
        assert (await c.ask(f"/v1/models/{name}", headers=headers)).status == 200
    for name in ("other", "secret", "nobody"):
        answer = await c.chat(name, headers=headers)
        assert (answer.status, answer.code) == (403, "model_not_allowed")
        assert (await c.ask(f"/v1/models/{name}", headers=headers)).status == 403
    unknown = await c.chat("new/one", headers=headers)
    assert (unknown.status, unknown.code) == (404, "model_not_found")
    assert b"other" not in unknown.body
    assert b"secret" not in unknown.body
    listed = (await c.ask("/v1/models", headers=headers)).json()["data"]
    assert [model["id"] for model in listed] == ["org/m"]


async def test_a_limited_key_is_told_what_is_left_and_when_to_come_back(cluster):
    c = await cluster()
    await c.warm("m")
    _, text = await make(c, requests_per_minute=2, tokens_per_minute=10_000)
    c.agents[0].usage = "7 12"
    first = await c.chat("m", headers=bearer(text))
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "10000"
    await c.chat("m", headers=bearer(text))
    answer = await c.chat("m", headers=bearer(text))
    assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
    assert answer.json()["error"]["type"] == "requests"
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    # Not limited: what is no inference, and whoever else has a key.
    listed = await c.ask("/v1/models", headers=bearer(text))
    assert (listed.status, listed.headers["x-ratelimit-limit-requests"]) == (200, "2")
    _, free = await make(c, "free")
    answer = await c.chat("m", headers=bearer(free))
    assert answer.status == 200
    assert not any(name.startswith("x-ratelimit") for name in answer.headers)


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_counted_as_the_agent_says(cluster, stream):
    c = await cluster()
    await c.warm("m")
    key, text = await make(c, tokens_per_minute=1000)
    c.agents[0].usage = "300 400"
    assert (await c.chat("m", stream=stream, headers=bearer(text))).status == 200
    usage = c.front.quotas.of(key)
    left = usage.tokens.left
    assert 295 <= left <= 400
    assert usage.running == 0
    answer = await c.ask("/v1/chat/completions", {**CHAT, "max_tokens": 900}, headers=bearer(text))
    assert (answer.status, answer.json()["error"]["type"]) == (429, "tokens")
    metrics = (
        await c.ask("/metrics", headers=bearer((await make(c, "x", scopes=(Scope.METRICS,)))[1]))
    ).body
    assert b'sllm_tokens_total{kind="completion",model="m"}' in metrics


async def test_a_request_that_fails_gives_its_tokens_back(cluster):
    c = await cluster(retries_max=0)
    await c.warm("m")
    key, text = await make(c, tokens_per_minute=1000)
    c.agents[0].die_before_head = True
    answer = await c.ask("/v1/chat/completions", {**CHAT, "max_tokens": 900}, headers=bearer(text))
    assert answer.status >= 500
    assert c.front.quotas.of(key).tokens.left == pytest.approx(1000, abs=1)


async def test_requests_at_once_are_counted_down_when_clients_leave(cluster):
    c = await cluster()
    await c.warm("m")
    key, text = await make(c, requests_at_once=1)
    c.agents[0].first_gate.clear()
    usage = c.front.quotas.of(key)
    running = asyncio.ensure_future(c.chat("m", headers=bearer(text)))
    await c.until(lambda: usage.running == 1)
    answer = await c.chat("m", headers=bearer(text))
    assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await c.until(lambda: usage.running == 0)
    c.agents[0].first_gate.set()
    assert (await c.chat("m", headers=bearer(text))).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_before_an_agent_was_asked_has_used_nothing(cluster, stream):
    c = await cluster()
    await c.register("m")
    key, text = await make(c, tokens_per_minute=1000)
    c.agents[0].load_gate.clear()
    body = {**CHAT, "max_tokens": 900, "stream": stream}
    client = await c.open(body, headers=dict(bearer(text)))
    await c.until(lambda: bool(c.agents[0].loads))
    usage = c.front.quotas.of(key)
    assert usage.running == 1
    await client.leave()
    await c.until(lambda: usage.running == 0)
    assert usage.tokens.left == 1000


async def test_before_the_keys_are_known_nobody_gets_in(cluster):
    c = await cluster(agents=0)
    c.front.view.listed = False  # as at a start without the metadata store
    answer = await c.ask("/v1/models")
    assert (answer.status, answer.code) == (503, "metadata_unavailable")
    assert (await c.ask("/livez")).status == 200
    assert (await c.ask("/readyz")).status == 200


async def test_an_outage_keeps_the_keys_that_are_known(cluster):
    c = await cluster()
    await c.warm("m")
    _, text = await make(c)
    await c.metadata.close()
    assert (await c.chat("m", headers=bearer(text))).status == 200
    assert (await c.chat("m")).status == 401
    assert (await c.chat("m", headers=bearer("guess"))).status == 401


@pytest.mark.parametrize("workers", [1, 2])
async def test_whoever_has_no_key_is_told_so_before_a_body_is_taken(cluster, workers):
    c = await cluster(agents=0, workers=workers)
    _, text = await make(c, scopes=tuple(Scope))
    await c.ask("/metrics", headers=bearer(text))  # every worker answers after it heard of the key
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/models", "/none"):
        for framing in (
            "content-length: 60000",
            "content-length: 600000",
            "content-length: 600000\r\nupgrade: h2c\r\nconnection: upgrade",
            "transfer-encoding: chunked",
        ):
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n".encode()
            kept = await Kept.open(c.url)
            kept.writer.write(head)
            answer = await asyncio.wait_for(kept.answer(), 20)
            assert (answer.status, answer.headers["connection"]) == (401, "close")
            said = msgspec.json.decode(answer.body)
            assert (said.get("type") == "error") == (path == "/v1/messages")
            assert not await asyncio.wait_for(kept.reader.read(), 20)
            await kept.close()
    body = b'{"model":5,"messages":[]}'
    kept = await Kept.open(c.url)
    kept.writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
        b"\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n" % (text.encode(), len(body))
    )
    await kept.writer.drain()
    for piece in (body[:9], body[9:]):
        kept.writer.write(piece)
        await kept.writer.drain()
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(kept.answer(), 20)).status == 400
    await kept.close()

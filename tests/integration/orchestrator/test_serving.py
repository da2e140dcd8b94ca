"""Warm requests, models, errors: what an OpenAI client meets."""

from __future__ import annotations

import asyncio
import hashlib
import json

import openai
import pytest

TIMING = ("queue", "place", "fetch", "read", "start", "ttft")


def check_headers(answer):
    assert answer.headers["x-request-id"]
    assert answer.headers["openai-processing-ms"].isdecimal()
    terms = [term.split(";dur=") for term in answer.headers["server-timing"].split(", ")]
    assert tuple(name for name, _ in terms) == TIMING
    assert all(float(value) >= 0 for _, value in terms)


async def test_an_openai_client_finds_everything_it_knows(cluster):
    c = await cluster()
    await c.warm("org/model")
    async with openai.AsyncOpenAI(base_url=f"{c.url}/v1", api_key="any", max_retries=0) as client:
        create = client.chat.completions.create
        whole = await create(model="org/model", messages=[{"role": "user", "content": "hi"}])
        assert whole.choices[0].message.content == "one two three"
        stream = await create(
            model="org/model", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert [p.choices[0].delta.content async for p in stream] == ["one", " two", " three"]
        text = await client.completions.create(model="org/model", prompt="hi")
        assert text.choices[0].text == "one two three"
        vector = await client.embeddings.create(
            model="org/model", input="hi", encoding_format="float"
        )
        assert vector.data[0].embedding == [0.25, 0.5]
        assert [m.id async for m in client.models.list()] == ["org/model"]
        assert (await client.models.retrieve("org/model")).owned_by == "org"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("org/other")
        assert missing.value.code == "model_not_found"


async def test_an_openai_client_streams_a_cold_model(cluster):
    c = await cluster(comment_interval_s=0.02, stream_grace_s=0.01)
    await c.register("cold")
    c.agents[0].load_gate.clear()
    async with openai.AsyncOpenAI(base_url=f"{c.url}/v1", api_key="any", max_retries=0) as client:
        asking = asyncio.create_task(
            client.chat.completions.create(
                model="cold", messages=[{"role": "user", "content": "hi"}], stream=True
            )
        )
        stream = await asking  # 200 before the load has ended
        c.agents[0].load_gate.set()
        assert [p.choices[0].delta.content async for p in stream] == ["one", " two", " three"]


async def test_every_answer_tells_its_id_and_its_times(cluster):
    c = await cluster()
    await c.warm("m")
    answers = [
        await c.chat("m"),
        await c.chat("m", stream=True),
        await c.chat("nobody"),
        await c.ask("/v1/chat/completions", b"{not json"),
        await c.ask("/v1/models"),
        await c.ask("/nowhere"),
        await c.ask("/api/models"),
        await c.ask("/api/models/none"),
        await c.ask("/livez"),
        await c.ask("/readyz"),
        await c.ask("/metrics"),
        await c.ask("/v1/chat/completions", method="GET"),
    ]
    for answer in answers:
        check_headers(answer)
    assert [a.status for a in answers] == [
        200,
        200,
        404,
        400,
        200,
        404,
        200,
        404,
        200,
        200,
        200,
        405,
    ]
    given = await c.ask("/livez", headers=(("x-request-id", "mine-1"),))
    assert given.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"model":"m","messages":' + b"[" * 200 + b"]" * 200 + b"}", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"{}", 400, "missing_required_parameter"),
        (b'{"model":"m"}', 400, "missing_required_parameter"),
        (
            b'{"model":"../etc","messages":[{"role":"user","content":""}]}',
            400,
            "invalid_model_name",
        ),
        (
            b'{"model":"m","messages":[{"role":"user","content":"x"}],"n":1e9}',
            400,
            "invalid_type",
        ),
    ],
)
async def test_a_bad_body_is_the_clients_fault_and_nobody_is_asked(cluster, body, status, code):
    c = await cluster()
    await c.warm("m")
    answer = await c.ask("/v1/chat/completions", body)
    assert (answer.status, answer.headers["x-should-retry"]) == (status, "false")
    assert answer.code == code
    assert c.agents[0].requests == []


async def test_a_body_over_the_limit_is_413(cluster):
    c = await cluster()
    answer = await c.ask("/v1/chat/completions", b" " * (33 << 20))
    assert (answer.status, answer.code) == (413, "request_too_large")
    check_headers(answer)


async def test_an_unknown_model_is_404_with_names_that_exist(cluster):
    c = await cluster(hint_names_max=2)
    for name in ("smollm2", "smollm3", "zebra"):
        await c.register(name)
    answer = await c.chat("smollm")
    assert (answer.status, answer.code) == (404, "model_not_found")
    message = answer.json()["error"]["message"]
    assert "smollm2, smollm3" in message
    assert "zebra" not in message


async def test_a_hub_name_is_ingested_on_its_first_request_when_allowed(cluster):
    c = await cluster()
    answer = await c.chat("org/new")
    assert answer.status == 200
    assert c.ingestion.ran == 1
    assert c.agents[0].loads[0].spec.source == "hf://org/new"


async def test_a_hub_name_is_unknown_when_the_hub_is_not_allowed(cluster):
    c = await cluster(on_demand_sources=[])
    assert (await c.chat("org/new")).code == "model_not_found"
    assert c.ingestion.ran == 0


async def test_an_alias_reaches_its_model(cluster):
    c = await cluster()
    await c.register("org/model", aliases=["short"])
    await c.warm("org/model")
    assert (await c.chat("short")).status == 200
    async with openai.AsyncOpenAI(base_url=f"{c.url}/v1", api_key="any", max_retries=0) as client:
        for name in ("short", "org/model"):
            shown = await client.models.retrieve(name)
            assert (shown.id, shown.to_dict()["root"], shown.owned_by) == (name, "org/model", "org")
        assert [(m.id, m.to_dict()["root"]) async for m in client.models.list()] == [
            ("org/model", "org/model")
        ]


async def test_warm_requests_read_nothing_from_the_metadata_store(cluster):
    c = await cluster()
    await c.warm("m")
    await c.metadata.close()
    answers = await asyncio.gather(*(c.chat("m") for _ in range(20)))
    assert {a.status for a in answers} == {200}


async def test_requests_spread_over_equal_agents(cluster):
    c = await cluster(agents=2)
    await c.warm("m")
    await asyncio.gather(*(c.chat("m") for _ in range(20)))
    assert min(len(agent.requests) for agent in c.agents) >= 5


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((("origin", "http://evil.example"),), 403),
        ((("host", "evil.example"),), 403),
        ((("host", "localhost:1"),), 200),
        ((("host", "127.0.0.1:1"), ("origin", "http://127.0.0.1:1")), 200),
        ((("host", "127.0.0.1:1"), ("origin", "http://127.0.0.1:2")), 403),
    ],
)
async def test_pages_of_other_origins_are_refused(cluster, headers, status):
    c = await cluster()
    host, _, port = c.url.removeprefix("http://").partition(":")
    lines = "".join(
        f"{name}: {value}\r\n" for name, value in {"host": host, **dict(headers)}.items()
    )
    for path in ("/api/models", "/v1/models"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {path} HTTP/1.1\r\n{lines}connection: close\r\n\r\n".encode())
        async with asyncio.timeout(60):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert int(head.split()[1]) == status
        assert status != 403 or json.loads(body)["error"]["code"] == "forbidden"


async def test_a_key_opens_every_route_but_the_probes(cluster):
    c = await cluster(api_key_sha256=[hashlib.sha256(b"secret").hexdigest()])
    for path in ("/v1/models", "/api/models", "/metrics", "/nowhere"):
        assert (await c.ask(path)).status == 401
        assert (await c.ask(path, headers=(("authorization", "Bearer wrong"),))).status == 401
        good = await c.ask(path, headers=(("authorization", "Bearer secret"),))
        assert good.status in {200, 404}
    assert (await c.ask("/livez")).status == 200
    assert (await c.ask("/readyz")).status == 200


async def test_the_metrics_tell_of_requests_and_schedule_errors(cluster):
    c = await cluster()
    await c.warm("measured")
    await c.chat("measured", stream=True)
    text = (await c.ask("/metrics")).body.decode()
    assert (
        'sllm_requests_total{model="measured",route="/v1/chat/completions",status="200"} 1.0'
        in text
    )
    assert "sllm_schedule_error_seconds_count" in text
    assert 'sllm_agents{state="alive"} 1.0' in text


async def test_keep_alive_travels_as_a_header_with_the_untouched_body(cluster):
    c = await cluster()
    await c.warm("m")
    seen = []
    agent = c.agents[0]
    serve = agent._serve

    async def spy(request):
        seen.append((request.headers.get("x-sllm-keep-alive"), await request.body()))
        await serve(request)

    agent._serve = spy
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "keep_alive": "5m"}
    await c.ask("/v1/chat/completions", body)
    await c.chat("m")
    assert [float(seen[0][0]), seen[1][0]] == [300.0, None]
    assert json.loads(seen[0][1]) == body

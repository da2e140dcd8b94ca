"""The OpenAI API over gRPC, by a real client, in front of scripted agents."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from serverlessllm.core.errors import LoadFailed
from serverlessllm.orchestrator.grpc.proto import serverlessllm_pb2 as pb
from serverlessllm.testing.rpc import OPENAI, connected, read, read_all
from serverlessllm.testing.rpc import heard as outcome

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def served(cluster):
    """`await served(**settings)` → a cluster that serves gRPC."""

    async def start(**settings):
        return await cluster(grpc_listen="http://127.0.0.1:0", **settings)

    return start


def kinds(heard):
    return [event.WhichOneof("event") for event in heard.messages]


def chunks(heard):
    return [json.loads(event.chunk.json) for event in heard.messages if event.HasField("chunk")]


async def test_a_stream_gives_every_chunk_as_the_backend_wrote_it(served):
    c = await served()
    await c.warm("m")
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai(
            "ChatCompletions", {**CHAT, "stream": True}, metadata=(("x-request-id", "mine"),)
        )
    assert heard.code is grpc.StatusCode.OK
    assert [piece["choices"][0]["delta"]["content"] for piece in chunks(heard)] == [
        "one",
        " two",
        " three",
    ]
    assert heard.initial["x-request-id"] == heard.trailing["x-request-id"] == "mine"
    assert {"server-timing", "openai-processing-ms"} <= heard.initial.keys()
    assert c.agents[0].requests == ["mine"]


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("ChatCompletions", CHAT),
        ("Completions", {"model": "m", "prompt": "hi"}),
        ("Embeddings", {"model": "m", "input": "hi"}),
    ],
)
async def test_a_whole_answer_is_one_chunk(served, method, body):
    c = await served()
    await c.warm("m")
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai(method, body)
    assert (kinds(heard), heard.code) == (["chunk"], grpc.StatusCode.OK)
    assert chunks(heard)[0]["model"] == "m"


@pytest.mark.parametrize(
    ("body", "code", "status", "param"),
    [
        ("{", "invalid_json", grpc.StatusCode.INVALID_ARGUMENT, None),
        ({**CHAT, "temperature": 9}, None, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({**CHAT, "model": "other"}, "model_not_found", grpc.StatusCode.NOT_FOUND, "model"),
        ({**CHAT, "user": "x" * (4 << 20)}, "request_too_large",
         grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    ],
)  # fmt: skip
async def test_a_refusal_comes_as_json_as_status_and_in_the_trailers(
    served, body, code, status, param
):
    c = await served()
    await c.warm("m")
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai("ChatCompletions", body)
    assert (kinds(heard), heard.code) == (["error"], status)
    error = heard.messages[0].error
    assert json.loads(error.json)["error"] == {
        "message": heard.details,
        "type": "invalid_request_error",
        "param": param,
        "code": error.code,
    }
    assert (error.message, error.param) == (heard.details, param or "")
    assert heard.trailing["x-sllm-code"] == error.code == (code or error.code)
    assert heard.trailing.get("x-sllm-param") == param
    assert heard.trailing["x-should-retry"] == "false"
    assert heard.trailing["x-request-id"]


async def test_bytes_that_are_no_message_and_no_message_are_refused(served):
    c = await served()
    async with connected(c.front.grpc_address) as rpc:
        for requests in ((b"\xff\xff",), (b"\x0a\x02\xff\xfe",), ()):
            heard = await rpc.call(OPENAI, "ChatCompletions", *requests)
            assert heard.code is grpc.StatusCode.INVALID_ARGUMENT
            assert heard.trailing["x-sllm-code"] == "invalid_request"


async def test_a_cold_model_tells_its_progress_and_then_answers(served):
    c = await served(comment_interval_s=0.02, stream_grace_s=0.01)
    await c.register("m")
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        call = rpc.open(
            OPENAI,
            "ChatCompletions",
            [pb.InferenceRequest(json=json.dumps({**CHAT, "stream": True}))],
        )
        seen = []
        async for event in call:
            seen.append(event.WhichOneof("event"))
            if seen[-1] == "progress" and event.progress.state == "loading":
                progress = event.progress
                c.agents[0].load_gate.set()
        assert await call.code() is grpc.StatusCode.OK
    assert (progress.stage, progress.bytes_done, progress.bytes_total) == ("nvme→dram", 5, 10)
    assert seen[0] == "progress"
    assert [kind for kind in seen if kind != "progress"] == ["chunk"] * 3


COLD = [
    ("ChatCompletions", CHAT),
    ("Completions", {"model": "m", "prompt": "hi"}),
    ("Embeddings", {"model": "m", "input": "hi"}),
]


async def waiting(c, rpc, method="ChatCompletions", body=CHAT, **metadata):
    """A call whose model loads, which has been told so; and what it was told."""
    call = rpc.open(
        OPENAI,
        method,
        [pb.InferenceRequest(json=json.dumps(body))],
        metadata=tuple((name.replace("_", "-"), value) for name, value in metadata.items()),
    )
    while True:
        event = await read(call)
        assert event.WhichOneof("event") == "progress"
        if event.progress.bytes_total:
            return call, event.progress


@pytest.mark.parametrize(("method", "body"), COLD)
async def test_an_answer_that_comes_whole_tells_its_progress_too(served, method, body):
    c = await served(comment_interval_s=0.02, stream_grace_s=0.01)
    await c.register("m")
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        call, progress = await waiting(c, rpc, method, body, x_request_id="mine")
        assert (progress.state, progress.stage) == ("loading", "nvme→dram")
        assert (progress.bytes_done, progress.bytes_total) == (5, 10)
        assert not progress.HasField("eta_s")
        c.agents[0].load_gate.set()
        heard = await outcome(call, await read_all(call))
    assert heard.code is grpc.StatusCode.OK
    assert [kind for kind in kinds(heard) if kind != "progress"] == ["chunk"]
    assert heard.initial["x-request-id"] == heard.trailing["x-request-id"] == "mine"
    assert {"server-timing", "openai-processing-ms"} <= heard.trailing.keys()
    assert not c.front._room.listeners._listeners


async def test_what_fails_quickly_or_is_warm_tells_no_progress(served):
    c = await served(comment_interval_s=0.02, stream_grace_s=60.0)
    await c.register("m")
    async with connected(c.front.grpc_address) as rpc:
        for _ in range(2):  # cold, but sooner ready than anything is told; warm
            assert kinds(await rpc.openai("ChatCompletions", CHAT)) == ["chunk"]


async def test_a_client_that_leaves_while_it_waits_leaves_nothing_behind(served):
    c = await served(comment_interval_s=0.02, stream_grace_s=0.01)
    await c.register("m")
    agent = c.agents[0]
    agent.load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        call, _ = await waiting(c, rpc)
        call.cancel()
        await c.until(lambda: agent.cancelled == 1)  # nobody else wanted the load
        await c.until(lambda: c.front._room.waiting == 0)
        await c.until(lambda: not c.front._room.listeners._listeners)
        agent.load_gate.set()
        assert (await rpc.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK
    assert len(agent.loads) == 2


async def test_others_wait_on_when_one_client_leaves(served):
    c = await served(comment_interval_s=0.02, stream_grace_s=0.01)
    await c.register("m")
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        (call, _), (other, _) = await asyncio.gather(waiting(c, rpc), waiting(c, rpc))
        call.cancel()
        await c.until(lambda: c.front._room.waiting == 1)
        c.agents[0].load_gate.set()
        heard = await outcome(other, await read_all(other))
    assert (kinds(heard)[-1], heard.code) == ("chunk", grpc.StatusCode.OK)
    assert len(c.agents[0].loads) == 1


async def test_a_load_that_fails_after_progress_ends_the_call_with_its_error(served):
    c = await served(comment_interval_s=0.02, stream_grace_s=0.01, load_agents_max=1)
    await c.register("m")
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        call, _ = await waiting(c, rpc, "Embeddings", {"model": "m", "input": "hi"})
        c.agents[0].load_error = LoadFailed("the engine said no")
        c.agents[0].load_gate.set()
        heard = await outcome(call, await read_all(call))
    assert heard.code is grpc.StatusCode.UNAVAILABLE
    assert heard.messages[-1].error.code == heard.trailing["x-sllm-code"] == "load_failed"
    assert chunks(heard) == []


async def test_progress_ends_with_the_wait(served):
    c = await served(comment_interval_s=0.02, stream_grace_s=0.01)
    await c.register("m")
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai("ChatCompletions", CHAT, metadata=(("x-sllm-wait", "0.5"),))
    assert heard.code is grpc.StatusCode.UNAVAILABLE
    assert set(kinds(heard)[:-1]) <= {"progress"}
    error = heard.messages[-1].error
    assert (error.code, error.loading.bytes_total) == ("model_loading", 10)
    assert c.front._room.waiting == 0
    c.agents[0].load_gate.set()


async def test_a_listener_of_nobody_is_nobody(served):
    c = await served(comment_interval_s=0.02, stream_grace_s=0.0)
    await c.register("m")
    assert (await c.chat("m", headers=(("x-sllm-listener", "0" * 32),))).status == 200


async def test_a_wait_of_nothing_is_told_how_far_the_load_is(served):
    c = await served()
    await c.register("m")
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai("ChatCompletions", CHAT, metadata=(("x-sllm-wait", "0"),))
        assert heard.code is grpc.StatusCode.UNAVAILABLE
        assert heard.trailing["x-sllm-code"] == "model_loading"
        assert int(heard.trailing["retry-after"]) >= 1
        error = heard.messages[-1].error
        assert error.code == "model_loading"
        assert error.HasField("loading")
        bad = await rpc.openai("ChatCompletions", CHAT, metadata=(("x-sllm-wait", "soon"),))
        assert bad.code is grpc.StatusCode.INVALID_ARGUMENT
    c.agents[0].load_gate.set()


async def test_a_deadline_bounds_the_wait_and_not_the_load(served):
    c = await served()
    await c.register("m")
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai("ChatCompletions", CHAT, timeout_s=1.0)
        # Answered just before the deadline; a stalled machine may pass it first.
        assert heard.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        c.agents[0].load_gate.set()
        heard = await rpc.openai("ChatCompletions", CHAT)
        assert heard.code is grpc.StatusCode.OK
    assert len(c.agents[0].loads) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_generation(served, stream):
    c = await served()
    await c.warm("m")
    agent = c.agents[0]
    (agent.token_gate if stream else agent.first_gate).clear()
    async with connected(c.front.grpc_address) as rpc:
        request = pb.InferenceRequest(json=json.dumps({**CHAT, "stream": stream}))
        call = rpc.open(OPENAI, "ChatCompletions", [request])
        if stream:
            assert (await read(call)).chunk.json
        await c.until(lambda: agent.running == 1)
        call.cancel()
        await c.until(lambda: agent.cancelled == 1)


async def test_a_deadline_during_the_answer_stops_the_generation(served):
    c = await served()
    await c.warm("m")
    c.agents[0].first_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai("ChatCompletions", CHAT, timeout_s=0.3)
        assert heard.code is grpc.StatusCode.DEADLINE_EXCEEDED
        # A stalled machine may pass the deadline before the agent hears of the request.
        await c.until(lambda: c.agents[0].cancelled == len(c.agents[0].requests))


async def test_an_agent_that_dies_in_the_answer_ends_it_with_an_error(served):
    c = await served()
    await c.warm("m")
    c.agents[0].die_after_tokens = 2
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai("ChatCompletions", {**CHAT, "stream": True})
    assert kinds(heard) == ["chunk", "chunk", "error"]
    assert heard.code is grpc.StatusCode.UNAVAILABLE
    assert heard.trailing["x-sllm-code"] == heard.messages[-1].error.code == "backend_died"


async def test_models_are_listed(served):
    c = await served()
    await c.register("org/a")
    await c.register("b", aliases=["gpt-4o"])
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.call(OPENAI, "ListModels", pb.ListModelsRequest())
    models = {model.id: (model.root, model.owned_by) for model in heard.messages[0].models}
    assert models == {"org/a": ("org/a", "org"), "b": ("b", "serverlessllm")}


async def test_a_watcher_sees_a_model_wake_and_wakes_none(served):
    c = await served(grpc_watch_interval_s=0.0)
    await c.register("m", aliases=["alias"])
    c.agents[0].load_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        call = rpc.open(OPENAI, "WatchModel", [pb.WatchModelRequest(model="alias")])
        first = await read(call)
        assert (first.model, first.root) == ("alias", "m")
        assert (first.state, first.agents_ready) == ("cold", 0)
        assert c.agents[0].loads == []
        chat = asyncio.ensure_future(rpc.openai("ChatCompletions", CHAT))
        states = ["cold"]
        async with asyncio.timeout(60):
            while states[-1] != "ready":
                status = await read(call)
                states.append(status.state)
                if status.state == "loading" and status.bytes_total:
                    assert (status.stage, status.bytes_done) == ("nvme→dram", 5)
                    c.agents[0].load_gate.set()
        assert "loading" in states
        assert (status.agents_ready, status.cache_level) == (1, "device")
        assert (await chat).code is grpc.StatusCode.OK
        await c.registry.delete_model("m")
        async with asyncio.timeout(60):
            while (status := await read(call)).state != "deleted":
                pass
        assert await read(call) is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_a_watcher_of_nothing_is_told_so(served):
    c = await served()
    async with connected(c.front.grpc_address) as rpc:
        for name in ("nobody", "", "../x", "a b\n?"):
            heard = await rpc.call(OPENAI, "WatchModel", pb.WatchModelRequest(model=name))
            assert heard.code is grpc.StatusCode.NOT_FOUND, name
            assert heard.trailing["x-sllm-code"] == "model_not_found"


async def test_a_failed_load_says_why(served):
    c = await served()
    await c.register("m")
    c.agents[0].load_error = LoadFailed("it is broken")
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.openai("ChatCompletions", {**CHAT, "stream": True})
    assert heard.code is grpc.StatusCode.UNAVAILABLE
    assert heard.trailing["x-sllm-code"] == "load_failed"
    assert "it is broken" in heard.details

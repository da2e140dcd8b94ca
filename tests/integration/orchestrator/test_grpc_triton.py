"""The Open Inference Protocol, by Triton's own client and by hand."""

from __future__ import annotations

import asyncio
import json
import queue
import struct
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient as BlockingClient
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from serverlessllm.core.errors import LoadFailed
from serverlessllm.orchestrator.grpc.proto import open_inference_pb2 as pb
from serverlessllm.testing.rpc import TRITON, connected, target

FINAL = "triton_final_response"


@pytest.fixture
async def served(cluster):
    """`await served(**settings)` → a cluster that serves gRPC, with a model `m` that is ready."""

    async def start(**settings):
        c = await cluster(grpc_listen="http://127.0.0.1:0", **settings)
        await c.warm("m")
        return c

    return start


@pytest.fixture
async def triton(served):
    """A cluster and Triton's client of it."""
    c = await served()
    async with InferenceServerClient(target(c.front.grpc_address)) as client:
        yield c, client


def text(name, *values):
    tensor = InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode() for value in values], dtype=np.object_))
    return tensor


def switch(name, on):
    tensor = InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([on]))
    return tensor


def raw_text(*values):
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def infer(*inputs, **fields):
    """A request as others than Triton's client write it: typed contents."""
    return pb.ModelInferRequest(
        model_name="m",
        inputs=[
            pb.ModelInferRequest.InferInputTensor(
                name=name,
                datatype="BYTES",
                shape=[1],
                contents=pb.InferTensorContents(bytes_contents=[value.encode()]),
            )
            for name, value in inputs
        ],
        **fields,
    )


async def test_the_server_and_its_models_are_described(triton):
    c, client = triton
    await c.register("cold")
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("m")
    assert await client.is_model_ready("cold")
    assert not await client.is_model_ready("nobody")
    assert (await client.get_server_metadata()).name == "serverlessllm"
    metadata = await client.get_model_metadata("m")
    assert "text_input" in {tensor.name for tensor in metadata.inputs}
    config = (await client.get_model_config("m")).config
    assert (config.backend, config.max_batch_size) == ("fake", 0)
    assert config.model_transaction_policy.decoupled
    index = await client.get_model_repository_index()
    assert {m.name: (m.state, m.reason) for m in index.models} == {
        "m": ("READY", ""),
        "cold": ("UNAVAILABLE", "cold"),
    }
    with pytest.raises(InferenceServerException, match="does not exist"):
        await client.get_model_metadata("nobody")
    with pytest.raises(InferenceServerException, match="no version"):
        await client.is_model_ready("m", "7")


async def test_text_in_text_out(triton):
    _, client = triton
    result = await client.infer(
        "m",
        [text("text_input", "Say it: "), text("sampling_parameters", '{"max_tokens": "5"}')],
        request_id="mine",
        parameters={"temperature": "0.5"},
    )
    assert list(result.as_numpy("text_output")) == [b"one two three"]
    assert (result.get_response().id, result.get_response().model_name) == ("mine", "m")
    result = await client.infer(
        "m",
        [
            text("text_input", "Say it: "),
            switch("exclude_input_in_output", on=False),
            switch("return_finish_reason", on=True),
        ],
    )
    assert list(result.as_numpy("text_output")) == [b"Say it: one two three"]
    assert list(result.as_numpy("finish_reason")) == [b"stop"]


async def test_a_chat_and_the_whole_openai_api(triton):
    _, client = triton
    messages = [{"role": "user", "content": "hi"}]
    result = await client.infer("m", [text("messages", json.dumps(messages))])
    assert list(result.as_numpy("text_output")) == [b"one two three"]
    whole = {"messages": messages, "seed": 4, "model": "another"}
    result = await client.infer("m", [text("openai_request", json.dumps(whole))])
    assert json.loads(result.as_numpy("openai_response")[0])["model"] == "m"
    assert list(result.as_numpy("text_output")) == [b"one two three"]


async def test_embeddings_are_numbers(triton):
    _, client = triton
    result = await client.infer(
        "m", [text("input", "a")], outputs=[InferRequestedOutput("embedding")]
    )
    assert result.as_numpy("embedding").tolist() == [[0.25, 0.5]]
    assert result.as_numpy("embedding").dtype == np.float32


async def test_a_stream_ends_with_an_empty_final_response_for_who_asks(triton):
    c, _ = triton
    heard: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        """As Triton's examples do it: a thread calls back."""
        with BlockingClient(target(c.front.grpc_address)) as client:
            client.start_stream(lambda result, error: heard.put(error or result.get_response()))
            for number in range(2):
                client.async_stream_infer(
                    "m",
                    [text("text_input", "hi"), switch("stream", on=True)],
                    outputs=[InferRequestedOutput("text_output")],
                    request_id=str(number),
                    enable_empty_final_response=True,
                )
            client.stop_stream()

    await asyncio.to_thread(ask)
    texts: dict[str, list[bytes]] = {"0": [], "1": []}
    finals = []
    while not heard.empty():
        response = heard.get_nowait()
        if response.parameters[FINAL].bool_param:
            finals.append(response.id)
            assert not response.outputs
        else:
            texts[response.id] += response.raw_output_contents
    said = [raw_text(b"one"), raw_text(b" two"), raw_text(b" three")]
    assert texts == {"0": said, "1": said}
    assert sorted(finals) == ["0", "1"]


async def test_a_stream_marks_its_last_response_for_others(triton):
    _, client = triton

    async def requests():
        for on in (True, False):
            yield {"model_name": "m", "inputs": [text("text_input", "hi"), switch("stream", on)]}

    heard: dict[bool, list[bytes]] = {True: [], False: []}
    async for result, error in client.stream_infer(requests()):
        assert error is None
        final = result.get_response().parameters[FINAL].bool_param
        heard[final] += list(result.as_numpy("text_output"))
    # The scripted backend never says why it ended, so the stream's end is a response of its own.
    assert sorted(heard[False]) == sorted([b"one", b" two", b" three"])
    assert sorted(heard[True]) == [b"", b"one two three"]


async def test_an_error_in_a_stream_is_its_request_s_and_the_stream_goes_on(triton):
    _, client = triton

    async def requests():
        yield {"model_name": "nobody", "inputs": [text("text_input", "hi")], "request_id": "a"}
        yield {"model_name": "m", "inputs": [text("text_input", "hi")], "request_id": "b"}
        yield {"model_name": "m", "inputs": [text("typo", "hi")], "request_id": "c"}

    good, bad = [], []
    async for result, error in client.stream_infer(requests()):
        if error is None:
            good.append(result.get_response().id)
        else:
            bad.append(error.message())
    assert good == ["b"]
    assert len(bad) == 2
    assert any("'nobody' does not exist" in message for message in bad)


async def test_who_wants_a_status_gets_one(served):
    c = await served()
    async with connected(c.front.grpc_address) as rpc:
        heard = await rpc.call(
            TRITON,
            "ModelStreamInfer",
            infer(("text_input", "hi"), model_version="3"),
            metadata=(("triton_grpc_error", "true"),),
        )
    assert heard.code is grpc.StatusCode.NOT_FOUND
    assert heard.trailing["x-sllm-code"] == "model_not_found"


async def test_a_cancelled_stream_stops_its_generations(served):
    c = await served()
    c.agents[0].token_gate.clear()
    request = infer(("openai_request", json.dumps({"prompt": "hi", "stream": True})))
    async with connected(c.front.grpc_address) as rpc:
        call = rpc.stream(TRITON, "ModelStreamInfer")
        for _ in range(3):
            await call.write(request)
        await c.until(lambda: c.agents[0].running == 3)
        call.cancel()
        await c.until(lambda: c.agents[0].cancelled == 3)


async def test_a_stream_runs_no_more_at_once_than_it_may(served):
    c = await served(grpc_requests_per_stream_max=2)
    c.agents[0].first_gate.clear()
    async with connected(c.front.grpc_address) as rpc:
        call = rpc.open(TRITON, "ModelStreamInfer", [infer(("text_input", "hi"))] * 5)
        await c.until(lambda: c.agents[0].running == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert c.agents[0].running == 2
        c.agents[0].first_gate.set()
        assert len([response async for response in call]) == 5


async def test_an_operator_loads_and_unloads(triton):
    c, client = triton
    await c.register("cold")
    await client.load_model("cold")
    assert "cold" in c.agents[0].ready
    await c.agents[0].beat()
    await client.unload_model("cold")
    assert [unload.model for unload in c.agents[0].unloads] == ["cold"]
    with pytest.raises(InferenceServerException, match="not supported"):
        await client.load_model("cold", config="{}")
    with pytest.raises(InferenceServerException, match="does not exist"):
        await client.unload_model("nobody")
    c.agents[0].load_error = LoadFailed("it is broken")
    with pytest.raises(InferenceServerException, match="it is broken") as raised:
        await client.load_model("cold")
    assert raised.value.status() == "StatusCode.UNAVAILABLE"


async def test_statistics_count_what_was_asked_here(triton):
    _, client = triton
    await client.infer("m", [text("text_input", "hi")])
    with pytest.raises(InferenceServerException):
        await client.infer("m", [text("text_input", "hi"), text("sampling_parameters", '{"n":0}')])
    (figures,) = (await client.get_inference_statistics("m")).model_stats
    assert (figures.inference_count, figures.execution_count) == (1, 1)
    assert (figures.inference_stats.success.count, figures.inference_stats.fail.count) == (1, 1)
    assert figures.inference_stats.success.ns > 0
    assert figures.last_inference > 0


async def test_statistics_of_an_alias_are_the_models(triton):
    c, client = triton
    await c.register("org/model", aliases=["short"])
    await c.warm("org/model")
    await client.infer("short", [text("text_input", "hi")])
    for name in ("short", "org/model"):
        (figures,) = (await client.get_inference_statistics(name)).model_stats
        assert (figures.name, figures.inference_count) == (name, 1)


async def test_what_cannot_be_asked_for_is_an_invalid_argument(served):
    c = await served()
    twice = infer(("text_input", "a"), ("text_input", "b"))
    both = infer(("text_input", "a"), ("messages", "[]"))
    streamed = infer(("openai_request", '{"prompt":"a","stream":true}'))
    nested = infer(("openai_request", "[" * 100_000))
    shared = infer(("text_input", "a"))
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    unknown = infer(("text_input", "a"), outputs=[{"name": "logits"}])
    unnamed = infer(("text_input", "a"))
    unnamed.model_name = ""
    async with connected(c.front.grpc_address) as rpc:
        for request in (infer(), twice, both, streamed, nested, shared, unknown, unnamed):
            heard = await rpc.call(TRITON, "ModelInfer", request)
            assert heard.code is grpc.StatusCode.INVALID_ARGUMENT, request
            assert heard.trailing["x-sllm-code"] in {"invalid_request", "invalid_json"}


async def test_raw_and_typed_contents_mean_the_same(served):
    c = await served()
    raw = pb.ModelInferRequest(
        model_name="m",
        inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [1, 1]}],
        raw_input_contents=[raw_text(b"hi")],
    )
    async with connected(c.front.grpc_address) as rpc:
        for request in (raw, infer(("text_input", "hi")), infer(("PROMPT", "hi"))):
            heard = await rpc.call(TRITON, "ModelInfer", request)
            assert heard.code is grpc.StatusCode.OK
            assert heard.messages[0].raw_output_contents[0] == raw_text(b"one two three")

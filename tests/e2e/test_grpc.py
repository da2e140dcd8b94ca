"""gRPC of the whole product: `sllm serve --grpc`, llama.cpp, real clients, a signal at the end."""

from __future__ import annotations

import json

import grpc
import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

from serverlessllm.core.ids import Address
from serverlessllm.orchestrator.grpc.proto import serverlessllm_pb2 as pb
from serverlessllm.testing.management import register
from serverlessllm.testing.processes import sllm
from serverlessllm.testing.rpc import OPENAI, connected, heard, read_all, target


async def test_a_cold_model_answers_over_grpc_and_the_server_leaves_quietly(data_dir, weights):
    address = Address(f"unix:{data_dir}/g.sock")
    with sllm("serve", "--port", "0", "--grpc", address, data_dir=data_dir) as serving:
        register(serving.address, model="tiny", source=weights.as_uri(), backend="llamacpp")
        asked = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 5,
            "temperature": 0,
        }
        async with connected(address) as rpc:
            call = rpc.open(
                OPENAI, "ChatCompletions", [pb.InferenceRequest(json=json.dumps(asked))]
            )
            events = await read_all(call)
            ended = await heard(call, events)
            whole = await rpc.openai(
                "ChatCompletions", {**asked, "stream": False, "stream_options": None}
            )
        assert ended.code is whole.code is grpc.StatusCode.OK
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == sorted(kinds, reverse=True)  # progress, then chunks
        pieces = [json.loads(event.chunk.json) for event in events if event.HasField("chunk")]
        assert pieces[-1]["usage"]["completion_tokens"] == 5
        text = "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces[:-1])
        answer = json.loads(whole.messages[0].chunk.json)
        assert answer["choices"][0]["message"]["content"] == text
        with InferenceServerClient(target(address)) as client:
            prompt = InferInput("text_input", [1], "BYTES")
            prompt.set_data_from_numpy(np.array([b"hi"], dtype=np.object_))
            result = client.infer("tiny", [prompt], parameters={"max_tokens": 3})
            assert result.as_numpy("text_output").shape == (1,)
            models = client.get_model_repository_index().models
            assert {model.name: model.state for model in models}["tiny"] == "READY"
        assert serving.stop() == 0
    assert "fork" not in serving.log.read_text()

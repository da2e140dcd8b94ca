"""What tensors ask for, as a body of the OpenAI API."""

from __future__ import annotations

import json

import pytest

from serverlessllm.core.errors import InvalidJSON, InvalidRequest
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.grpc.proto import open_inference_pb2 as pb
from serverlessllm.orchestrator.grpc.texts import read_request, write_answer


def asked(parameters=(), outputs=(), **inputs):
    made = pb.ModelInferRequest(model_name="org/m", outputs=[{"name": name} for name in outputs])
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        field, kind = {
            str: ("bytes_contents", "BYTES"),
            bool: ("bool_contents", "BOOL"),
            int: ("int_contents", "INT32"),
            float: ("fp32_contents", "FP32"),
        }[type(values[0])]
        tensor = made.inputs.add(name=name, datatype=kind, shape=[len(values)])
        getattr(tensor.contents, field).extend(
            v.encode() if isinstance(v, str) else v for v in values
        )
    kinds = {str: "string_param", int: "int64_param", float: "double_param"}
    for key, value in dict(parameters).items():
        setattr(made.parameters[key], kinds[type(value)], value)
    return read_request(made, RequestLimits())


def body(wanted):
    return json.loads(wanted.body)


def test_text_is_a_completion():
    wanted = asked(text_input="hi")
    assert (wanted.path, wanted.stream, wanted.outputs) == (
        "/v1/completions",
        False,
        ("text_output",),
    )
    assert body(wanted) == {"model": "org/m", "prompt": "hi", "stream": False}


def test_parameters_come_as_tensor_as_parameters_and_as_text():
    wanted = asked(
        {"temperature": "0.1", "top_p": 0.5, "user": "5", "sequence_id": 3, "timeout": 1},
        text_input="hi",
        sampling_parameters='{"max_tokens": "7", "n": 1, "ignore_eos": "true", "stop": "5"}',
        seed=4,
        stop_words=["a", "b"],
    )
    assert body(wanted) == {
        "model": "org/m",
        "prompt": "hi",
        "stream": False,
        "temperature": 0.1,
        "top_p": 0.5,
        "user": "5",
        "max_tokens": 7,
        "n": 1,
        "ignore_eos": True,
        "stop": ["a", "b"],
        "seed": 4,
    }


def test_messages_are_a_chat_and_a_stream_is_asked_for():
    wanted = asked(messages='[{"role": "user", "content": "hi"}]', stream=True)
    assert (wanted.path, wanted.stream) == ("/v1/chat/completions", True)
    assert body(wanted)["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"messages": []}', "/v1/chat/completions"),
        ('{"input": "x"}', "/v1/embeddings"),
        ('{"prompt": "x"}', "/v1/completions"),
    ],
)
def test_a_whole_request_finds_its_route_and_names_the_model_asked_for(text, path):
    wanted = asked(openai_request=text)
    assert wanted.path == path
    assert body(wanted)["model"] == "org/m"
    assert "openai_response" in wanted.outputs
    assert "stream" not in body(wanted)


def test_a_whole_request_says_itself_whether_it_streams():
    assert asked(openai_request='{"prompt":"x","stream": true }').stream
    assert not asked(openai_request='{"prompt":"x","stream":true}', stream=False).stream


def test_inputs_are_embedded_in_their_order():
    wanted = asked(input=["a", "b"])
    assert wanted.path == "/v1/embeddings"
    assert body(wanted) == {"model": "org/m", "input": ["a", "b"], "encoding_format": "base64"}
    response = pb.ModelInferResponse()
    write_answer(b'{"data":[{"embedding":"AACAPgAAAD8="}]}', wanted, response)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("FP32", [1, 2])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "exactly one"),
        ({"text_input": "a", "input": "b"}, "exactly one"),
        ({"text_input": ["a", "b"]}, "one element, not 2"),
        ({"text_input": 5}, "is BYTES"),
        ({"input": 5}, "is BYTES"),
        ({"text_input": "a", "stream": "yes"}, "is a BOOL"),
        ({"text_input": "a", "max_tokens": "5"}, "is a number"),
        ({"text_input": "a", "bad_words": "x"}, "no input 'bad_words'"),
        ({"text_input": "a", "stream": True, "exclude_input_in_output": False}, "no place"),
        ({"text_input": "a", "outputs": ["embedding"]}, "is not one of"),
        ({"input": "a", "outputs": ["text_output"]}, "is not one of"),
    ],
)
def test_what_is_wrong_is_said(inputs, says):
    with pytest.raises(InvalidRequest, match=says):
        asked(**inputs)


@pytest.mark.parametrize("name", ["text_input", "input"])
def test_a_text_of_nothing_but_line_breaks_is_refused(name):
    assert asked(**{name: "\n" * 400_000}).body
    with pytest.raises(InvalidRequest, match="line breaks"):
        asked(**{name: "\n" * 400_001})


@pytest.mark.parametrize("name", ["openai_request", "sampling_parameters"])
def test_json_of_very_many_members_is_refused(name):
    text = json.dumps({str(number): number for number in range(50_000)})
    others = {} if name == "openai_request" else {"text_input": "hi"}
    with pytest.raises(InvalidJSON, match="members"):
        asked(**{name: text}, **others)


@pytest.mark.parametrize("messages", ["[0]", "{}", '["hi"]', "[[]]"])
def test_messages_are_objects(messages):
    with pytest.raises(InvalidJSON, match="'messages'"):
        asked(messages=messages)

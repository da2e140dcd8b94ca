"""Tensors of strangers: every size is checked, nothing is believed."""

from __future__ import annotations

import contextlib
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidJSON, InvalidRequest, SLLMError
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.grpc.proto import open_inference_pb2 as pb
from serverlessllm.orchestrator.grpc.tensors import add_floats, add_strings, floats, read_inputs
from serverlessllm.orchestrator.grpc.texts import Wanted, read_request, write_answer

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32,
    "UINT64": np.uint64, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32,
    "INT64": np.int64, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip


def request(*tensors, raws=()):
    return pb.ModelInferRequest(model_name="m", inputs=tensors, raw_input_contents=raws)


def tensor(name="t", datatype="BYTES", shape=(1,), **contents):
    made = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents:
        made.contents.CopyFrom(pb.InferTensorContents(**contents))
    return made


def strings(*values):
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@pytest.mark.parametrize(("datatype", "kind"), NUMPY.items())
def test_raw_numbers_are_little_endian(datatype, kind):
    array = np.array([[0, 1, 1]], dtype=kind)
    raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
    found = read_inputs(request(tensor("x", datatype, (1, 3)), raws=[raw]))["x"]
    assert list(found.values) == array.ravel().tolist()


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_raw_strings_are_read_back(values):
    found = read_inputs(request(tensor(shape=(len(values),)), raws=[strings(*values)]))["t"]
    assert list(found.values) == values
    response = pb.ModelInferResponse()
    add_strings(response, "t", values)
    assert response.raw_output_contents[0] == strings(*values)


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True]),
        ("INT8", "int_contents", [-3]),
        ("INT64", "int64_contents", [1 << 40]),
        ("UINT16", "uint_contents", [7]),
        ("UINT64", "uint64_contents", [1 << 60]),
        ("FP32", "fp32_contents", [0.5]),
        ("FP64", "fp64_contents", [0.25]),
        ("BYTES", "bytes_contents", [b"x"]),
    ],
)
def test_contents_of_each_type(datatype, field, values):
    found = read_inputs(request(tensor("x", datatype, **{field: values})))["x"]
    assert (found.values, found.shape) == (tuple(values), (1,))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (request(tensor(bytes_contents=[b"a", b"b"])), "2 elements"),
        (request(tensor(shape=(2, 2), bytes_contents=[b"a"])), "says 4"),
        (request(tensor(shape=(-1,), bytes_contents=[b"a"])), "below 0"),
        (request(tensor(shape=(1 << 62,)), raws=[b""]), "shape of more"),
        (request(tensor(shape=(4096, 4096)), raws=[b""]), "more than 4096 elements"),
        (request(tensor(shape=(1,) * 9, bytes_contents=[b"a"])), "shape of more"),
        (request(tensor(datatype="FP7", bytes_contents=[b"a"])), "not known"),
        (request(tensor(int_contents=[1])), "not int_contents"),
        (request(tensor(datatype="FP16", fp32_contents=[1])), "raw_input_contents only"),
        (request(tensor(), tensor(), raws=[strings(b"a")] * 2), "twice"),
        (request(tensor(), raws=[strings(b"a"), b""]), "2 for 1 inputs"),
        (request(tensor(bytes_contents=[b"a"]), raws=[strings(b"a")]), "too"),
        (request(tensor(), raws=[b"\x05\x00\x00\x00ab"]), "inside an element"),
        (request(tensor(), raws=[b"\xff\xff\xff\xff"]), "inside an element"),
        (request(tensor(), raws=[b"\x01"]), "inside an element"),
        (request(tensor(datatype="INT32"), raws=[b"\x01"]), "has 1 bytes"),
        (request(*(tensor(str(n), bytes_contents=[b""]) for n in range(65))), "at most 64"),
        (request(tensor(shape=(0,)), raws=[bytes(4 * 5000)]), "more than 4096"),
        (request(tensor()), "0 elements"),
    ],
)
def test_what_does_not_fit_together_is_named(bad, says):
    with pytest.raises(InvalidRequest, match=says):
        read_inputs(bad)


def test_embeddings_are_rows_of_floats():
    response = pb.ModelInferResponse()
    add_floats(response, "e", [floats([0.25, -1.0]), floats([1.5, 2.0])])
    assert list(response.outputs[0].shape) == [2, 2]
    assert struct.unpack("<4f", response.raw_output_contents[0]) == (0.25, -1.0, 1.5, 2.0)


NAMES = st.sampled_from(
    ["text_input", "PROMPT", "messages", "openai_request", "input", "stream", "max_tokens",
     "sampling_parameters", "exclude_input_in_output", "stop", "seed", "odd"]
)  # fmt: skip
TEXTS = st.sampled_from(
    [b"hi", b"[]", b"{}", b"[{}]", b'{"prompt":1}', b'{"input":[1]}', b'{"stream":true}', b"\xff",
     b'{"messages":[]}', b"{", b'{"a":"\\ud800"}', b'{"max_tokens":"\\udc00"}', b'"5"', b"null",
     b'{"temperature":"nan","top_p":"0.5","n":"true"}']
)  # fmt: skip
SHAPES = st.lists(st.integers(-2, 3), max_size=3)


@st.composite
def tensors(draw):
    name, shape = draw(NAMES), draw(SHAPES)
    datatype = draw(st.sampled_from(["BYTES", "BOOL", "INT32", "FP32", "FP16", "X"]))
    count = max(0, math.prod(shape))
    contents = draw(
        st.sampled_from(
            [
                {},
                {"bytes_contents": [draw(TEXTS) for _ in range(count)]},
                {"bool_contents": [True] * count},
                {"int_contents": [draw(st.integers(-5, 5))] * count},
                {"fp32_contents": [draw(st.floats(width=32))] * count},
            ]
        )
    )
    return tensor(name, datatype, shape, **contents)


@st.composite
def requests(draw):
    made = request(*draw(st.lists(tensors(), max_size=4)))
    made.raw_input_contents.extend(draw(st.lists(TEXTS | st.binary(max_size=9), max_size=2)))
    for key in draw(st.sets(st.sampled_from(["max_tokens", "priority", "x"]))):
        parameter = made.parameters[key]
        if draw(st.booleans()):
            parameter.string_param = draw(st.sampled_from(["5", "x", "true", "1e999", "-"]))
    made.outputs.extend(
        pb.ModelInferRequest.InferRequestedOutputTensor(name=name)
        for name in draw(st.sets(st.sampled_from(["text_output", "embedding", "y"])))
    )
    return made


@settings(max_examples=100, deadline=None)
@given(requests())
def test_no_request_is_a_bug(made):
    with contextlib.suppress(InvalidRequest, InvalidJSON):
        assert read_request(made, RequestLimits()).body.startswith(b"{")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b'{"choices":1}', b'{"choices":[{"text":5}]}', b'{"data":[{}]}',
        b'{"data":[{"embedding":"%%%"}]}', b'{"data":[{"embedding":"AAA="}]}',
        b'{"data":[{"embedding":[1]},{"embedding":[1,2]}]}', b"\xff",
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_the_backend_s_fault(data):
    wanted = Wanted(path="/v1/completions", body=b"", stream=False, outputs=("text_output",))
    with pytest.raises(SLLMError) as raised:
        write_answer(data, wanted, pb.ModelInferResponse())
    assert raised.value.code == "backend_protocol_error"

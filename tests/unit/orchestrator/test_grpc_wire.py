"""Messages of many parts are refused before a parser sees them, and all others are not."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.orchestrator.grpc.proto import open_inference_pb2 as pb
from serverlessllm.orchestrator.grpc.wire import Malformed, check_parts

Tensor = pb.ModelInferRequest.InferInputTensor
LONG = "x" * 20_000
"""An id that makes any message long enough to be looked at."""


def tensor(**contents):
    return Tensor(name="a", contents=pb.InferTensorContents(**contents))


def parameters(count):
    made = pb.ModelInferRequest()
    for number in range(count):
        made.parameters[str(number)].bool_param = True
    return made


@pytest.mark.parametrize(
    "message",
    [
        parameters(5_000),
        pb.ModelInferRequest(inputs=[Tensor()] * 9_000, id=LONG),
        pb.ModelInferRequest(inputs=[tensor(bytes_contents=[b""] * 9_000)]),
        pb.ModelInferRequest(inputs=[tensor(bool_contents=[True] * 90_000)]),
        pb.ModelInferRequest(inputs=[tensor(fp64_contents=[1.0] * 9_000)]),
        pb.ModelInferRequest(inputs=[Tensor(shape=[1] * 90_000)]),
        pb.ModelInferRequest(raw_input_contents=[b""] * 9_000),
        b"\xf8\x7f\x01" * 9_000,  # a field that nobody knows
        b"\xfd\x7f0000" * 9_000,
        b"\xf9\x7f00000000" * 9_000,
    ],
    ids=[
        "parameters", "inputs", "texts", "truth values", "numbers", "dimensions", "raw", "unknown",
        "unknown of 4 bytes", "unknown of 8",
    ],
)  # fmt: skip
def test_many_parts_are_refused(message):
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with pytest.raises(InvalidRequest, match="more than 8192 parts"):
        check_parts(pb.ModelInferRequest, data)


@pytest.mark.parametrize(
    "message",
    [
        pb.ModelInferRequest(inputs=[tensor(bytes_contents=[b"x" * 5_000_000])]),
        pb.ModelInferRequest(raw_input_contents=[b"x" * 5_000_000]),
        pb.ModelInferRequest(inputs=[tensor(bytes_contents=[b"text"] * 4096, fp32_contents=[0.5])]),
        pb.ModelInferRequest(inputs=[tensor(fp64_contents=[1.0] * 4096, int64_contents=[-1])]),
        parameters(2_000),
    ],
    ids=["a long text", "long bytes", "texts", "numbers", "parameters"],
)
def test_what_clients_send_passes(message):
    check_parts(pb.ModelInferRequest, message.SerializeToString())


NUMBERS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def messages(draw):
    made = pb.ModelInferRequest(id=LONG, model_name=draw(st.text(max_size=9)))
    for _ in range(draw(st.integers(0, 3))):
        one = made.inputs.add(name=draw(st.text(max_size=3)), shape=draw(st.lists(NUMBERS)))
        one.contents.int64_contents.extend(draw(st.lists(NUMBERS)))
        one.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32))))
        one.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=9))))
        one.parameters[draw(st.text(max_size=3))].double_param = draw(st.floats())
    made.parameters[draw(st.text(max_size=3))].int64_param = draw(NUMBERS)
    made.raw_input_contents.extend(draw(st.lists(st.binary(max_size=200), max_size=3)))
    return made.SerializeToString()


def is_malformed(data):
    try:
        check_parts(pb.ModelInferRequest, data)
    except Malformed:
        return True
    except InvalidRequest:  # the long text has become parts
        return False
    return False


@given(messages(), st.data())
def test_no_good_message_is_malformed_and_no_bad_one_a_bug(data, choice):
    check_parts(pb.ModelInferRequest, data)
    at = choice.draw(st.integers(0, len(data) - 1))
    for broken in (data[:at], data[:at] + choice.draw(st.binary(max_size=3)) + data[at + 1 :]):
        groups = {3, 4} & {byte & 7 for byte in broken}
        if is_malformed(broken) and not groups:
            with pytest.raises(DecodeError):
                pb.ModelInferRequest.FromString(broken)


@pytest.mark.parametrize("end", [b"\x0a", b"\x0a\xff", b"\x0a\x05abc", b"\x09abc", b"\xff" * 11])
def test_a_message_that_ends_inside_a_field_is_malformed(end):
    data = pb.ModelInferRequest(id=LONG).SerializeToString()
    with pytest.raises(Malformed):
        check_parts(pb.ModelInferRequest, data + end)

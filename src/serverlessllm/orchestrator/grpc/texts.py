"""What the tensors of a request mean for a language model, and its answer as tensors.

The conventions are those of Triton's backends for language models (`text_input`, `stream`,
`sampling_parameters`, `exclude_input_in_output` → `text_output`), with the whole OpenAI API beside
them (`messages`, `openai_request` → `openai_response`) and embeddings (`input` → `embedding`).
"""

from __future__ import annotations

import base64
import binascii
from typing import TypeVar

import msgspec

from serverlessllm.core.errors import BackendProtocolError, InvalidJSON, InvalidRequest
from serverlessllm.openai.nesting import check_nesting
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.grpc.proto.open_inference_pb2 import (
    InferParameter,
    ModelInferRequest,
    ModelInferResponse,
)
from serverlessllm.orchestrator.grpc.tensors import (
    Tensor,
    add_floats,
    add_strings,
    floats,
    read_inputs,
)

TEXT, FINISH, RESPONSE, EMBEDDING = "text_output", "finish_reason", "openai_response", "embedding"
OUTPUTS = (TEXT, FINISH, RESPONSE, EMBEDDING)

_CHAT = "/v1/chat/completions"
_TEXT = "/v1/completions"
_EMBED = "/v1/embeddings"
_RESERVED = ("sequence_", "triton_", "priority", "timeout", "binary_data_output", "headers")
"""Parameters of the protocol itself: not the model's."""

Body = dict[str, msgspec.Raw]
T = TypeVar("T")

_ESCAPED = bytes(range(0x20)) + b'"\\'
_objects = msgspec.json.Decoder(Body)
_encoder = msgspec.json.Encoder()


class _Object(msgspec.Struct, frozen=True):
    """Any: what is in it is not made."""


_messages = msgspec.json.Decoder(list[_Object])


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A request of the HTTP API, and how its answer is told."""

    path: str
    body: bytes
    stream: bool
    outputs: tuple[str, ...]
    before: bytes = b""
    """Put before the text: the prompt, where it is asked for."""


_NUMBER_INPUTS = {
    name: name
    for name in (
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty",
        "presence_penalty", "repetition_penalty",
    )
} | {"random_seed": "seed"}  # fmt: skip
_TEXT_INPUTS = {"stop": "stop", "stop_words": "stop"}
"""Inputs that are a field of the body each, as TensorRT-LLM has them."""
_NUMBERS = {*_NUMBER_INPUTS.values()} | {
    "n", "best_of", "logprobs", "min_tokens", "ignore_eos", "max_completion_tokens",
}  # fmt: skip
"""Parameters that clients of the vLLM backend send as text."""
_PROMPTS = ("text_input", "PROMPT", "prompt")
_SWITCHES = ("stream", "exclude_input_in_output", "return_finish_reason")
INPUTS = (
    ("text_input", "BYTES"),
    ("messages", "BYTES"),
    ("openai_request", "BYTES"),
    ("input", "BYTES"),
    ("stream", "BOOL"),
    ("sampling_parameters", "BYTES"),
    ("exclude_input_in_output", "BOOL"),
    ("return_finish_reason", "BOOL"),
)
"""Those that are told of a model; all are optional, but one of the first four."""


def read_request(request: ModelInferRequest, limits: RequestLimits) -> Wanted:
    """What a request asks for.

    Raises:
        InvalidRequest, InvalidJSON: it asks for nothing that there is; says what is wrong.
    """
    inputs = read_inputs(request)
    asked = [name for name in (*_PROMPTS, "messages", "openai_request", "input") if name in inputs]
    if len(asked) != 1:
        raise InvalidRequest(
            "inputs: exactly one of text_input, messages, openai_request and input", param="inputs"
        )
    switches = {name: _switch(inputs.pop(name)) for name in _SWITCHES if name in inputs}
    body = _parameters(request, inputs.pop("sampling_parameters", None), limits)
    source = inputs.pop(asked[0])
    for name, tensor in inputs.items():
        field, value = _field(name, tensor, limits)
        body[field] = value
    path, before = _source(source, body, limits)
    stream = switches.get("stream", False)
    if "stream" in switches or source.name != "openai_request":
        body["stream"] = msgspec.Raw(b"true" if stream else b"false")
    stream = bytes(body.get("stream", b"")) == b"true"
    if path == _EMBED:
        body.setdefault("encoding_format", msgspec.Raw(b'"base64"'))
        body.pop("stream", None)
        stream = False
    body["model"] = msgspec.Raw(_encoder.encode(request.model_name))
    prepend = not switches.get("exclude_input_in_output", True)
    if prepend and stream:
        raise InvalidRequest("exclude_input_in_output: a stream has no place for the prompt")
    return Wanted(
        path=path,
        body=_encoder.encode(body),
        stream=stream,
        outputs=_outputs(request, path, source, switches),
        before=before if prepend else b"",
    )


def _source(source: Tensor, body: Body, limits: RequestLimits) -> tuple[str, bytes]:
    """Which route answers, with its field in `body`; and the prompt as text."""
    if source.name == "input":
        body["input"] = _texts(_bytes(source), limits)
        return _EMBED, b""
    text = _one(source)
    if source.name == "messages":
        _decode(_messages, text, source.name, limits)
        body["messages"] = msgspec.Raw(text)
        return _CHAT, b""
    if source.name == "openai_request":
        whole: Body = _decode(_objects, text, source.name, limits)
        body.update(whole)
        return (_CHAT if "messages" in body else _EMBED if "input" in body else _TEXT), b""
    body["prompt"] = msgspec.Raw(_encoder.encode(_utf8(text, limits)))
    return _TEXT, text


def _outputs(
    request: ModelInferRequest, path: str, source: Tensor, switches: dict[str, bool]
) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(output.name for output in request.outputs))
    known = (EMBEDDING, RESPONSE) if path == _EMBED else (TEXT, FINISH, RESPONSE)
    for name in asked:
        if name not in known:
            raise InvalidRequest(
                f"outputs: {name[:100]!r} is not one of {', '.join(known)}", param="outputs"
            )
    outputs = asked or known[:1]
    if not asked and source.name == "openai_request":
        outputs += (RESPONSE,)
    if switches.get("return_finish_reason") and FINISH in known and FINISH not in outputs:
        outputs += (FINISH,)
    return outputs


def _parameters(request: ModelInferRequest, given: Tensor | None, limits: RequestLimits) -> Body:
    """Fields of the body: the request's parameters, and the tensor that may bring them."""
    fields: Body = {}
    for key, parameter in request.parameters.items():
        if not key.startswith(_RESERVED):
            fields[key] = msgspec.Raw(_encoder.encode(_choice(key, parameter)))
    if given is not None:
        brought: Body = _decode(_objects, _one(given), given.name, limits)
        fields.update(brought)
    for key in _NUMBERS & fields.keys():
        fields[key] = _unquoted(fields[key])
    return fields


def _choice(key: str, parameter: InferParameter) -> object:
    chosen = parameter.WhichOneof("parameter_choice")
    if chosen is None:
        raise InvalidRequest(f"the parameter {key[:100]!r} has no value", param="parameters")
    return getattr(parameter, chosen)


def _unquoted(value: msgspec.Raw) -> msgspec.Raw:
    """A number or truth value that was written as text; anything else as it is."""
    data = bytes(value)
    if data[:1] != b'"':
        return value
    try:
        text = msgspec.json.decode(data, type=str).strip().lower()
        msgspec.json.decode(text, type=float | bool)
    except (msgspec.DecodeError, UnicodeError):
        return value
    return msgspec.Raw(text.encode())


def _field(name: str, tensor: Tensor, limits: RequestLimits) -> tuple[str, msgspec.Raw]:
    if name in _TEXT_INPUTS:
        return _TEXT_INPUTS[name], _texts(_bytes(tensor), limits)
    if name not in _NUMBER_INPUTS:
        raise InvalidRequest(f"inputs: there is no input {name[:100]!r}", param="inputs")
    value = _single(tensor)
    if isinstance(value, bytes):
        raise InvalidRequest(f"the input {name!r} is a number, not BYTES", param="inputs")
    return _NUMBER_INPUTS[name], msgspec.Raw(_encoder.encode(value))


def _switch(tensor: Tensor) -> bool:
    value = _single(tensor)
    if not isinstance(value, bool):
        raise InvalidRequest(f"the input {tensor.name!r} is a BOOL", param="inputs")
    return value


def _single(tensor: Tensor) -> object:
    if len(tensor.values) != 1:
        raise InvalidRequest(
            f"the input {tensor.name!r} has one element, not {len(tensor.values)}", param="inputs"
        )
    return tensor.values[0]


def _one(tensor: Tensor) -> bytes:
    value = _single(tensor)
    if not isinstance(value, bytes):
        raise InvalidRequest(f"the input {tensor.name!r} is BYTES", param="inputs")
    return value


def _bytes(tensor: Tensor) -> tuple[object, ...]:
    if tensor.datatype != "BYTES":
        raise InvalidRequest(f"the input {tensor.name!r} is BYTES", param="inputs")
    return tensor.values


def _texts(values: tuple[object, ...], limits: RequestLimits) -> msgspec.Raw:
    texts = [_utf8(value, limits) for value in values if isinstance(value, bytes)]
    return msgspec.Raw(_encoder.encode(texts))


def _utf8(text: bytes, limits: RequestLimits) -> str:
    """A text whose JSON the front door would take: to write escapes takes the longest of all."""
    if len(text) > limits.backslashes_max:
        escapes = len(text) - len(text.translate(None, _ESCAPED))
        if escapes > limits.backslashes_max:
            raise InvalidRequest(
                f"a text has more than {limits.backslashes_max} line breaks, quotes and the like",
                param="inputs",
            )
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("a text is not UTF-8", param="inputs") from error


def _decode(decoder: msgspec.json.Decoder[T], text: bytes, name: str, limits: RequestLimits) -> T:
    check_nesting(text, limits)
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJSON(f"the input {name!r} is not the JSON that it should be") from error


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None

    @property
    def words(self) -> bytes:
        said = self.message or self.delta
        text = self.text if said is None else said.content
        return (text or "").encode()


class _Row(msgspec.Struct, frozen=True):
    embedding: str | list[float]


class _Answer(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    data: tuple[_Row, ...] = ()


_answers = msgspec.json.Decoder(_Answer)


class Says(msgspec.Struct, frozen=True):
    """What is in an answer, or in a chunk of it."""

    anything: bool
    the_end: bool


def write_answer(data: bytes, wanted: Wanted, response: ModelInferResponse) -> Says:
    """Add the outputs of an answer, or of one chunk, to `response`.

    Raises:
        BackendProtocolError: the answer is not of the OpenAI API.
    """
    try:
        answer = _answers.decode(data)
        rows = [_row(row.embedding) for row in answer.data]
    except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, OverflowError) as error:
        raise BackendProtocolError("the model's backend gave an answer of another API") from error
    if len({len(row) for row in rows}) > 1 or any(len(row) % 4 for row in rows):
        raise BackendProtocolError("the model's backend gave embeddings of odd lengths")
    texts = [choice.words for choice in answer.choices]
    reasons = [(choice.finish_reason or "").encode() for choice in answer.choices]
    for name in wanted.outputs:
        if name == TEXT:
            add_strings(response, name, [wanted.before + text for text in texts])
        elif name == FINISH:
            add_strings(response, name, reasons)
        elif name == RESPONSE:
            add_strings(response, name, [data])
        else:
            add_floats(response, name, rows)
    ends = any(reasons)
    return Says(RESPONSE in wanted.outputs or any(texts) or ends, ends)


def write_nothing(wanted: Wanted, response: ModelInferResponse) -> None:
    """The outputs of a response that only ends a stream."""
    for name in wanted.outputs:
        add_strings(response, name, [b""])


def _row(embedding: str | list[float]) -> bytes:
    if isinstance(embedding, str):
        return base64.b64decode(embedding, validate=True)
    return floats(embedding)

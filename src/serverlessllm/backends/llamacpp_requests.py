"""Requests that are right by the API and that llama.cpp's server fails on, as it takes them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
from msgspec import Raw

from serverlessllm.backends.dialect import Ask, Composed, Engine
from serverlessllm.core.errors import InvalidRequest

_NULL = b"null"
_SUSPECT = (
    _NULL,
    b'"tool_calls"',
    b'"refusal"',
    b'"top_logprobs"',
    b'"modalities"',
    b'"web_search_options"',
)
"""A chat without any of these passes as it is."""
_Fields = dict[str, Raw]
_fields = msgspec.json.Decoder(_Fields)
_objects = msgspec.json.Decoder(list[_Fields])
_text = msgspec.json.Decoder(str)
_object = msgspec.json.Decoder(dict[str, Raw])
_encoder = msgspec.json.Encoder()


class _TextPart(msgspec.Struct, frozen=True):
    text: str = ""


_content = msgspec.json.Decoder(str | list[_TextPart])


def without_nulls(body: bytes) -> bytes:
    """An optional field may be null; the server wants it left out."""
    return _encoder.encode(_said(_fields.decode(body))) if _NULL in body else body


def takeable(body: bytes) -> bytes:
    """A checked chat in the server's form: nothing null, each call's arguments an object, refusals
    as text.

    Raises:
        InvalidRequest: it asks for what no engine here does; `param` names it.
    """
    if not any(field in body for field in _SUSPECT):
        return body
    fields = _said(_fields.decode(body))
    if b'"audio"' in bytes(fields.get("modalities", _NULL)):
        raise InvalidRequest("modalities: this model answers with text", param="modalities")
    if "web_search_options" in fields:
        param = "web_search_options"
        raise InvalidRequest(f"{param}: this model searches nothing", param=param)
    if bytes(fields.get("logprobs", _NULL)) != b"true":
        fields.pop("top_logprobs", None)
    messages = [_message(message) for message in _objects.decode(fields["messages"])]
    fields["messages"] = _raw(messages)
    if "tools" in fields:
        fields["tools"] = _raw(
            [_inner(tool, "function") for tool in _objects.decode(fields["tools"])]
        )
    return _encoder.encode(fields)


class Continued:
    """A chat whose last message is the beginning of the answer, which the server repeats where the
    answer is not streamed: the API's other engines tell only what is new."""

    def __init__(self, chat: Ask | Composed, body: bytes) -> None:
        self._chat = chat
        content = _objects.decode(_fields.decode(body)["messages"])[-1]["content"]
        said = _content.decode(content)
        self._begun = said if isinstance(said, str) else "".join(part.text for part in said)

    async def __call__(self, engine: Engine) -> AsyncIterator[bytes]:
        """`backends.dialect.Composed`."""
        chat = self._chat
        if isinstance(chat, Ask):
            whole = await engine.ask(chat.path, chat.body)
        else:
            whole = b"".join([piece async for piece in chat(engine)])
        answer = msgspec.json.decode(whole)
        for choice in answer["choices"]:
            message = choice["message"]
            message["content"] = (message["content"] or "").removeprefix(self._begun)
        yield _encoder.encode(answer)


def _message(message: _Fields) -> _Fields:
    said = _said(message)
    refusal = said.pop("refusal", None)
    if bytes(said.get("content", _NULL)).startswith(b"["):
        said["content"] = _raw([_part(part) for part in _objects.decode(said["content"])])
    if "tool_calls" in said:
        said["tool_calls"] = _raw([_call(call) for call in _objects.decode(said["tool_calls"])])
    if "content" not in said:
        said["content"] = Raw(_NULL) if refusal is None else refusal
    return said


def _part(part: _Fields) -> _Fields:
    return {"type": _raw("text"), "text": part["refusal"]} if "refusal" in part else part


def _call(call: _Fields) -> _Fields:
    said = _inner(call, "function")
    if "function" in said:
        function = _fields.decode(said["function"])
        function["arguments"] = _raw(_arguments(_text.decode(function["arguments"])))
        said["function"] = _raw(function)
    return said


def _arguments(text: str) -> str:
    """Templates write an object's members. What a model wrote instead, cut off or misspelled, stays
    readable as the only one."""
    try:
        _object.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return _encoder.encode({"arguments": text}).decode() if text.strip() else "{}"
    return text


def _inner(fields: _Fields, name: str) -> _Fields:
    """Without nulls in the object, nor in the one that it holds by this name."""
    said = _said(fields)
    return said | {name: _raw(_said(_fields.decode(said[name])))} if name in said else said


def _said(fields: _Fields) -> _Fields:
    return {name: value for name, value in fields.items() if bytes(value) != _NULL}


def _raw(value: object) -> Raw:
    return Raw(_encoder.encode(value))

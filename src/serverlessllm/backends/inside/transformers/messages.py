"""A chat's messages as a template takes them: text, calls, and what calls returned."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec

from serverlessllm.backends.inside.transformers.text import Called, CalledFunction, Message
from serverlessllm.core.errors import InvalidRequest

_ROLES = ("system", "developer", "user", "assistant", "tool")


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str = "{}"


class _Call(msgspec.Struct, frozen=True):
    function: _Function
    id: str | None = None
    type: str = "function"


class RawMessage(msgspec.Struct, frozen=True):
    """As a client sends it."""

    role: str
    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: msgspec.Raw = msgspec.Raw(b"null")


def templated(messages: Sequence[RawMessage]) -> list[Message]:
    """The messages, each one text.

    Raises:
        InvalidRequest: one has something other than text and calls.
    """
    return [_message(place, message) for place, message in enumerate(messages)]


def _message(place: int, message: RawMessage) -> Message:
    where = f"messages[{place}]"
    if message.role not in _ROLES:
        param, known = f"{where}.role", ", ".join(_ROLES)
        raise InvalidRequest(f"{param}: one of {known}, not {message.role!r}", param=param)
    if bytes(message.function_call) != b"null":
        param = f"{where}.function_call"
        raise InvalidRequest(f"{param}: use tool_calls instead", param=param)
    # The newer name of the same role, which hardly a chat template knows.
    role = "system" if message.role == "developer" else message.role
    return Message(
        role=role,
        content=_content(where, message.content) or message.refusal or "",
        tool_calls=[_called(call) for call in message.tool_calls or ()],
        tool_call_id=message.tool_call_id,
        name=message.name if role == "tool" else None,
    )


def _content(where: str, content: str | list[_Part] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for number, part in enumerate(content):
        if part.text is None and part.refusal is None:
            param = f"{where}.content[{number}]"
            raise InvalidRequest(f"{param}: this model reads text only", param=param)
    return "".join(part.text or part.refusal or "" for part in content)


def _called(call: _Call) -> Called:
    """Templates write the arguments themselves, from what they mean."""
    arguments: object = call.function.arguments
    with contextlib.suppress(msgspec.DecodeError):
        arguments = msgspec.json.decode(call.function.arguments)
    return Called(function=CalledFunction(call.function.name, arguments), id=call.id)

"""What tests of the dialects share: pieces of a chat's answer, and the events they become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from pydantic import TypeAdapter

from serverlessllm.openai.chats import Choice, Delta, FunctionPiece, ToolCallPiece
from serverlessllm.openai.sse import typed_events


def call(
    index: int,
    *,
    name: str | None = None,
    arguments: str | None = None,
    call_id: str | None = None,
) -> Choice:
    """A piece of a tool call."""
    piece = ToolCallPiece(index=index, id=call_id, function=FunctionPiece(name, arguments))
    return Choice(delta=Delta(tool_calls=(piece,)))


def told(events: Iterable[msgspec.Struct], kind: TypeAdapter[Any]) -> list[Any]:
    """Each event as it is on the wire, seen by the types of a dialect's own client."""
    found = []
    for frame in typed_events(events).decode().split("\n\n")[:-1]:
        name, data = frame.split("\n")
        event = kind.validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {event.type}"
        found.append(event)
    return found

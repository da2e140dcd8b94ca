"""The message: whole, and as it begins."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Raw, Struct

from serverlessllm.core.errors import BackendProtocolError
from serverlessllm.openai.chats import ChatUsage, Choice

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


class TextBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""
    """Nobody checks here that a thought was this model's."""


class ToolUseBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Raw]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class Usage(Struct, frozen=True, kw_only=True):
    """`input_tokens` are those that were computed; those that were cached come beside them."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int


class Message(Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: tuple[Block, ...] = ()
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: Usage


class Stop(Struct, frozen=True, kw_only=True):
    """Why a message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


_NO_USAGE = Usage(input_tokens=0, output_tokens=0)
_arguments = msgspec.json.Decoder(dict[str, Raw])


def begun(message_id: str, model: str) -> Message:
    """The message before the model has said anything; what it cost is told at its end."""
    return Message(id=message_id, model=model, usage=_NO_USAGE)


def whole(begun: Message, choice: Choice, usage: ChatUsage | None, thinks: bool) -> Message:
    """The message that a whole chat answer is.

    Raises:
        BackendProtocolError: a call's arguments are no JSON object.
    """
    stop = stop_of(choice, calls=bool(choice.said.tool_calls))
    return msgspec.structs.replace(
        begun,
        content=tuple(_blocks(begun, choice, thinks)),
        stop_reason=stop.stop_reason,
        stop_sequence=stop.stop_sequence,
        usage=usage_of(usage),
    )


def stop_of(choice: Choice, *, calls: bool) -> Stop:
    """Why it ended, by the chat's reason to finish and what the engine says beside it. A message
    that `calls` a tool ends there, also where a chat calls that a plain stop (a named tool)."""
    reason = choice.finish_reason
    if reason == "length":
        return Stop(stop_reason="max_tokens", stop_sequence=None)
    if reason == "content_filter":
        return Stop(stop_reason="refusal", stop_sequence=None)
    if calls:
        return Stop(stop_reason="tool_use", stop_sequence=None)
    sequence = choice.stopped_by
    return Stop(
        stop_reason="end_turn" if sequence is None else "stop_sequence", stop_sequence=sequence
    )


def usage_of(usage: ChatUsage | None) -> Usage:
    """Tokens as this API counts them."""
    if usage is None:
        return _NO_USAGE
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    return Usage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
    )


def _blocks(begun: Message, choice: Choice, thinks: bool) -> list[Block]:
    said = choice.said
    found: list[Block] = []
    if said.reasoning_content and thinks:
        found.append(ThinkingBlock(thinking=said.reasoning_content))
    text = (said.content or "") + (said.refusal or "")
    if text or not said.tool_calls:
        found.append(TextBlock(text=text))
    for number, call in enumerate(said.tool_calls or ()):
        function = call.function
        if function is None or not function.name:
            raise BackendProtocolError("the model's backend called a tool without a name")
        found.append(
            ToolUseBlock(
                id=call.id or f"toolu_{begun.id.removeprefix('msg_')}{number}",
                name=function.name,
                input=_input(function.arguments or "", cut=choice.finish_reason == "length"),
            )
        )
    return found


def _input(arguments: str, *, cut: bool) -> dict[str, Raw]:
    """A call's arguments; one that was cut off in its middle has none."""
    try:
        return _arguments.decode(arguments or "{}")
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        if cut:
            return {}
        raise BackendProtocolError("the model called a tool with what is no JSON object") from error

"""Requests of `/v1/responses` and `/v1/messages` as they are written: those who read them take
their pieces apart one by one, and have no struct of the whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from serverlessllm.openai.request.fields import (
    AtLeastOne,
    Count,
    Identifier,
    KeepAlive,
    ModelName,
    Share,
    Stop,
    Temperature,
)
from serverlessllm.openai.request.patterns import NAME
from serverlessllm.openai.request.tools import Name

_Json: TypeAlias = dict[str, Any]


def _object(**properties: _Json) -> _Json:
    """All of them required."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _piece(kind: str, **properties: _Json) -> _Json:
    return _object(type={"const": kind}, **properties)


def _texts_or(*pieces: _Json) -> _Json:
    return {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": list(pieces)}}]}


_TEXT: _Json = {"type": "string"}
_NAME: _Json = {"type": "string", "pattern": NAME}
_NOTHING: _Json = {"type": "null"}
_SCHEMA: _Json = {"type": "object"}
_DATA_URL: _Json = {"type": "string", "pattern": "^data:"}

_INPUT_PARTS = (
    _piece("input_text", text=_TEXT),
    _piece("input_image", image_url=_DATA_URL),
    _piece("input_audio", input_audio=_object(data=_TEXT, format={"enum": ["wav", "mp3"]})),
)
_INPUT: _Json = _texts_or(
    _object(role={"enum": ["user", "system", "developer"]}, content=_texts_or(*_INPUT_PARTS)),
    _object(
        role={"const": "assistant"},
        content=_texts_or(_piece("output_text", text=_TEXT), _piece("refusal", refusal=_TEXT)),
    ),
    _piece("function_call", call_id=_TEXT, name=_TEXT, arguments=_TEXT),
    _piece("function_call_output", call_id=_TEXT, output=_texts_or(*_INPUT_PARTS)),
    _piece("item_reference", id=_TEXT),
)
_INPUT["anyOf"][1]["minItems"] = 1
_TOOL: _Json = _piece("function", name=_NAME)
_TOOL["properties"] |= {
    "description": {"type": ["string", "null"]},
    "parameters": {"type": ["object", "null"]},
    "strict": {"type": ["boolean", "null"]},
}
_MODES: _Json = {"enum": ["none", "auto", "required"]}

_SYSTEM: _Json = {"anyOf": [*_texts_or(_piece("text", text=_TEXT))["anyOf"], _NOTHING]}
_IMAGE: _Json = _piece("image", source=_object(type={"const": "base64"}))
_IMAGE["properties"]["source"]["properties"] |= {"media_type": _TEXT, "data": _TEXT}
_RESULT: _Json = _piece("tool_result", tool_use_id=_TEXT)
_RESULT["properties"]["content"] = {
    "anyOf": [*_texts_or(_piece("text", text=_TEXT), _IMAGE)["anyOf"], _NOTHING]
}
_USER_BLOCKS: _Json = _texts_or(_piece("text", text=_TEXT), _IMAGE, _RESULT)
_ASSISTANT_BLOCKS: _Json = _texts_or(
    _piece("text", text=_TEXT), _piece("tool_use", id=_TEXT, name=_TEXT, input=_SCHEMA)
)
_TURN: _Json = {
    "anyOf": [
        _object(role={"const": "user"}, content=_USER_BLOCKS),
        _object(role={"const": "assistant"}, content=_ASSISTANT_BLOCKS),
        _object(role={"const": "system"}, content=_texts_or(_piece("text", text=_TEXT))),
    ]
}


class ResponseText(msgspec.Struct, frozen=True, kw_only=True):
    """How the text shall be."""

    format: Annotated[
        Raw,
        Meta(
            extra_json_schema={
                "anyOf": [
                    _piece("text"),
                    _piece("json_object"),
                    _piece("json_schema", name=_NAME, schema=_SCHEMA),
                    _NOTHING,
                ]
            }
        ),
    ] = msgspec.field(default_factory=Raw)
    """Any text, any JSON object, or JSON that follows a schema."""
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseReasoning(msgspec.Struct, frozen=True, kw_only=True):
    """How a reasoning model shall think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the model shall answer to."""

    model: ModelName
    input: Annotated[Raw, Meta(extra_json_schema=_INPUT)]
    """A text, or items: messages, calls of functions and what those answered."""
    instructions: str | None = None
    """What the model shall do, whatever the input says."""
    previous_response_id: Identifier | None = None
    """A response kept here, which this one continues."""
    store: bool | None = None
    """Keep the response, for a while; null: yes."""
    stream: bool | None = None
    """Answer with typed server-sent events."""
    max_output_tokens: AtLeastOne | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Annotated[Raw, Meta(extra_json_schema=_TOOL)]] | None = None
    """Functions that the model may call."""
    tool_choice: Annotated[
        Raw, Meta(extra_json_schema={"anyOf": [_MODES, _piece("function", name=_TEXT), _NOTHING]})
    ] = msgspec.field(default_factory=Raw)
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    truncation: Literal["disabled"] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    include: list[str] | None = None
    user: Identifier | None = None
    keep_alive: KeepAlive | None = None
    """How long the model stays ready after this request."""


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """How long a prompt is."""

    input_tokens: int


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response that is no longer kept."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(msgspec.Struct, frozen=True, kw_only=True):
    """What a response was asked."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class MessageTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the client runs."""

    name: Name
    input_schema: dict[str, Raw]
    """JSON Schema of its input."""
    description: str | None = None


class MessageChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a tool may be called, must, or which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Of the `tool`."""
    disable_parallel_tool_use: bool | None = None


class PromptToCount(msgspec.Struct, frozen=True, kw_only=True):
    """What a model would be told."""

    model: ModelName
    messages: Annotated[list[Annotated[Raw, Meta(extra_json_schema=_TURN)]], Meta(min_length=1)]
    """The conversation so far."""
    system: Annotated[Raw, Meta(extra_json_schema=_SYSTEM)] = msgspec.field(default_factory=Raw)
    """What the model shall do, whatever the messages say."""
    tools: list[MessageTool] | None = None
    tool_choice: MessageChoice | None = None


class MessageRequest(PromptToCount, frozen=True, kw_only=True):
    """A conversation that the model shall continue."""

    max_tokens: AtLeastOne
    """The most tokens that the answer may have."""
    stop_sequences: list[Stop] | None = None
    stream: bool | None = None
    """Answer with typed server-sent events."""
    temperature: Share | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    keep_alive: KeepAlive | None = None
    """How long the model stays ready after this request."""


class MessageErrorFields(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong."""

    type: str
    message: str


class MessageError(msgspec.Struct, frozen=True, kw_only=True):
    """Every answer of this API that is an error."""

    type: Literal["error"]
    error: MessageErrorFields
    request_id: str

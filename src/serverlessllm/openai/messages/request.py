"""`POST /v1/messages`: what a client may ask for."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.chats import OWN_FIELDS
from serverlessllm.openai.messages.blocks import Turn, read_system, read_turn
from serverlessllm.openai.reading import (
    NOTHING,
    is_given,
    kind_of,
    read_piece,
    read_pieces,
    unsupported,
)
from serverlessllm.openai.request import read_request
from serverlessllm.openai.settings import RequestLimits

_ONLY_CUSTOM = "this server has no tools of its own, only those that the client runs"


class _Metadata(Struct, frozen=True):
    user_id: str | None = None


class _Thinking(Struct, frozen=True):
    type: str


class _Output(Struct, frozen=True):
    format: Raw = NOTHING
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class _Turn(Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: Raw


class _Count(Struct, frozen=True, kw_only=True):
    """The wire: what a prompt is made of."""

    model: str
    messages: list[_Turn]
    system: Raw = NOTHING
    tools: Raw = NOTHING
    tool_choice: Raw = NOTHING
    thinking: _Thinking | None = None
    output_config: _Output | None = None


class _Create(_Count, frozen=True, kw_only=True):
    """The wire; fields that are not here pass through to the chat."""

    max_tokens: Annotated[int, Meta(ge=1)]
    metadata: _Metadata | None = None
    stop_sequences: list[Annotated[str, Meta(min_length=1)]] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    service_tier: str | None = None
    container: Raw = NOTHING
    mcp_servers: Raw = NOTHING


class Tool(Struct, frozen=True, kw_only=True):
    """A tool that the client runs."""

    name: str
    input_schema: dict[str, Raw]
    description: str | None = None
    strict: bool | None = None


class Choice(Struct, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Prompt(Struct, frozen=True, kw_only=True):
    """What a model is told."""

    model: str
    system: str
    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...]
    choice: Choice | None
    schema: dict[str, Raw] | None
    """That the answer must follow."""
    effort: str | None
    thinks: bool
    """Whether the client wants to see what the model thinks."""


class Create(Struct, frozen=True, kw_only=True):
    """A checked request."""

    prompt: Prompt
    max_tokens: int
    stop_sequences: tuple[str, ...]
    stream: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    user: str | None
    extras: dict[str, Raw]
    """Fields that are not of this API, such as `keep_alive` or `seed`."""


class _Format(Struct, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Raw]


_create = msgspec.json.Decoder(_Create)
_count = msgspec.json.Decoder(_Count)
_tool = msgspec.json.Decoder(Tool)
_choice = msgspec.json.Decoder(Choice)
_format = msgspec.json.Decoder(_Format)
_fields = msgspec.json.Decoder(dict[str, Raw])
_KNOWN = frozenset(_Create.__struct_fields__) | OWN_FIELDS | {"cache_control", "stop"}


def parse_create(body: bytes, limits: RequestLimits) -> Create:
    """`POST /v1/messages`.

    Raises:
        InvalidJSON: not UTF-8, not JSON, nested too deep, or not an object.
        InvalidRequest: a field is missing, of a wrong type, out of range or not supported;
            `param` names it.
    """
    asked = read_request(_create, body, limits)
    for field, value in (("container", asked.container), ("mcp_servers", asked.mcp_servers)):
        if is_given(value):
            raise InvalidRequest(f"{field}: {_ONLY_CUSTOM}", param=field)
    return Create(
        prompt=_prompt(asked, limits),
        max_tokens=asked.max_tokens,
        stop_sequences=tuple(asked.stop_sequences or ()),
        stream=bool(asked.stream),
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        user=None if asked.metadata is None else asked.metadata.user_id,
        extras={k: v for k, v in _fields.decode(body).items() if k not in _KNOWN},
    )


def parse_count(body: bytes, limits: RequestLimits) -> Prompt:
    """`POST /v1/messages/count_tokens`; raises as `parse_create`."""
    return _prompt(read_request(_count, body, limits), limits)


def _prompt(asked: _Count, limits: RequestLimits) -> Prompt:
    if not asked.messages:
        raise InvalidRequest("messages: at least one message is needed", param="messages")
    if len(asked.messages) > limits.messages_max:
        raise InvalidRequest(f"messages: at most {limits.messages_max}", param="messages")
    given = read_pieces(asked.tools, "tools")
    if len(given) > limits.tools_max:
        raise InvalidRequest(f"tools: at most {limits.tools_max}", param="tools")
    tools = tuple(_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(given))
    output = asked.output_config
    return Prompt(
        model=asked.model,
        system=read_system(asked.system, "system"),
        turns=tuple(
            read_turn(turn.role, turn.content, f"messages[{i}].content")
            for i, turn in enumerate(asked.messages)
        ),
        tools=tools,
        choice=_read_choice(asked.tool_choice, tools),
        schema=None if output is None else _read_schema(output.format),
        effort=None if output is None else output.effort,
        thinks=asked.thinking is not None and asked.thinking.type != "disabled",
    )


def _read_tool(piece: Raw, path: str) -> Tool:
    kind = kind_of(piece, path)
    if kind not in {None, "custom"}:
        raise unsupported(f"{path}.type", kind or "", _ONLY_CUSTOM)
    return read_piece(piece, _tool, path)


def _read_choice(piece: Raw, tools: tuple[Tool, ...]) -> Choice | None:
    if not is_given(piece):
        return None
    choice = read_piece(piece, _choice, "tool_choice")
    if choice.type == "any" and not tools:
        raise InvalidRequest("tool_choice: there are no tools", param="tool_choice")
    if choice.type == "tool" and choice.name not in {tool.name for tool in tools}:
        shown = (choice.name or "")[:100]
        param = "tool_choice.name"
        raise InvalidRequest(f"{param}: no tool is named {shown!r}", param=param)
    return choice


def _read_schema(piece: Raw) -> dict[str, Raw] | None:
    if not is_given(piece):
        return None
    return read_piece(piece, _format, "output_config.format").schema

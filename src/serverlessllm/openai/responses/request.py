"""`POST /v1/responses`: what a client may ask for."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.chats import OWN_FIELDS
from serverlessllm.openai.reading import NOTHING, is_given, read_pieces
from serverlessllm.openai.request import read_request
from serverlessllm.openai.responses.input import read_items
from serverlessllm.openai.responses.items import Item, ItemReference
from serverlessllm.openai.responses.tools import (
    FunctionTool,
    TextConfig,
    ToolChoice,
    check_choice,
    read_choice,
    read_format,
    read_tool,
)
from serverlessllm.openai.settings import RequestLimits

_METADATA_MAX = 16
LOGPROBS = "message.output_text.logprobs"
"""What `include` names to get log probabilities."""

_Name = Annotated[str, Meta(max_length=512)]
Metadata = dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]]


class ReasoningConfig(Struct, frozen=True, kw_only=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class _Text(Struct, frozen=True):
    format: Raw = NOTHING
    verbosity: Literal["low", "medium", "high"] | None = None


class _Create(Struct, frozen=True, kw_only=True):
    """The wire; fields that are not here pass through to the chat."""

    model: str
    input: Raw = NOTHING
    instructions: str | None = None
    previous_response_id: _Name | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Raw = NOTHING
    tool_choice: Raw = NOTHING
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    include: list[str] | None = None
    user: _Name | None = None
    safety_identifier: _Name | None = None
    prompt_cache_key: _Name | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    stream_options: Raw = NOTHING
    background: bool | None = None
    conversation: Raw = NOTHING
    prompt: Raw = NOTHING


class Create(Struct, frozen=True, kw_only=True):
    """A checked request."""

    model: str
    items: tuple[Item | ItemReference, ...]
    instructions: str | None
    previous_response_id: str | None
    store: bool
    stream: bool
    max_output_tokens: int | None
    max_tool_calls: int | None
    temperature: float | None
    top_p: float | None
    logprobs: bool
    top_logprobs: int
    tools: tuple[FunctionTool, ...]
    tool_choice: ToolChoice
    parallel_tool_calls: bool | None
    text: TextConfig
    reasoning: ReasoningConfig
    metadata: Metadata
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    extras: dict[str, Raw]
    """Fields that are not of this API, such as `keep_alive` or `seed`."""


_create = msgspec.json.Decoder(_Create)
_fields = msgspec.json.Decoder(dict[str, Raw])
_KNOWN = frozenset(_Create.__struct_fields__) | OWN_FIELDS
_REFUSED = {
    "background": "responses are made while their client waits: leave `background` out",
    "conversation": "conversations are not kept: continue by `previous_response_id`",
    "prompt": "prompts are not kept: send `instructions` and `input`",
}


def parse_create(body: bytes, limits: RequestLimits, uid: str) -> Create:
    """`uid` is the new response's: its items are named after it.

    Raises:
        InvalidJSON: not UTF-8, not JSON, nested too deep, or not an object.
        InvalidRequest: a field is missing, of a wrong type, out of range or not supported;
            `param` names it.
    """
    asked = read_request(_create, body, limits)
    _check(asked)
    items = read_items(asked.input, limits, uid)
    if not items and asked.previous_response_id is None:
        raise InvalidRequest("input: at least one item is needed", param="input")
    text = asked.text or _Text()
    given = read_pieces(asked.tools, "tools")
    if len(given) > limits.tools_max:
        raise InvalidRequest(f"tools: at most {limits.tools_max} tools", param="tools")
    tools = tuple(read_tool(tool, f"tools[{i}]") for i, tool in enumerate(given))
    choice = read_choice(asked.tool_choice)
    check_choice(choice, tools)
    return Create(
        model=asked.model,
        items=items,
        instructions=asked.instructions,
        previous_response_id=asked.previous_response_id,
        store=asked.store is not False,
        stream=bool(asked.stream),
        max_output_tokens=asked.max_output_tokens,
        max_tool_calls=asked.max_tool_calls,
        temperature=asked.temperature,
        top_p=asked.top_p,
        logprobs=bool(asked.top_logprobs) or LOGPROBS in (asked.include or ()),
        top_logprobs=asked.top_logprobs or 0,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        text=TextConfig(format=read_format(text.format), verbosity=text.verbosity),
        reasoning=asked.reasoning or ReasoningConfig(),
        metadata=asked.metadata or {},
        user=asked.user,
        safety_identifier=asked.safety_identifier,
        prompt_cache_key=asked.prompt_cache_key,
        extras=_extras(body),
    )


def _check(asked: _Create) -> None:
    asks = {
        "background": bool(asked.background),
        "conversation": is_given(asked.conversation),
        "prompt": is_given(asked.prompt),
    }
    for field, cure in _REFUSED.items():
        if asks[field]:
            raise InvalidRequest(f"{field}: {cure}", param=field)
    if len(asked.metadata or ()) > _METADATA_MAX:
        raise InvalidRequest(f"metadata: at most {_METADATA_MAX} pairs", param="metadata")
    if asked.truncation == "auto":
        raise InvalidRequest(
            "truncation: only 'disabled' is supported; what is too long is refused with "
            "context_length_exceeded",
            param="truncation",
        )


def _extras(body: bytes) -> dict[str, Raw]:
    return {name: value for name, value in _fields.decode(body).items() if name not in _KNOWN}

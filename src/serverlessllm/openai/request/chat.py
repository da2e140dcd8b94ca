"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request.errors import MissingParameter
from serverlessllm.openai.request.fields import (
    AtLeastOne,
    Count,
    Identifier,
    ParsedRequest,
    SampledFields,
    at_most,
    check_sampled,
    items_at_most,
    parsed,
)
from serverlessllm.openai.request.messages import (
    AssistantMessage,
    Message,
    Text,
    check_assistant,
)
from serverlessllm.openai.request.read import read_request
from serverlessllm.openai.request.tools import (
    FunctionDefinition,
    Named,
    ResponseFormat,
    SchemaAnswer,
    Tool,
    ToolChoice,
    check_functions,
    check_named,
    check_needs_tools,
    check_schema,
    check_tool_choice,
    check_tools,
)
from serverlessllm.openai.settings import RequestLimits

MetadataKey: TypeAlias = Annotated[str, Meta(max_length=64)]
MetadataValue: TypeAlias = Annotated[str, Meta(max_length=512)]


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Text that much of the answer is expected to repeat."""

    type: Literal["content"]
    content: str | Annotated[list[Text], Meta(min_length=1)]


class Voice(msgspec.Struct, frozen=True, kw_only=True):
    """A voice by its id."""

    id: str


class AudioAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How an audio answer shall sound."""

    voice: str | Voice
    format: Literal["wav", "aac", "mp3", "flac", "opus", "pcm16"]


class ChatRequest(SampledFields, frozen=True, kw_only=True):
    """A conversation that the model shall continue."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    """The conversation so far."""
    max_completion_tokens: AtLeastOne | None = None
    """The most tokens that one answer may have."""
    max_tokens: AtLeastOne | None = None
    """The same under its older name; `max_completion_tokens` counts if both are there."""
    logprobs: bool | None = None
    """Tell the log probability of each token of the answer."""
    top_logprobs: Count | None = None
    """Likeliest alternatives told for each token; only together with `logprobs`."""
    response_format: ResponseFormat | None = None
    """The form of the answer."""
    tools: list[Tool] | None = None
    """What the model may call."""
    tool_choice: ToolChoice | None = None
    """Whether it may call a tool, must, or must call this one."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several at once; only together with `tools`."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    """How long a reasoning model may think."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """How long answers shall be."""
    prediction: Prediction | None = None
    """Text that much of the answer is expected to repeat."""
    modalities: list[Literal["text", "audio"]] | None = None
    """What the answer shall be."""
    audio: AudioAnswer | None = None
    """How an audio answer shall sound; needed when `modalities` has `audio`."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None
    """Your own notes on the request."""
    store: bool | None = None
    """Accepted, and without effect here: nothing is stored."""
    service_tier: str | None = None
    """Accepted, and without effect here."""
    safety_identifier: Identifier | None = None
    """A stable name of your end user."""
    prompt_cache_key: Identifier | None = None
    """Accepted, and without effect here: prompts are cached by their text."""
    prompt_cache_retention: str | None = None
    """Accepted, and without effect here."""
    web_search_options: dict[str, Raw] | None = None
    """Passed through; no backend here searches the web."""
    functions: Annotated[list[FunctionDefinition], Meta(min_length=1)] | None = None
    """Deprecated for `tools`."""
    function_call: Literal["none", "auto"] | Named | None = None
    """Deprecated for `tool_choice`."""


_decoder = msgspec.json.Decoder(ChatRequest)


def parse_chat(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check a chat.

    Raises:
        InvalidJSON: not UTF-8, not JSON, nested too deep, or not an object.
        InvalidRequest: a field is missing, of a wrong type or out of range; `param` names it.
        InvalidModelName: the model's name cannot be one.
    """
    chat = read_request(_decoder, body, limits)
    messages = chat.messages
    if len(messages) > limits.messages_max:
        items_at_most("messages", len(messages), limits.messages_max, "messages")
    for place, message in enumerate(messages):
        if message.__class__ is AssistantMessage:
            check_assistant(place, message)
    check_sampled(chat, limits)
    if chat.tools is not None:
        check_tools(chat.tools, limits)
    _check_rare(chat, limits)
    tokens_max = chat.max_completion_tokens
    if tokens_max is not None:
        at_most("max_completion_tokens", tokens_max, limits.max_tokens_max)
    if chat.max_tokens is not None:
        at_most("max_tokens", chat.max_tokens, limits.max_tokens_max)
        tokens_max = tokens_max or chat.max_tokens
    if tokens_max is not None:
        tokens_max *= chat.n or 1
    return parsed(chat, stream=chat.stream is True, answer_tokens_max=tokens_max)


def _check_rare(chat: ChatRequest, limits: RequestLimits) -> None:
    """What few requests say, and what it needs beside it."""
    if chat.tool_choice is not None:
        check_tool_choice(chat.tool_choice, chat.tools)
    if chat.parallel_tool_calls is not None:
        check_needs_tools("parallel_tool_calls", chat.tools)
    if chat.top_logprobs:
        at_most("top_logprobs", chat.top_logprobs, limits.top_logprobs_max)
        if not chat.logprobs:
            raise InvalidRequest(
                "top_logprobs: only together with logprobs=true", param="top_logprobs"
            )
    form = chat.response_format
    if form.__class__ is SchemaAnswer and form.json_schema.schema is not None:
        check_schema("response_format.json_schema.schema", form.json_schema.schema, limits)
    if chat.modalities is not None and "audio" in chat.modalities and chat.audio is None:
        raise MissingParameter("audio: needed by modalities", param="audio")
    if chat.functions is not None:
        check_functions(chat.functions, limits)
    if isinstance(chat.function_call, Named):
        names = (function.name for function in chat.functions or ())
        check_named("function_call.name", chat.function_call.name, names)

"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from serverlessllm.openai.request.fields import (
    AtLeastOne,
    Count,
    Identifier,
    SampledFields,
)
from serverlessllm.openai.request.messages import (
    Message,
    Text,
)
from serverlessllm.openai.request.tools import (
    FunctionDefinition,
    Named,
    ResponseFormat,
    Tool,
    ToolChoice,
)

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

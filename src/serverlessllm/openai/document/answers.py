"""Answers as a client may rely on them, whatever backend made them."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from serverlessllm.openai.models import ModelStatus


class PromptDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What the prompt's tokens were."""

    cached_tokens: int
    """Found in the backend's KV cache."""
    audio_tokens: int


class CompletionDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer's tokens were."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8."""


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of the answer's tokens."""

    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The function and what it is called with."""

    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the model calls."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | UnsetType = UNSET
    """What it thought, where its backend tells."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Unix time."""
    model: str
    """The name that was asked for."""
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None


class PieceOfFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a call."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class PieceOfCall(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a call of a tool; pieces of one call have the same index."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: PieceOfFunction | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[PieceOfCall] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"] | None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed chat; the last event is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    """Empty only in the last chunk, which has the usage."""
    usage: Usage | UnsetType | None = UNSET
    """With `stream_options.include_usage` only."""
    system_fingerprint: str | None


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of the text's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answers."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None
    """Null only in pieces of a stream before its last."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a completion, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType | None = UNSET


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of one input."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | str
    """Base64 when that was asked for."""


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """Vectors, in the order of the inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model."""

    id: str
    """The name that it was asked for by: its own, or an alias."""
    root: str
    """Its own name."""
    object: Literal["model"]
    created: int
    """Unix time."""
    owned_by: str
    status: ModelStatus
    """How ready it is."""


class ModelPage(msgspec.Struct, frozen=True, kw_only=True):
    """Every model that is registered."""

    object: Literal["list"]
    data: list[Model]

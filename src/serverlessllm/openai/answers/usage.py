"""Token counts: the engine's numbers in the API's shape."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Raw, UnsetType

_COUNT_MAX = (1 << 53) - 1
_Count = Annotated[int, msgspec.Meta(ge=0, le=_COUNT_MAX)]


class PromptDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionDetails(msgspec.Struct, frozen=True):
    """Of the answer's tokens."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Of a chat or a completion; in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()
    completion_tokens_details: CompletionDetails = CompletionDetails()


class _SaidDetails(msgspec.Struct):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None
    audio_tokens: _Count | None = None
    accepted_prediction_tokens: _Count | None = None
    rejected_prediction_tokens: _Count | None = None


_NO_DETAILS = _SaidDetails()


class _SaidUsage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    total_tokens: _Count | None = None
    prompt_tokens_details: _SaidDetails | None = None
    completion_tokens_details: _SaidDetails | None = None
    prompt_cache_hit_tokens: _Count | None = None
    """DeepSeek's name for what is cached."""
    reasoning_tokens: _Count | None = None
    """Where SGLang has it."""


_said = msgspec.json.Decoder(_SaidUsage | None)


def read_usage(data: Raw | UnsetType) -> Usage | None:
    """What an engine says; None when it says no number that could be one."""
    if data is UNSET:
        return None
    try:
        said = _said.decode(data)
    except (ValueError, RecursionError):
        return None
    if said is None:
        return None
    prompt, completion, total = said.prompt_tokens, said.completion_tokens, said.total_tokens
    if prompt is None and completion is None and total is None:
        return None
    if prompt is None:
        prompt = max(0, (total or 0) - (completion or 0))
    if completion is None:
        completion = max(0, (total or 0) - prompt)
    asked = said.prompt_tokens_details or _NO_DETAILS
    answered = said.completion_tokens_details or _NO_DETAILS
    return Usage(
        prompt,
        completion,
        prompt + completion,
        PromptDetails(
            asked.cached_tokens or said.prompt_cache_hit_tokens or 0, asked.audio_tokens or 0
        ),
        CompletionDetails(
            answered.reasoning_tokens or said.reasoning_tokens or 0,
            answered.audio_tokens or 0,
            answered.accepted_prediction_tokens or 0,
            answered.rejected_prediction_tokens or 0,
        ),
    )

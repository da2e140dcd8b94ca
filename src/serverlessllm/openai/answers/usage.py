"""Token counts: the engine's numbers in the API's shape."""

from __future__ import annotations

import msgspec

_COUNT_MAX = 1 << 53


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


def read_usage(said: object) -> Usage | None:
    """What an engine says in any of the usual dialects; None when it says no number at all."""
    if not isinstance(said, dict):
        return None
    prompt = _first(said, "prompt_tokens", "input_tokens")
    completion = _first(said, "completion_tokens", "output_tokens")
    total = _count(said.get("total_tokens"))
    if prompt is None and completion is None and total is None:
        return None
    if prompt is None:
        prompt = max(0, (total or 0) - (completion or 0))
    if completion is None:
        completion = max(0, (total or 0) - prompt)
    asked, answered = said.get("prompt_tokens_details"), said.get("completion_tokens_details")
    cached = _detail(asked, "cached_tokens")
    reasoning = _detail(answered, "reasoning_tokens")
    return Usage(
        prompt,
        completion,
        prompt + completion,
        PromptDetails(
            _first(said, "prompt_cache_hit_tokens") or 0 if cached is None else cached,
            _detail(asked, "audio_tokens") or 0,
        ),
        CompletionDetails(
            _first(said, "reasoning_tokens") or 0 if reasoning is None else reasoning,
            _detail(answered, "audio_tokens") or 0,
            _detail(answered, "accepted_prediction_tokens") or 0,
            _detail(answered, "rejected_prediction_tokens") or 0,
        ),
    )


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < _COUNT_MAX else None


def _first(said: dict[object, object], *names: str) -> int | None:
    for name in names:
        count = _count(said.get(name))
        if count is not None:
            return count
    return None


def _detail(details: object, name: str) -> int | None:
    return _count(details.get(name)) if isinstance(details, dict) else None

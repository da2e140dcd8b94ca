"""Why an answer ended: the engines' many words for the API's five."""

from __future__ import annotations

from serverlessllm.core.errors import BackendProtocolError
from serverlessllm.openai.answers.asked import Kind

_WORDS = {
    "stop": ("eos", "eos_token", "stop_sequence", "stop_str", "stop_token", "end_turn", "complete"),
    "length": ("max_tokens", "max_length", "model_length", "token_limit", "limit"),
    "tool_calls": ("tool_call", "tool_use"),
    "content_filter": ("safety", "refusal", "blocked"),
    "function_call": (),
}
_MEANING = {word: reason for reason, words in _WORDS.items() for word in (reason, *words)}
_BROKEN = frozenset({"abort", "aborted", "cancelled", "canceled", "error", "failed"})
"""An answer that ended like this has no end: what it said so far is cut off somewhere."""


def finish_reason(said: str | None, kind: Kind) -> str:
    """The API's word. An unknown word, or none, is a plain stop.

    Raises:
        BackendProtocolError: the engine gave the answer up.
    """
    word = "stop" if said is None else said.lower()
    if word in _BROKEN:
        raise BackendProtocolError("the model's backend gave up in the middle of its answer")
    reason = _MEANING.get(word, "stop")
    if kind is Kind.CHAT:
        return reason
    return reason if reason in {"length", "content_filter"} else "stop"

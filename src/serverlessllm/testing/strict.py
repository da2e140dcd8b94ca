"""Whether an answer is what the OpenAI API says: the `openai` client's own types decide, strictly.

One thing they get wrong: a streamed completion's `finish_reason` is null until the end, in the
API's own answers too, and their type (one for both forms) does not know it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from serverlessllm.openai.answers import Asked, Kind

_TYPES: dict[Kind, TypeAdapter[Any]] = {
    Kind.CHAT: TypeAdapter(ChatCompletion),
    Kind.TEXT: TypeAdapter(Completion),
    Kind.EMBEDDINGS: TypeAdapter(CreateEmbeddingResponse),
}
_CHUNK = TypeAdapter(ChatCompletionChunk)
_DONE = "[DONE]"


def check_whole(asked: Asked, body: bytes) -> Any:
    """A whole answer; returned decoded."""
    answer = json.loads(body, parse_constant=_no_constant)
    assert answer["model"] == asked.model
    if asked.kind is Kind.EMBEDDINGS:
        _check_vectors(asked, answer)
        return answer
    _TYPES[asked.kind].validate_python(answer)
    _check_names(asked, answer)
    assert answer["choices"]
    for choice in answer["choices"]:
        assert asked.logprobs or choice["logprobs"] is None
        _check_scores(asked, choice["logprobs"])
        if asked.kind is Kind.CHAT:
            _check_message(choice)
    return answer


def check_stream(asked: Asked, events: Sequence[str]) -> list[Any]:
    """All events of a stream that went well, `[DONE]` included; the chunks, decoded."""
    *data, done = events
    assert done == _DONE
    chunks = [json.loads(event, parse_constant=_no_constant) for event in data]
    check_chunks(asked, chunks)
    if asked.include_usage and chunks[-1]["usage"] is not None:
        *chunks_with_choices, last = chunks
        assert last["choices"] == []
    else:
        chunks_with_choices = chunks
    ended = {each["choices"][0]["index"]: each["choices"][0] for each in chunks_with_choices}
    assert ended
    assert all(choice["finish_reason"] for choice in ended.values())
    return chunks


def check_chunks(asked: Asked, chunks: Sequence[Any]) -> None:
    """The chunks of a stream as far as it came."""
    assert len({_identity(chunk) for chunk in chunks}) <= 1
    begun: set[int] = set()
    ended: set[int] = set()
    named: dict[int, set[int]] = {}
    for chunk in chunks:
        _check_names(asked, chunk)
        assert ("usage" in chunk) is asked.include_usage
        _validate_chunk(asked, chunk)
        if not chunk["choices"]:
            assert asked.include_usage
            assert chunk is chunks[-1]
            continue
        assert chunk.get("usage") is None
        (choice,) = chunk["choices"]
        index = choice["index"]
        assert index not in ended
        assert asked.logprobs or choice["logprobs"] is None
        _check_scores(asked, choice["logprobs"])
        if asked.kind is Kind.CHAT:
            assert ("role" in choice["delta"]) is (index not in begun)
            _check_delta(choice, named.setdefault(index, set()))
        begun.add(index)
        if choice["finish_reason"] is not None:
            ended.add(index)


def _validate_chunk(asked: Asked, chunk: Any) -> None:
    if asked.kind is Kind.CHAT:
        _CHUNK.validate_python(chunk)
        return
    choices = [
        choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]
    ]
    _TYPES[Kind.TEXT].validate_python(chunk | {"choices": choices})


def _check_delta(choice: Any, named: set[int]) -> None:
    delta = choice["delta"]
    if choice["finish_reason"] is not None:
        assert delta == {}
        return
    says = [value for key, value in delta.items() if key not in {"role", "refusal"} and value]
    assert says or "role" in delta or delta.get("refusal") or choice["logprobs"] or _kept(choice)
    if "role" not in delta:
        assert None not in delta.values()
    for call in delta.get("tool_calls", ()):
        assert isinstance(call["function"]["arguments"], str)
        first = call["index"] not in named
        assert ("id" in call) is first
        assert ("type" in call) is first
        assert call["index"] <= len(named)
        named.add(call["index"])


def _check_message(choice: Any) -> None:
    message = choice["message"]
    assert {"role", "content", "refusal"} <= message.keys()
    for call in message.get("tool_calls", ()):
        assert call["id"]
        assert call["type"] == "function"
        assert isinstance(call["function"]["arguments"], str)
    if message.get("tool_calls"):
        assert choice["finish_reason"] != "stop"


def _check_names(asked: Asked, answer: Any) -> None:
    assert answer["id"].startswith("chatcmpl-" if asked.kind is Kind.CHAT else "cmpl-")
    assert answer["model"] == asked.model
    assert type(answer["created"]) is int
    assert answer["system_fingerprint"] is None or isinstance(answer["system_fingerprint"], str)
    usage = answer.get("usage")
    if usage is not None:
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
        assert usage["completion_tokens_details"]["reasoning_tokens"] >= 0


def _check_scores(asked: Asked, scores: Any) -> None:
    if scores is None:
        return
    if asked.kind is Kind.CHAT:
        assert scores.keys() == {"content", "refusal"}
        return
    assert scores.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(values) for values in scores.values()}) == 1


def _check_vectors(asked: Asked, answer: Any) -> None:
    rows = answer["data"]
    assert rows
    for row in rows:
        if asked.base64:
            assert isinstance(row["embedding"], str)
            assert len(base64.b64decode(row["embedding"], validate=True)) % 4 == 0
            row = row | {"embedding": []}  # noqa: PLW2901 - what the client makes of it is a list
        _TYPES[Kind.EMBEDDINGS].validate_python(answer | {"data": [row]})


def _identity(chunk: Any) -> tuple[object, ...]:
    return tuple(
        chunk.get(name)
        for name in ("id", "object", "created", "model", "system_fingerprint", "service_tier")
    )


def _kept(choice: Any) -> bool:
    return bool(choice.get("token_ids"))


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")

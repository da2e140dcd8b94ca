"""An answer that comes at once."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Raw, UnsetType

from serverlessllm.openai.answers.asked import Asked, Kind
from serverlessllm.openai.answers.chat import SaidChoice, WholeChoice, whole_choice
from serverlessllm.openai.answers.embeddings import Row, SaidRow, row
from serverlessllm.openai.answers.failures import failure, nonsense
from serverlessllm.openai.answers.identity import Said, Stamp, identify
from serverlessllm.openai.answers.text import SaidText, WholeText, unless_null, whole_text
from serverlessllm.openai.answers.usage import Usage, read_usage

_encode = msgspec.json.Encoder().encode


class Complete(msgspec.Struct, frozen=True):
    """A whole answer as the client gets it."""

    body: bytes
    usage: Usage | None
    """None: the engine counts nothing."""


class _SaidAnswer(Said):
    usage: Raw | UnsetType = UNSET
    error: object = None
    prompt_logprobs: Raw | UnsetType = UNSET
    prompt_token_ids: list[int] | None = None


class _SaidChat(_SaidAnswer):
    choices: list[SaidChoice] | None = None


class _SaidTexts(_SaidAnswer):
    choices: list[SaidText] | None = None


class _SaidRows(msgspec.Struct):
    data: list[SaidRow] | None = None
    usage: Raw | UnsetType = UNSET
    error: object = None


class _Answer(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[WholeChoice] | list[WholeText]
    usage: Usage | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    prompt_logprobs: Raw | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class _RowUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _Rows(msgspec.Struct):
    data: list[Row]
    model: str
    usage: _RowUsage
    object: str = "list"


_chat = msgspec.json.Decoder(_SaidChat)
_texts = msgspec.json.Decoder(_SaidTexts)
_rows = msgspec.json.Decoder(_SaidRows)


def complete(asked: Asked, body: bytes, stamp: Stamp) -> Complete:
    """Make the body of an engine's 2xx answer spec-complete.

    Raises:
        SLLMError: it is an error after all, or nonsense.
    """
    try:
        if not body.isascii():
            body.decode()
        if asked.kind is Kind.EMBEDDINGS:
            return _embeddings(asked, body)
        return _chosen(asked, body, stamp)
    except msgspec.ValidationError as error:
        raise nonsense(str(error)) from None
    except (ValueError, RecursionError):
        raise nonsense("it is not JSON") from None


def _chosen(asked: Asked, body: bytes, stamp: Stamp) -> Complete:
    said: _SaidChat | _SaidTexts
    choices: list[WholeChoice] | list[WholeText]
    if asked.kind is Kind.CHAT:
        said = chat = _chat.decode(body)
        _check(said, chat.choices, body, asked.kind)
        named = identify(asked, stamp, said)
        choices = [
            whole_choice(each, place, logprobs=asked.logprobs, name=named.name)
            for place, each in enumerate(chat.choices or ())
        ]
    else:
        said = texts = _texts.decode(body)
        _check(said, texts.choices, body, asked.kind)
        named = identify(asked, stamp, said)
        choices = [
            whole_text(each, place, logprobs=asked.logprobs)
            for place, each in enumerate(texts.choices or ())
        ]
    usage = read_usage(said.usage)
    answer = _Answer(
        named.id,
        "chat.completion" if asked.kind is Kind.CHAT else "text_completion",
        named.created_s,
        named.model,
        named.system_fingerprint,
        choices,
        usage=usage or UNSET,
        service_tier=named.service_tier or UNSET,
        prompt_logprobs=unless_null(said.prompt_logprobs),
        prompt_token_ids=said.prompt_token_ids or UNSET,
    )
    return Complete(_encode(answer), usage)


def _embeddings(asked: Asked, body: bytes) -> Complete:
    said = _rows.decode(body)
    _check(said, said.data, body, asked.kind)
    usage = read_usage(said.usage)
    prompt = usage.prompt_tokens if usage else 0
    rows = [row(each, place, asked) for place, each in enumerate(said.data or ())]
    return Complete(_encode(_Rows(rows, asked.model, _RowUsage(prompt, prompt))), usage)


def _check(
    said: _SaidAnswer | _SaidRows, items: Sequence[object] | None, body: bytes, kind: Kind
) -> None:
    """Raise what the engine says instead of an answer."""
    if said.error is not None or items is None:
        raise failure(body, kind)
    if not items:
        raise nonsense("it is empty")

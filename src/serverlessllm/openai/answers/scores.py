"""Log probabilities in the API's two shapes, whichever the engine used."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

NEVER = -9999.0
"""How the API writes the log of zero."""

Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
_T = TypeVar("_T")


class Alternative(msgspec.Struct):
    """A token that could have been."""

    token: str
    logprob: float | None = None
    bytes: list[Byte] | None = None

    def settle(self) -> None:
        """Fill in what is missing."""
        if self.logprob is None:
            self.logprob = NEVER
        if self.bytes is None and "\N{REPLACEMENT CHARACTER}" not in self.token:
            self.bytes = list(self.token.encode())


class Token(Alternative):
    """A token of the answer."""

    top_logprobs: list[Alternative] | None = None

    def settle(self) -> None:
        super().settle()
        if self.top_logprobs is None:
            self.top_logprobs = []
        for each in self.top_logprobs:
            each.settle()


class Scores(msgspec.Struct):
    """What an engine says: either shape."""

    content: list[Token] | None = None
    refusal: list[Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None
    text_offset: list[int] | None = None


class ChatScores(msgspec.Struct):
    """Of a chat."""

    content: list[Token] | None
    refusal: list[Token] | None


class TextScores(msgspec.Struct):
    """Of a completion; four lists of one length."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


def chat_scores(said: Scores) -> ChatScores | None:
    """None when it says nothing."""
    content, refusal = said.content, said.refusal
    if content is None and refusal is None and said.tokens is not None:
        content = _from_text(said.tokens, said)
    for tokens in (content, refusal):
        for token in tokens or ():
            token.settle()
    return ChatScores(content, refusal) if content or refusal else None


def text_scores(said: Scores, offset: int) -> TextScores | None:
    """None when it says nothing. `offset`: characters of this answer before these tokens, where
    the engine does not say."""
    if said.tokens is None:
        return None if said.content is None else _from_chat(said.content, offset)
    tokens = said.tokens
    count = len(tokens)
    logprobs = [
        # Of a prompt's first token there is none, and the schema has no null: it was certain.
        (NEVER if number else 0.0) if logprob is None else logprob
        for number, logprob in enumerate(_fitted(said.token_logprobs, count))
    ]
    top = [
        {other: NEVER if logprob is None else logprob for other, logprob in (each or {}).items()}
        for each in _fitted(said.top_logprobs, count)
    ]
    _tell_chosen(tokens, logprobs, top)
    offsets = said.text_offset
    if offsets is None or len(offsets) != count:
        offsets = _offsets(tokens, offset)
    return TextScores(offsets, logprobs, tokens, top)


def _tell_chosen(tokens: list[str], logprobs: list[float], top: list[dict[str, float]]) -> None:
    """Where alternatives are told, the token itself is among them, likely or not."""
    for token, logprob, others in zip(tokens, logprobs, top, strict=True):
        if others:
            others.setdefault(token, logprob)


def _fitted(values: list[_T | None] | None, count: int) -> list[_T | None]:
    found = (values or [])[:count]
    return found + [None] * (count - len(found))


def _from_text(tokens: list[str], said: Scores) -> list[Token]:
    count = len(tokens)
    return [
        Token(
            token=token,
            logprob=logprob,
            top_logprobs=[Alternative(token=other, logprob=p) for other, p in (top or {}).items()],
        )
        for token, logprob, top in zip(
            tokens,
            _fitted(said.token_logprobs, count),
            _fitted(said.top_logprobs, count),
            strict=True,
        )
    ]


def _from_chat(content: list[Token], offset: int) -> TextScores:
    for token in content:
        token.settle()
    tokens = [token.token for token in content]
    logprobs = [NEVER if token.logprob is None else token.logprob for token in content]
    top = [
        {each.token: NEVER if each.logprob is None else each.logprob for each in others}
        for others in (token.top_logprobs or [] for token in content)
    ]
    _tell_chosen(tokens, logprobs, top)
    return TextScores(_offsets(tokens, offset), logprobs, tokens, top)


def _offsets(tokens: list[str], offset: int) -> list[int]:
    found = []
    for token in tokens:
        found.append(offset)
        offset += len(token)
    return found

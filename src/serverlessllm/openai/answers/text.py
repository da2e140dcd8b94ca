"""Completions: the whole answer, and a choice of a streamed one."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType

from serverlessllm.openai.answers.asked import Kind
from serverlessllm.openai.answers.chat import Index
from serverlessllm.openai.answers.finish import finish_reason
from serverlessllm.openai.answers.scores import Scores, TextScores, text_scores

_encode = msgspec.json.Encoder().encode


class SaidText(msgspec.Struct):
    """A choice, or a piece of one, as an engine says it."""

    text: str | None = None
    index: Index | None = None
    finish_reason: str | None = None
    logprobs: Scores | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: Raw | UnsetType = UNSET
    prompt_token_ids: list[int] | None = None


class WholeText(msgspec.Struct):
    """As the client sees it; in pieces, `finish_reason` is null but in the last."""

    text: str
    index: int
    logprobs: TextScores | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: Raw | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


def whole_text(said: SaidText, place: int, *, logprobs: bool) -> WholeText:
    """A choice of a whole answer.

    Raises:
        BackendProtocolError: the engine gave it up.
    """
    reason = finish_reason(said.finish_reason, Kind.TEXT)
    scores = text_scores(said.logprobs, 0) if logprobs and said.logprobs is not None else None
    return _choice(said, place if said.index is None else said.index, scores, reason)


class TextVoice:
    """One choice of a streamed answer; no piece of it is empty but the last."""

    def __init__(self, head: bytes, tail: bytes, index: int, *, logprobs: bool) -> None:
        self.ended = False
        self._head = head
        self._tail = tail
        self._plain_head = head + b'{"text":'
        self._plain_tail = b',"index":%d,"logprobs":null,"finish_reason":null}%b' % (index, tail)
        self._index = index
        self._logprobs = logprobs
        self._offset = 0

    def say(self, said: SaidText, out: list[bytes]) -> None:
        """What has come now.

        Raises:
            BackendProtocolError: the engine gave it up.
        """
        if self.ended:
            return
        scores = None
        if self._logprobs and said.logprobs is not None:
            scores = text_scores(said.logprobs, self._offset)
            self._offset += sum(map(len, scores.tokens)) if scores else 0
        reason = said.finish_reason
        if reason is None and scores is None and not (said.token_ids or said.prompt_token_ids):
            if said.text:
                out.append(self._plain_head + _encode(said.text) + self._plain_tail)
            return
        meaning = None if reason is None else finish_reason(reason, Kind.TEXT)
        self.ended = reason is not None
        choice = _choice(said, self._index, scores, meaning)
        out.append(self._head + _encode(choice) + self._tail)

    def finish(self, reason: str, out: list[bytes]) -> None:
        """It has ended, for one of the API's reasons."""
        self.say(SaidText(finish_reason=reason), out)


def _choice(said: SaidText, index: int, scores: TextScores | None, reason: str | None) -> WholeText:
    return WholeText(
        said.text or "",
        index,
        scores,
        reason,
        stop_reason=UNSET if said.stop_reason is None else said.stop_reason,
        token_ids=said.token_ids or UNSET,
        prompt_logprobs=unless_null(said.prompt_logprobs),
        prompt_token_ids=said.prompt_token_ids or UNSET,
    )


def unless_null(said: Raw | UnsetType) -> Raw | UnsetType:
    """An optional field that is passed on as it is."""
    return UNSET if said is UNSET or bytes(said) == b"null" else said

"""Chats: the whole answer, and a choice of a streamed one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from serverlessllm.openai.answers.asked import Kind
from serverlessllm.openai.answers.calls import (
    Call,
    Calls,
    Function,
    SaidCall,
    SaidFunction,
    arguments_text,
    whole_calls,
    whole_function,
)
from serverlessllm.openai.answers.finish import finish_reason
from serverlessllm.openai.answers.scores import ChatScores, Scores, chat_scores

Index = Annotated[int, msgspec.Meta(ge=0, le=4095)]
_encode = msgspec.json.Encoder().encode


class SaidMessage(msgspec.Struct):
    """A message, or a piece of one, as an engine says it. Whatever it says of the role, it is the
    assistant's."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's and Ollama's name for it."""
    refusal: str | None = None
    tool_calls: list[SaidCall] | None = None
    function_call: SaidFunction | None = None


class SaidChoice(msgspec.Struct):
    """A choice as an engine says it: `message` when whole, `delta` in pieces."""

    index: Index | None = None
    message: SaidMessage | None = None
    delta: SaidMessage | None = None
    finish_reason: str | None = None
    logprobs: Scores | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class _Message(msgspec.Struct):
    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET
    function_call: Function | UnsetType = UNSET


class WholeChoice(msgspec.Struct):
    """As the client sees it."""

    index: int
    message: _Message
    logprobs: ChatScores | None
    finish_reason: str
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class _Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET
    function_call: Function | UnsetType = UNSET


class _Piece(msgspec.Struct):
    index: int
    delta: _Delta
    logprobs: ChatScores | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


def whole_choice(said: SaidChoice, place: int, *, logprobs: bool, name: str) -> WholeChoice:
    """A choice of a whole answer; `name` makes ids of calls where the engine gives none.

    Raises:
        BackendProtocolError: the engine gave it up, or a call names no function.
    """
    message = said.message or said.delta or SaidMessage()
    calls = whole_calls(message.tool_calls or [], f"{name}_{place}")
    content = message.content
    if not content:
        content = None if calls or message.function_call or message.refusal else ""
    function = UNSET if message.function_call is None else whole_function(message.function_call)
    return WholeChoice(
        index=place if said.index is None else said.index,
        message=_Message(
            content=content,
            refusal=message.refusal,
            reasoning_content=message.reasoning_content or message.reasoning or UNSET,
            tool_calls=calls or UNSET,
            function_call=function,
        ),
        logprobs=chat_scores(said.logprobs) if logprobs and said.logprobs is not None else None,
        finish_reason=_called(finish_reason(said.finish_reason, Kind.CHAT), calls),
        stop_reason=UNSET if said.stop_reason is None else said.stop_reason,
        token_ids=said.token_ids or UNSET,
    )


def _called(reason: str, calls: list[Call] | Calls) -> str:
    """Some engines call an answer that ends in calls a plain stop."""
    return "tool_calls" if calls and reason == "stop" else reason


class ChatVoice:
    """One choice of a streamed answer: its first piece says whose it is, its last one is empty and
    says why it ended, and none between is empty."""

    def __init__(self, head: bytes, tail: bytes, index: int, *, logprobs: bool, name: str) -> None:
        self.ended = False
        self._head = head
        self._tail = tail
        self._plain_head = b'%b{"index":%d,"delta":{"content":' % (head, index)
        self._plain_tail = b'},"logprobs":null,"finish_reason":null}' + tail
        self._index = index
        self._logprobs = logprobs
        self._begun = False
        self._calls = Calls(f"{name}_{index}")

    def say(self, said: SaidChoice, out: list[bytes]) -> None:
        """What has come now.

        Raises:
            BackendProtocolError: the engine gave it up.
        """
        if self.ended:
            return
        reason = said.finish_reason
        if reason is not None:
            reason = finish_reason(reason, Kind.CHAT)
        delta = said.delta or said.message or SaidMessage()
        reasoning = delta.reasoning_content or delta.reasoning
        scores = None
        if self._logprobs and said.logprobs is not None:
            scores = chat_scores(said.logprobs)
        if self._begun and not (
            reasoning
            or scores
            or delta.tool_calls
            or delta.refusal
            or delta.function_call
            or said.token_ids
        ):
            # Nearly always there is nothing but some text.
            if delta.content:
                out.append(self._plain_head + _encode(delta.content) + self._plain_tail)
        else:
            scores = self._say_all(delta, reasoning, scores, said, out)
        if reason is not None:
            self.finish(reason, out, scores, said.stop_reason)

    def _say_all(
        self,
        delta: SaidMessage,
        reasoning: str | None,
        scores: ChatScores | None,
        said: SaidChoice,
        out: list[bytes],
    ) -> ChatScores | None:
        """Anything; the scores if they are to go with the end."""
        calls = [call for each in delta.tool_calls or () if (call := self._calls.take(each))]
        told = _Delta(
            content=delta.content or UNSET,
            refusal=delta.refusal or UNSET,
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
        if delta.function_call is not None:
            told.function_call = Function(
                delta.function_call.name or UNSET, arguments_text(delta.function_call.arguments)
            )
        if not self._begun:
            self._begun = True
            told.role = "assistant"
            if told.content is UNSET:
                told.content = None if calls or delta.function_call else ""
            if told.refusal is UNSET:
                told.refusal = None
        elif told == _Delta() and not said.token_ids and said.finish_reason is not None:
            return scores
        piece = _Piece(self._index, told, scores, token_ids=said.token_ids or UNSET)
        if told != _Delta() or scores is not None or said.token_ids:
            out.append(self._head + _encode(piece) + self._tail)
        return None

    def finish(
        self,
        reason: str,
        out: list[bytes],
        scores: ChatScores | None = None,
        stop_reason: int | str | None = None,
    ) -> None:
        """It has ended, for one of the API's reasons."""
        self.ended = True
        calls = self._calls.finish()
        if calls:
            out.append(
                self._head + _encode(_Piece(self._index, _Delta(tool_calls=calls))) + self._tail
            )
        last = _Piece(self._index, _Delta(), scores, _called(reason, self._calls))
        if stop_reason is not None:
            last.stop_reason = stop_reason
        out.append(self._head + _encode(last) + self._tail)

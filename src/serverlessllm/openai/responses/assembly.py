"""Pieces of a chat's answer → items of a response, and the events that tell of them.

A whole answer goes the same way, as one big piece whose events nobody sends.
"""

from __future__ import annotations

import itertools
from typing import TypeVar

import msgspec

from serverlessllm.core.errors import BackendProtocolError
from serverlessllm.openai.chats import (
    ChatUsage,
    Choice,
    Failure,
    Loading,
    TokenLogprob,
    ToolCallPiece,
    TopLogprob,
)
from serverlessllm.openai.responses import events
from serverlessllm.openai.responses.answer import ResponseObject, ended, failed, is_cut
from serverlessllm.openai.responses.events import Event
from serverlessllm.openai.responses.growing import (
    Growing,
    GrowingCall,
    GrowingMessage,
    GrowingReasoning,
)
from serverlessllm.openai.responses.items import OutputItem, OutputText, Status

_Opened = TypeVar("_Opened", bound=Growing)


class Assembly:
    """`response` is as far as it has come; each method returns the events that tell so.

    `uid` names the items.
    """

    def __init__(self, response: ResponseObject, uid: str) -> None:
        self.response = response
        self._uid = uid
        self._items: list[OutputItem] = []
        self._growing: Growing | None = None
        self._finish_reason = ""
        self._numbers = itertools.count()

    def begin(self) -> list[Event]:
        """The response exists."""
        return [
            events.Created(sequence_number=next(self._numbers), response=self.response),
            events.InProgress(sequence_number=next(self._numbers), response=self.response),
        ]

    def wait(self, loading: Loading) -> list[Event]:
        """The model's load goes on."""
        number = next(self._numbers)
        return [events.InProgress(sequence_number=number, response=self.response, loading=loading)]

    def take(self, choice: Choice) -> list[Event]:
        """One piece more.

        Raises:
            BackendProtocolError: it does not follow from those before.
        """
        said = choice.said
        told: list[Event] = []
        if said.reasoning_content:
            told += self._reasoning(told).add(said.reasoning_content)
        if said.content:
            told += self._message(told).add_text(said.content, _logprobs(choice))
        if said.refusal:
            told += self._message(told).add_refusal(said.refusal)
        for number, piece in enumerate(said.tool_calls or ()):
            call = self._call(told, piece, number)
            if piece.function is not None and piece.function.arguments:
                told += call.add(piece.function.arguments)
        self._finish_reason = choice.finish_reason or self._finish_reason
        return told

    def end(self, usage: ChatUsage | None, now_s: int) -> list[Event]:
        """The answer is whole, or was stopped at a bound."""
        told: list[Event] = []
        if not self._items and self._growing is None:
            told += self._message(told).begin(OutputText)
        cut = is_cut(self._finish_reason)
        self._close(told, "incomplete" if cut else "completed")
        output = tuple(self._items)
        self.response = ended(self.response, output, self._finish_reason, usage, now_s)
        kind = events.Incomplete if cut else events.Completed
        return [*told, kind(sequence_number=next(self._numbers), response=self.response)]

    def fail(self, failure: Failure) -> list[Event]:
        """The answer breaks off: what it has so far stays in it."""
        number = next(self._numbers)
        self._close([], "incomplete")
        self.response = failed(self.response, tuple(self._items), failure)
        return [events.Failed(sequence_number=number, response=self.response)]

    def _message(self, told: list[Event]) -> GrowingMessage:
        if not isinstance(self._growing, GrowingMessage):
            self._close(told)
            index = len(self._items)
            item_id = f"msg_{self._uid}{index}"
            self._growing = self._open(told, GrowingMessage(item_id, index, self._numbers))
        return self._growing

    def _reasoning(self, told: list[Event]) -> GrowingReasoning:
        if not isinstance(self._growing, GrowingReasoning):
            self._close(told)
            index = len(self._items)
            item_id = f"rs_{self._uid}{index}"
            self._growing = self._open(told, GrowingReasoning(item_id, index, self._numbers))
        return self._growing

    def _call(self, told: list[Event], piece: ToolCallPiece, number: int) -> GrowingCall:
        """The call that a piece belongs to: calls come one after the other."""
        place = number if piece.index is None else piece.index
        growing = self._growing
        if isinstance(growing, GrowingCall) and growing.place == place:
            return growing
        name = piece.function.name if piece.function is not None else None
        if not name:
            raise BackendProtocolError("the model's backend mixed up its tool calls")
        self._close(told)
        index = len(self._items)
        item_id, call_id = f"fc_{self._uid}{index}", piece.id or f"call_{self._uid}{index}"
        call = GrowingCall(item_id, index, self._numbers, call_id, name, place)
        self._growing = self._open(told, call)
        return call

    def _open(self, told: list[Event], growing: _Opened) -> _Opened:
        told.append(
            events.ItemAdded(
                sequence_number=next(self._numbers),
                output_index=len(self._items),
                item=growing.item("in_progress"),
            )
        )
        return growing

    def _close(self, told: list[Event], status: Status = "completed") -> None:
        """What grows is whole, or is cut off."""
        growing = self._growing
        if growing is None:
            return
        self._growing = None
        told += growing.close()
        item, index = growing.item(status), len(self._items)
        self._items.append(item)
        told.append(
            events.ItemDone(sequence_number=next(self._numbers), output_index=index, item=item)
        )


def _logprobs(choice: Choice) -> tuple[TokenLogprob, ...]:
    """The scores of a piece; where an engine says no bytes, they are the token's own."""
    found = None if choice.logprobs is None else choice.logprobs.content
    return tuple(
        TokenLogprob(
            token=token.token,
            logprob=token.logprob,
            bytes=_bytes(token),
            top_logprobs=tuple(
                msgspec.structs.replace(other, bytes=_bytes(other)) for other in token.top_logprobs
            ),
        )
        for token in found or ()
    )


def _bytes(token: TopLogprob) -> list[int]:
    return list(token.token.encode()) if token.bytes is None else token.bytes

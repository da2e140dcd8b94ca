"""Pieces of a chat's answer → events of a streamed message."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from serverlessllm.core.errors import BackendProtocolError
from serverlessllm.openai.chats import ChatUsage, Choice, Loading, ToolCallPiece
from serverlessllm.openai.messages.answer import (
    Block,
    Message,
    Stop,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
    Usage,
    stop_of,
    usage_of,
)


class Event(Struct, frozen=True, kw_only=True, tag_field="type"):
    """`type` says which."""


class MessageStart(Event, frozen=True, kw_only=True, tag="message_start"):
    message: Message


class Ping(Event, frozen=True, kw_only=True, tag="ping"):
    loading: Loading | UnsetType = UNSET
    """How far the model's load is, for a client that wants it in an event."""


class BlockStart(Event, frozen=True, kw_only=True, tag="content_block_start"):
    index: int
    content_block: Block


class TextDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(Event, frozen=True, kw_only=True, tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(Event, frozen=True, kw_only=True, tag="content_block_stop"):
    index: int


class MessageDelta(Event, frozen=True, kw_only=True, tag="message_delta"):
    delta: Stop
    usage: Usage


class MessageStop(Event, frozen=True, kw_only=True, tag="message_stop"):
    pass


_EMPTY: dict[type[Block], Block] = {
    TextBlock: TextBlock(text=""),
    ThinkingBlock: ThinkingBlock(thinking=""),
}
_NO_CHOICE = Choice()


class Assembly:
    """Blocks come one after the other; each method returns the events that tell so."""

    def __init__(self, message: Message, thinks: bool) -> None:
        self._message = message
        self._thinks = thinks
        self._index = -1
        self._open: type[Block] | None = None
        self._call = -1
        """The call that grows, among those of the chat."""
        self._last = _NO_CHOICE
        """What said why it ended."""

    def begin(self) -> list[Event]:
        """The message exists."""
        return [MessageStart(message=self._message), Ping()]

    def wait(self, loading: Loading) -> list[Event]:
        """The model's load goes on."""
        return [Ping(loading=loading)]

    def take(self, choice: Choice) -> list[Event]:
        """One piece more.

        Raises:
            BackendProtocolError: it does not follow from those before.
        """
        said = choice.said
        told: list[Event] = []
        if said.reasoning_content and self._thinks:
            self._block(told, ThinkingBlock)
            self._add(told, ThinkingDelta(thinking=said.reasoning_content))
        for text in (said.content, said.refusal):
            if text:
                self._block(told, TextBlock)
                self._add(told, TextDelta(text=text))
        for number, piece in enumerate(said.tool_calls or ()):
            self._take_call(told, piece, number)
        if choice.finish_reason is not None:
            self._last = choice
            self._close(told)
        return told

    def end(self, usage: ChatUsage | None) -> list[Event]:
        """The answer is whole, or was stopped at a bound."""
        told: list[Event] = []
        if self._index < 0:
            self._block(told, TextBlock)
        self._close(told)
        stop = stop_of(self._last, calls=self._call >= 0)
        told.append(MessageDelta(delta=stop, usage=usage_of(usage)))
        told.append(MessageStop())
        return told

    def _block(self, told: list[Event], kind: type[TextBlock | ThinkingBlock]) -> None:
        if self._open is not kind:
            self._start(told, kind, _EMPTY[kind])

    def _take_call(self, told: list[Event], piece: ToolCallPiece, number: int) -> None:
        place = number if piece.index is None else piece.index
        function = piece.function
        if self._open is not ToolUseBlock or self._call != place:
            if function is None or not function.name:
                raise BackendProtocolError("the model's backend mixed up its tool calls")
            call_id = piece.id or f"toolu_{self._message.id.removeprefix('msg_')}{place}"
            block = ToolUseBlock(id=call_id, name=function.name, input={})
            self._start(told, ToolUseBlock, block)
            self._call = place
        if function is not None and function.arguments:
            self._add(told, InputDelta(partial_json=function.arguments))

    def _start(self, told: list[Event], kind: type[Block], block: Block) -> None:
        self._close(told)
        self._open = kind
        self._index += 1
        told.append(BlockStart(index=self._index, content_block=block))

    def _add(self, told: list[Event], delta: TextDelta | ThinkingDelta | InputDelta) -> None:
        told.append(BlockDelta(index=self._index, delta=delta))

    def _close(self, told: list[Event]) -> None:
        if self._open is not None:
            self._open = None
            told.append(BlockStop(index=self._index))

"""Typed events of a streamed response."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from serverlessllm.openai.chats import Failure, Loading, TokenLogprob
from serverlessllm.openai.errors import ErrorFields
from serverlessllm.openai.responses.answer import ResponseObject
from serverlessllm.openai.responses.items import OutputItem, OutputPart, ReasoningText
from serverlessllm.openai.sse import typed_event


class Event(Struct, frozen=True, kw_only=True, tag_field="type"):
    """`type` says which; `sequence_number` counts from 0."""

    sequence_number: int


class _Lifecycle(Event, frozen=True, kw_only=True):
    response: ResponseObject


class Created(_Lifecycle, frozen=True, kw_only=True, tag="response.created"):
    pass


class InProgress(_Lifecycle, frozen=True, kw_only=True, tag="response.in_progress"):
    loading: Loading | UnsetType = UNSET
    """How far the model's load is, for a client that wants it in an event."""


class Completed(_Lifecycle, frozen=True, kw_only=True, tag="response.completed"):
    pass


class Incomplete(_Lifecycle, frozen=True, kw_only=True, tag="response.incomplete"):
    pass


class Failed(_Lifecycle, frozen=True, kw_only=True, tag="response.failed"):
    pass


class _OfItem(Event, frozen=True, kw_only=True):
    output_index: int


class ItemAdded(_OfItem, frozen=True, kw_only=True, tag="response.output_item.added"):
    item: OutputItem


class ItemDone(_OfItem, frozen=True, kw_only=True, tag="response.output_item.done"):
    item: OutputItem


class ArgumentsDelta(
    _OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"
):
    item_id: str
    delta: str


class ArgumentsDone(
    _OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.done"
):
    item_id: str
    name: str
    arguments: str


class _OfPart(_OfItem, frozen=True, kw_only=True):
    item_id: str
    content_index: int


class PartAdded(_OfPart, frozen=True, kw_only=True, tag="response.content_part.added"):
    part: OutputPart | ReasoningText


class PartDone(_OfPart, frozen=True, kw_only=True, tag="response.content_part.done"):
    part: OutputPart | ReasoningText


class TextDelta(_OfPart, frozen=True, kw_only=True, tag="response.output_text.delta"):
    delta: str
    logprobs: tuple[TokenLogprob, ...] = ()


class TextDone(_OfPart, frozen=True, kw_only=True, tag="response.output_text.done"):
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class RefusalDelta(_OfPart, frozen=True, kw_only=True, tag="response.refusal.delta"):
    delta: str


class RefusalDone(_OfPart, frozen=True, kw_only=True, tag="response.refusal.done"):
    refusal: str


class ReasoningDelta(_OfPart, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(_OfPart, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    text: str


class ErrorEvent(Event, frozen=True, kw_only=True, tag="error"):
    """The end of a stream that never became a response. `error` has the same once more: client
    libraries raise what stands there."""

    code: str
    message: str
    param: str | None
    error: ErrorFields
    loading: Loading | UnsetType = UNSET


def error_frame(failure: Failure) -> bytes:
    """The only event of a stream that failed before its response began."""
    error = failure.error
    event = ErrorEvent(
        sequence_number=0,
        code=error.code,
        message=error.message,
        param=error.param,
        error=error,
        loading=UNSET if failure.loading is None else failure.loading,
    )
    return typed_event(event)

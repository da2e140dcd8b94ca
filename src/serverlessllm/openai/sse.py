"""What we say ourselves on a server-sent event stream."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.errors import SLLMError
from serverlessllm.openai.errors import error_body

DONE = b"data: [DONE]\n\n"
"""The end of a stream that went well."""
EVENT_STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)
"""Of a stream that we start before the backend answers."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a load is, as a waiting client sees it."""

    state: str
    stage: str
    """The hop that moves now; empty: none does."""
    bytes: int
    total: int | None
    """None: not known yet."""
    eta_s: float | UnsetType = UNSET
    """Absent rather than guessed: until the stage ends, at the bandwidth that it was measured to
    have."""


class _ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int = 0
    delta: dict[str, str] = {}
    logprobs: None = None
    finish_reason: None = None


class _TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int = 0
    text: str = ""
    logprobs: None = None
    finish_reason: None = None


class _Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer that adds nothing to it."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: None = None
    choices: tuple[_ChatChoice | _TextChoice]
    loading: Progress


_encoder = msgspec.json.Encoder()


def progress_of(event: LoadEvent) -> Progress:
    """A load event without what is the agents' own."""
    return Progress(
        state=event.state,
        stage=event.stage,
        bytes=event.bytes_done,
        total=event.bytes_total,
        eta_s=UNSET if event.eta_s is None else event.eta_s,
    )


def comment(event: LoadEvent) -> bytes:
    """Progress of a load as an SSE comment: every client library skips it."""
    return b": " + _encoder.encode(progress_of(event)) + b"\n\n"


def progress_chunk(event: LoadEvent, *, chat: bool, name: str, created_s: int, model: str) -> bytes:
    """Progress of a load as a chunk of an answer that says nothing yet, for clients whose library
    drops comments. `name` makes the chunk's id."""
    chunk = _Chunk(
        id=f"chatcmpl-{name}" if chat else f"cmpl-{name}",
        object="chat.completion.chunk" if chat else "text_completion",
        created=created_s,
        model=model,
        choices=(_ChatChoice() if chat else _TextChoice(),),
        loading=progress_of(event),
    )
    return b"data: " + _encoder.encode(chunk) + b"\n\n"


def error_event(error: SLLMError) -> bytes:
    """The last event of a stream that failed; no `[DONE]` follows it."""
    return b"data: " + error_body(error) + b"\n\n"


def typed_event(event: msgspec.Struct) -> bytes:
    """An event whose name is its struct's tag."""
    name = str(event.__struct_config__.tag).encode()
    return b"event: %b\ndata: %b\n\n" % (name, _encoder.encode(event))


def typed_events(events: Iterable[msgspec.Struct]) -> bytes:
    """One after the other."""
    return b"".join(map(typed_event, events))

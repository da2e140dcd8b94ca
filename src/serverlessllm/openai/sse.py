"""What we say ourselves on a server-sent event stream."""

from __future__ import annotations

import msgspec

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


class _Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """A load event as a waiting client sees it."""

    state: str
    stage: str = ""
    bytes: int = 0
    total: int | None = None
    eta_s: float | None = None


_encoder = msgspec.json.Encoder()


def comment(event: LoadEvent) -> bytes:
    """Progress of a load as an SSE comment: every client library skips it."""
    progress = _Progress(event.state, event.stage, event.bytes_done, event.bytes_total, event.eta_s)
    return b": " + _encoder.encode(progress) + b"\n\n"


def error_event(error: SLLMError) -> bytes:
    """The last event of a stream that failed; no `[DONE]` follows it."""
    return b"data: " + error_body(error) + b"\n\n"


def typed_event(event: msgspec.Struct) -> bytes:
    """An event whose name is its struct's tag."""
    name = str(event.__struct_config__.tag).encode()
    return b"event: %b\ndata: %b\n\n" % (name, _encoder.encode(event))

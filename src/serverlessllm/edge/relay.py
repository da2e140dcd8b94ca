"""Pass an upstream's answer to the client, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from serverlessllm.edge.server import Headers, Request
from serverlessllm.edge.upstream import Response


class Relayed(msgspec.Struct, frozen=True):
    """How a relay ended."""

    ok: bool
    """Whether the whole answer was passed on."""
    body_bytes: int
    """Bytes of the body as they were on the wire, chunk framing included."""


async def relay(
    request: Request,
    response: Response,
    *,
    headers: Headers = (),
    error_event: bytes = b"",
    on_first_byte: Callable[[], None] | None = None,
    idle_timeout_s: float | None = None,
) -> Relayed:
    """Write the answer's head (hop-by-hop fields dropped, `headers` and `x-request-id` added;
    a `server-timing`, `openai-processing-ms` or `x-request-id` of the upstream is replaced) and
    its body to the client, never holding more than the write buffer's limit.

    When `request.started`, only the body is passed on, into the stream that has begun.
    When the upstream dies after the head: a `text/event-stream` that stands at the end of an
    event gets `error_event` (bytes such as `b'data: {"error": …}\\n\\n'`) and ends cleanly; any
    other answer is cut so that the truncation shows. Then `ok` is False and nothing is raised.
    No byte for `idle_timeout_s` while the client keeps up counts as the upstream's death.
    `on_first_byte` is called when the body's first byte is passed on.
    """
    raise NotImplementedError

"""Pass an upstream's answer to the client, byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serverlessllm.edge.link import BODY, CHUNKED, CLOSE, DONE, Link
from serverlessllm.edge.request import Request
from serverlessllm.edge.response import Decoder, Relayed, Response
from serverlessllm.edge.wire import (
    LAST_CHUNK,
    Headers,
    chunk,
    encode_headers,
    forwarded_head,
)


async def relay(
    request: Request,
    response: Response,
    *,
    headers: Headers = (),
    error_event: bytes = b"",
    on_first_byte: Callable[[], None] | None = None,
    idle_timeout_s: float | None = None,
) -> Relayed:
    """Pass the answer on: its head (hop-by-hop fields dropped, `headers` and `x-request-id` added;
    a `server-timing`, `openai-processing-ms` or `x-request-id` of the upstream is left out) and
    its body, never holding more than the write buffer's limit.

    When `request.started`, only the body is passed on, into the stream that has begun.
    The head goes out with the body's first byte: until then nothing is promised, and the
    upstream's death is raised, so that another upstream may be asked (also when
    `request.started`: the stream is still open then). After that, a `text/event-stream` that
    stands at the end of an event gets `error_event` (bytes such as
    `b'data: {"error": …}\\n\\n'`) and ends cleanly, any other answer is cut so that the
    truncation shows; `ok` is False and nothing is raised.
    No byte for `idle_timeout_s` while the client keeps up counts as the upstream's death.
    `on_first_byte` is called when the body's first byte is passed on.

    Raises:
        UpstreamError: the upstream died before anything of its answer was passed on.
    """
    link = response.link
    if relay_whole(request, link, headers=headers, on_first_byte=on_first_byte):
        return Relayed(ok=True, body_bytes=link.passed_bytes)
    passing = _Passing(request, response, encode_headers(headers), on_first_byte)
    passing.begin(idle_timeout_s)
    try:
        while link.state is BODY:
            await link.wait()
    except asyncio.CancelledError:
        # Either the client has gone, or a drain's grace is over and it can still be told.
        if request.connected and passing.begun:
            passing.end_dead(error_event)
        raise
    finally:
        passing.stop()
    if link.state is DONE:
        passing.end_whole()
        return Relayed(ok=True, body_bytes=link.passed_bytes)
    if not passing.begun and link.error is not None:
        raise link.error
    passing.end_dead(error_event)
    return Relayed(ok=False, body_bytes=link.passed_bytes, error=link.error)


def relay_whole(
    request: Request,
    link: Link,
    *,
    headers: Headers = (),
    on_first_byte: Callable[[], None] | None = None,
) -> bool:
    """Pass on the common short answer: all of it is here, and goes out in one write. False: it is
    not one of these, and nothing has been done."""
    if link.state is not DONE or request.started or not request.framed:
        return False
    kept = link.take()
    if on_first_byte is not None and kept:
        on_first_byte()
    if link.framing is CLOSE:
        body = b"".join(kept)
        head = forwarded_head(link.head, keep_framing=False)
        head += b"content-length: %d\r\n" % len(body)
    else:
        body = kept[0] if len(kept) == 1 else b"".join(kept)
        head = forwarded_head(link.head, keep_framing=True)
    if headers:
        head += encode_headers(headers)
    request.begin(head, b"" if request.method == "HEAD" else body)
    request.finished = True
    return True


class _Passing:
    """A body on its way: which framing it has on either side decides how each piece is sent."""

    def __init__(
        self,
        request: Request,
        response: Response,
        headers: bytes,
        on_first_byte: Callable[[], None] | None,
    ) -> None:
        self._request = request
        self._response = response
        self._link = response.link
        self._headers = headers
        self._on_first_byte = on_first_byte
        self._head_due = not request.started
        self._silent = request.method == "HEAD"
        self._chunked = self._goes_chunked()
        self._write: Callable[[bytes], object] = _drop
        self._send: Callable[[bytes], object] = _drop
        self.begun = False
        """Whether anything of the answer has been passed on."""

    def _goes_chunked(self) -> bool:
        """Whether the client gets chunks."""
        if not self._request.framed or self._silent:
            return False
        return not self._head_due or self._link.framing in {CHUNKED, CLOSE}

    def begin(self, idle_timeout_s: float | None) -> None:
        """Let the body flow."""
        link = self._link
        self._write = self._request.line.attach(link)
        if self._silent:
            self._send = _drop
        elif link.framing is CHUNKED and not self._chunked:
            self._send = Decoder(self._write).feed
        elif self._chunked and link.framing is not CHUNKED:
            self._send = self._send_chunk
        else:
            self._send = self._write
        link.watch(idle_timeout_s)
        link.attach(self._first)

    def _first(self, data: bytes) -> None:
        self._link.sink = self._send
        self._begin_answer()
        if self._on_first_byte is not None:
            self._on_first_byte()
        self._send(data)

    def _begin_answer(self) -> None:
        self.begun = True
        if self._head_due:
            self._head_due = False
            link = self._link
            verbatim = link.framing is not CLOSE and (self._chunked or link.framing is not CHUNKED)
            head = forwarded_head(link.head, keep_framing=verbatim)
            if self._chunked and not verbatim:
                head += b"transfer-encoding: chunked\r\n"
            self._request.begin(head + self._headers)

    def _send_chunk(self, data: bytes) -> None:
        self._write(chunk(data))

    def stop(self) -> None:
        """No more flows."""
        self._request.line.release(self._link)

    def end_whole(self) -> None:
        """The upstream's answer is complete."""
        if not self.begun:
            self._begin_answer()
        if self._chunked and self._link.framing is not CHUNKED:
            self._request.line.send(LAST_CHUNK)
        self._request.finished = True

    def end_dead(self, error_event: bytes) -> None:
        """The upstream's answer will not be completed: say so, or let the truncation show."""
        request = self._request
        kind = self._response.headers.get("content-type") or ""
        streams = self._chunked or not request.framed
        if (
            error_event
            and streams
            and kind.startswith("text/event-stream")
            and self._link.at_event_end()
        ):
            request.line.send(chunk(error_event) if self._chunked else error_event)
            if self._chunked:
                request.line.send(LAST_CHUNK)
            request.finished = True
        else:
            request.abort()


def _drop(_: bytes) -> None:
    """This answer has no body."""

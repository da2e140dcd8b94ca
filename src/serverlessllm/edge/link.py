"""One kept connection to an upstream: sends a request, tracks the framing of its answer."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, cast

import httptools

from serverlessllm.edge.errors import (
    UpstreamClosed,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamTimeout,
)
from serverlessllm.edge.states import Framing, LinkState
from serverlessllm.edge.steps import Steps, pause, stepping
from serverlessllm.edge.wire import LAST_CHUNK

if TYPE_CHECKING:
    from serverlessllm.edge.upstream import Pool

_framing: Final = re.compile(
    rb"\r\n(?:content-length:[ \t]*(\d+)|transfer-encoding:[ \t]*([^\r]*))", re.IGNORECASE
)
_event_ends: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
_EVENT_END: Final = b"\n\n\r\n"
"""Of an event that is a chunk's end, too: as most pieces of a stream end, and no trailers can."""
_last_chunk: Final = re.compile(
    rb"(?:\A|\n)0+(?:;[^\r\n]*)?\r\n((?:[!-9;-~]+:[^\r\n]*\r\n)*)\r\n\Z"
)
"""The end of a chunked body, trailers included, and nothing after it."""
_LAST_CHUNK_MAX: Final = 4096
"""Bytes of trailers that are looked through for it."""


# An enum's member costs more to look up than everything else done for a chunk.
IDLE: Final = LinkState.IDLE
HEAD: Final = LinkState.HEAD
BODY: Final = LinkState.BODY
DONE: Final = LinkState.DONE
DEAD: Final = LinkState.DEAD
NONE: Final = Framing.NONE
LENGTH: Final = Framing.LENGTH
CHUNKED: Final = Framing.CHUNKED
CLOSE: Final = Framing.CLOSE


def _drop(_: bytes) -> None:
    """Nobody wants it any more."""


class Link(asyncio.Protocol):
    """The parser sees every byte but has no body callback: framing costs no Python a chunk.

    The body goes to `sink` as it came from the wire; without one it is kept, up to a limit.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.limits = pool.settings
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self.state = IDLE
        self.framing = NONE
        self.head = b""
        """The answer's status line and headers, empty line included."""
        self.trailers = b""
        """The lines after the last chunk of a whole answer."""
        self.status = 0
        self.error: UpstreamError | None = None
        """Why the link is DEAD."""
        self.reusable = False
        self.untouched = True
        """Whether not one byte of an answer has come."""
        self.used = False
        """Whether it was kept after an answer: its peer may have closed it since."""
        self.passed_bytes = 0
        self.sink: Callable[[bytes], object] | None = None
        self.idle_since_s = math.inf
        """Not yet: a fresh connection is about to be used, and no sweep may take it for idle."""
        self.head_deadline_s: float | None = None
        self.idle_timeout_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._run: Steps | None = None
        """Who waits for the next change: a task by the future, or a handler without one."""
        self._whole = False
        self._begun = 0
        self._bodiless = False
        self._left = 0
        self._tail = b""
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._reading = True
        self._held = False
        self._seen_bytes = 0
        self._moved_s = 0.0

    # The transport's and the parser's events.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._pool.links.add(self)

    def data_received(self, data: bytes) -> None:
        if self.state is BODY:
            self._take_body(data)
            if self.sink is not None and self.state is BODY:
                return
        elif self.state is HEAD:
            self._take_head(data)
        else:
            # Bytes that nobody asked for: whatever they are, they answer no later request.
            self.abort()
        self._wake()

    def eof_received(self) -> None:
        self.reusable = False
        if self.state is IDLE:
            self._pool.lost(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.state is BODY and self.framing is CLOSE and exc is None:
            self.state = DONE
            self._wake()
        elif self.state is HEAD:
            self._die(UpstreamClosed("the backend closed the connection", before_head=True))
        elif self.state is BODY:
            self._die(UpstreamClosed("the backend died while it answered", before_head=False))
        self.reusable = False
        self._pool.lost(self)

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_message_complete(self) -> None:
        self._whole = True
        # Only here does the parser know; a moment later it has forgotten.
        self.reusable = self._parser.should_keep_alive()

    # A request.

    def send(self, request: bytes, deadline_s: float | None, *, bodiless: bool) -> None:
        """Write a request; `wait` tells when its answer's head has come."""
        self.state = HEAD
        self.head = self.trailers = b""
        self.untouched = True
        self.reusable = False
        self.passed_bytes = 0
        self._whole = False
        self._begun = 0
        self._bodiless = bodiless
        self._tail = b""
        self.head_deadline_s = deadline_s
        if self._transport.is_closing():  # its peer was quicker than the waiter it was given to
            self._die(UpstreamClosed("the backend closed the connection", before_head=True))
            return
        self._transport.write(request)

    def wait(self) -> Awaitable[None]:
        """To be awaited: the next change, which is the head, kept bytes, the end, death."""
        run = stepping()
        if run is not None:
            self._run = run
            return pause(run)
        waiter = self._waiter = self._pool.loop.create_future()
        return waiter

    def tell(self, run: Steps) -> None:
        """Let it be run on at the next change."""
        self._run = run

    def finish(self) -> None:
        """The exchange is over: give the connection back, or close it when it is not clean."""
        if self.state is DONE and self.reusable:
            self.used = True
            self.sink = None
            self.idle_timeout_s = None
            self.take()
            self.resume()
            self._pool.give_back(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once: the upstream sees that nobody wants its answer."""
        if self.state is not DEAD:
            self._pool.lost(self)
            self.untouched = False
            self.sink = _drop
            self._kept.clear()
            self._die(UpstreamClosed("the exchange was given up", before_head=self.state is HEAD))

    def fail(self, error: UpstreamError) -> None:
        """The upstream is known to be dead: whoever waits for its answer gets `error`."""
        if self.state is IDLE:
            self.abort()
        elif self.state is HEAD or self.state is BODY:
            self._die(error)

    def pause(self) -> None:
        """Stop reading until `resume`."""
        self._held = True
        self._set_reading(False)

    def resume(self) -> None:
        """Read again."""
        self._held = False
        self._set_reading(True)

    def detach(self) -> None:
        """The client has gone: hand over nothing more."""
        self.sink = _drop

    def attach(self, sink: Callable[[bytes], object]) -> None:
        """Hand over the body to `sink`: first what is kept, then as it comes."""
        self.sink = sink
        for data in self.take():
            sink(data)

    def take(self) -> list[bytes]:
        """What is kept of the body, raw."""
        kept = self._kept
        if kept:
            self._kept = []
            self._kept_bytes = 0
            if not self._held:
                self._set_reading(True)
        return kept

    # The answer.

    def _take_head(self, data: bytes) -> None:
        self.untouched = False
        data = self.head + data
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self.head = data
                if len(data) > self.limits.head_bytes_max:
                    self._die(UpstreamProtocolError("the backend's headers are too long"))
                return
            head = data[:end]
            if not head.startswith(b"HTTP/1."):  # the parser skips line breaks, clients may not
                self._die(UpstreamProtocolError("the backend's answer is not HTTP"))
                return
            try:
                self._feed(head)
            except httptools.HttpParserUpgrade:
                self._die(UpstreamProtocolError("the backend switched protocols unasked"))
                return
            except httptools.HttpParserError:
                self._die(UpstreamProtocolError("the backend's answer is not HTTP"))
                return
            data = data[end:]
            self.status = self._parser.get_status_code()
            if self.status >= 200:
                break
            self._whole = False
            self._begun = 0
            self.head = b""
            if not data:
                return
        self._head_came(head, data)

    def _head_came(self, head: bytes, rest: bytes) -> None:
        self.head = head
        self.state = BODY
        found = _framing.search(head)
        if self._whole or self._bodiless:
            self.framing = NONE
            self.reusable = self.reusable and self._whole and not rest
            self.state = DONE
        elif found is None:
            self.framing = CLOSE
        elif found[1] is not None:
            self.framing = LENGTH
            self._left = int(found[1])
            if len(rest) == self._left:
                self._take_whole(rest)
                return
        elif found[2].strip().lower() == b"chunked":
            self.framing = CHUNKED
        else:
            self._die(UpstreamProtocolError("the backend's transfer-encoding is not known"))
        if rest and self.state is BODY:
            self._take_body(rest)

    def _take_whole(self, body: bytes) -> None:
        """The common short answer: its body came with its head, and nothing after it."""
        try:
            self._feed(body)
        except httptools.HttpParserError:
            self._die(UpstreamProtocolError("the backend's answer is not HTTP"))
            return
        self.passed_bytes = len(body)
        self._kept.append(body)
        self._kept_bytes = len(body)
        self.state = DONE

    def _take_body(self, data: bytes) -> None:
        if self.framing is not CLOSE:
            if self.framing is LENGTH:
                self._left -= len(data)
                if self._left < 0:
                    data = data[: self._left]
            try:
                self._feed(data)
            except httptools.HttpParserError:
                self._die(UpstreamProtocolError("the backend's answer is not HTTP"))
                return
            if self._whole and not self._ends_exactly(data):
                return
        self.passed_bytes += len(data)
        ends = data.endswith(_EVENT_END) or len(data) >= _LAST_CHUNK_MAX
        # Else the last chunk and its trailers may come in any number of pieces.
        self._tail = data if ends else (self._tail + data)[-_LAST_CHUNK_MAX:]
        if self.sink is not None:
            self.sink(data)
        else:
            self._kept.append(data)
            self._kept_bytes += len(data)
            if self._kept_bytes > self.limits.buffer_bytes_max:
                self._set_reading(False)
        if self._whole:
            self.state = DONE

    def _ends_exactly(self, data: bytes) -> bool:
        """Whether `data` ends where the answer does; what follows could pass for another one."""
        if self.framing is LENGTH:
            if self._left < 0:
                self.reusable = False
            return True
        end = _last_chunk.search((self._tail + data)[-_LAST_CHUNK_MAX:])
        if self._begun > 1 or end is None:
            self._die(UpstreamProtocolError("the backend sent more than its answer"))
            return False
        self.trailers = end[1]
        return True

    def _die(self, error: UpstreamError) -> None:
        self.state = DEAD
        self.error = error
        self.reusable = False
        self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        """Tell who waits. A handler without a task runs on at once: the last thing to do."""
        run = self._run
        if run is not None:
            self._run = None
            run.step()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def at_event_end(self) -> bool:
        """Whether what was passed on of a dead link ends with a whole event (in a whole chunk).

        The parser is asked by feeding it the last chunk: only between two chunks is that the
        end of the body.
        """
        if isinstance(self.error, UpstreamProtocolError):
            return False  # the parser has seen more than was passed on
        tail = self._tail
        if self.framing is CHUNKED:
            self._whole = False
            try:
                self._feed(LAST_CHUNK)
            except httptools.HttpParserError:
                return False
            if not self._whole or not tail.endswith(b"\r\n"):
                return False
            tail = tail[:-2]
        return tail.endswith(_event_ends)

    def sweep(self, now_s: float) -> None:
        """Look at this link's deadlines."""
        if self.state is HEAD:
            if self.head_deadline_s is not None and now_s >= self.head_deadline_s:
                self._die(UpstreamTimeout("the backend did not answer in time"))
        elif self.state is BODY and self.idle_timeout_s is not None:
            if self.passed_bytes != self._seen_bytes or not self._reading:
                self._seen_bytes = self.passed_bytes
                self._moved_s = now_s
            elif now_s - self._moved_s >= self.idle_timeout_s:
                self._die(UpstreamTimeout("the backend's answer has stalled"))

    def watch(self, idle_timeout_s: float | None) -> None:
        """From now on, no byte for so long is the answer's death."""
        self.idle_timeout_s = idle_timeout_s
        self._seen_bytes = self.passed_bytes
        self._moved_s = self._pool.now_s

    def _set_reading(self, reading: bool) -> None:
        if reading is not self._reading and not self._transport.is_closing():
            self._reading = reading
            if reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

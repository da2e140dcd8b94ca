"""One request and the way to answer it."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import Callable
from typing import Final, Protocol

from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import RequestId
from serverlessllm.edge.wire import (
    BODILESS,
    LAST_CHUNK,
    Headers,
    chunk,
    encode_headers,
    status_line,
)

_safe_id: Final = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_id_prefix: Final = f"req-{os.urandom(6).hex()}-".encode()
"""Of this process; a count makes an id unique inside it, and costs nothing."""
_count: Final = itertools.count(1)


class RequestHeaders:
    """Header fields by lower-case name; of a repeated one the last."""

    __slots__ = ("_asked", "fields", "reading")

    def __init__(self, fields: dict[bytes, bytes]) -> None:
        self.fields = fields
        """As they came."""
        self.reading: object = None
        """What a handler made of them; a connection's next request may have the same."""
        self._asked: dict[str, str | None] = {}

    def get(self, name: str) -> str | None:
        """The value of `name` (write it in lower case)."""
        try:
            return self._asked[name]
        except KeyError:
            value = self.fields.get(name.encode())
            text = self._asked[name] = None if value is None else value.decode("latin-1")
            return text

    def items(self) -> list[tuple[str, str]]:
        """All of them, names in lower case."""
        return [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in self.fields.items()
        ]


class Source(Protocol):
    """An upstream whose answer flows straight into a client's connection."""

    passed_bytes: int
    """Handed over so far."""

    def pause(self) -> None:
        """The client is full."""
        ...

    def resume(self) -> None:
        """The client has room."""
        ...

    def detach(self) -> None:
        """The client has gone: hand over nothing more."""
        ...


class Line(Protocol):
    """What a request needs of its connection."""

    @property
    def lost(self) -> bool:
        """Whether the client has gone."""
        ...

    def send(self, data: bytes) -> None:
        """Write, without waiting."""
        ...

    async def room(self) -> None:
        """Wait until the client has taken enough."""
        ...

    def will_close(self) -> bool:
        """Whether the connection ends with the answer that starts now."""
        ...

    def own_headers(self, request: Request) -> bytes:
        """Header lines that the owner puts on each answer."""
        ...

    def cut(self) -> None:
        """Close at once, whatever is unsent."""
        ...

    def attach(self, source: Source) -> Callable[[bytes], None]:
        """Let `source`, told when to pause, write through what is returned."""
        ...

    def release(self, source: Source) -> None:
        """`source` writes no more."""
        ...


class Request:
    """One HTTP message and the way to answer it. Each answer carries `x-request-id`.

    `state` and `caller` (who asks) are the handler's: what it wants to find again in
    `answer_headers`.
    """

    # Defaults live on the class: a request is made for every message, and most keep them.
    refusal: SLLMError | None = None
    """Why the handler never sees this request."""
    state: object = None
    caller: object = None
    ready = False
    """Whether the handler may start: the message is whole, or it awaits the rest itself."""
    judged = False
    """Whether its head was looked at, as its body is still to come."""
    framed = True
    """Whether the client understands chunks; HTTP/1.0 reads until the connection closes."""
    started = False
    """Whether the answer's head has been written."""
    finished = False
    """Whether the answer has ended."""
    status = 0
    """Of the answer that a handler has begun; one that is relayed has its own."""
    _whole = False
    _body = b""
    _pieces: bytearray | None = None
    """A body that came in several, however many: a list of single bytes would be thirty times as
    long, and joined for a fifth of a second."""
    _broken: SLLMError | None = None
    _waiter: asyncio.Future[None] | None = None

    def __init__(
        self,
        line: Line,
        method: str,
        path: str,
        query: str,
        headers: RequestHeaders,
        arrived_s: float,
        keep_alive: bool,
    ) -> None:
        self.line = line
        self.method = method
        self.path = path
        """As sent (percent escapes kept), without the query."""
        self.query = query
        """Without `?`; empty when there is none."""
        self.headers = headers
        self.arrived_s = arrived_s
        """When the headers were complete, on the edge's clock."""
        self.keep_alive = keep_alive
        """Whether the connection outlives the answer."""
        given = headers.fields.get(b"x-request-id")
        self.id_bytes = (
            given
            if given is not None and _safe_id.fullmatch(given)
            else b"%b%x" % (_id_prefix, next(_count))
        )
        """`id`, as it is sent."""

    # What a handler uses.

    @property
    def id(self) -> RequestId:
        """The client's own `x-request-id` if it is a safe one, else ours."""
        return RequestId(self.id_bytes.decode())

    @property
    def connected(self) -> bool:
        """Whether the client is still there."""
        return not self.line.lost

    @property
    def whole(self) -> bytes | None:
        """The whole body if it is here."""
        return self._body if self._whole and self._pieces is None else None

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            RequestTooLarge, RequestTimeout, InvalidRequest: too long, too slow, bad framing.
        """
        if not self._whole and self._broken is None:
            if self.framed and not self.started and self.headers.get("expect") is not None:
                self.line.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._broken is not None:
            raise self._broken
        if self._pieces is not None:
            self._body = bytes(self._pieces)
            self._pieces = None
        return self._body

    def respond(self, status: int, headers: Headers = (), body: bytes = b"") -> None:
        """A whole answer at once; `content-length` is added."""
        self.status = status
        length = b"" if status in BODILESS else b"content-length: %d\r\n" % len(body)
        head = status_line(status) + encode_headers(headers) + length
        if self.method == "HEAD" or status in BODILESS:
            body = b""
        self.begin(head, body)
        self.finished = True

    def start(self, status: int, headers: Headers = ()) -> None:
        """Begin a streamed answer (chunked; until close for HTTP/1.0)."""
        self.status = status
        framing = b"transfer-encoding: chunked\r\n" if self.framed else b""
        self.begin(status_line(status) + encode_headers(headers) + framing)

    async def write(self, data: bytes) -> None:
        """One piece of a streamed answer; returns when the client has room for more."""
        self._send(data)
        await self.line.room()

    def end(self, data: bytes) -> None:
        """The last piece of a streamed answer, and its end."""
        if not self.finished:
            self._send(data)
            self.finish()

    def finish(self, trailers: Headers = ()) -> None:
        """End a streamed answer cleanly; HTTP/1.0 has no place for `trailers`."""
        if self.finished:
            return
        if self.framed and self.method != "HEAD":
            end = b"0\r\n%b\r\n" % encode_headers(trailers) if trailers else LAST_CHUNK
            self.line.send(end)
        self.finished = True

    def abort(self) -> None:
        """Cut the connection so that the client sees the answer is truncated."""
        self.finished = True
        self.line.cut()

    def _send(self, data: bytes) -> None:
        if data and self.method != "HEAD":
            self.line.send(chunk(data) if self.framed else data)

    # What the connection and the relay use.

    def begin(self, head: bytes, body: bytes = b"") -> None:
        """Send an answer's head: `head` plus the fields that every answer has."""
        if self.started:
            raise RuntimeError(f"{self.method} {self.path}: answered twice")
        self.started = True
        line = self.line
        if line.will_close():
            self.keep_alive = False
        end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        own = line.own_headers(self)
        line.send(b"".join((head, b"x-request-id: ", self.id_bytes, b"\r\n", own, end, body)))

    def take(self, data: bytes) -> None:
        """A piece of the body has come."""
        if self._pieces is not None:
            self._pieces += data
        elif self._body:
            self._pieces = bytearray(self._body)
            self._pieces += data
        else:
            self._body = data

    def take_whole(self, body: bytes) -> None:
        """The body, at once."""
        self._body = body
        self._whole = self.ready = True

    def received(self) -> None:
        """The body is whole."""
        self._whole = self.ready = True
        if self._waiter is not None:
            self._wake()

    def broken(self, error: SLLMError) -> None:
        """The body will not come."""
        self._broken = error
        self.ready = True
        self._body = b""
        self._pieces = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

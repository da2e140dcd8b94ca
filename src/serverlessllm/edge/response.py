"""An upstream's answer, for whoever reads it rather than relaying it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httptools
import msgspec

from serverlessllm.core.units import MIB
from serverlessllm.edge.errors import UpstreamError, UpstreamProtocolError
from serverlessllm.edge.link import CHUNKED, DONE, Link


class ResponseHeaders:
    """Header fields of an answer by lower-case name; of a repeated one the last.

    Looked up in the raw head: most answers are relayed after a question or two.
    """

    __slots__ = ("_head", "_lower")

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._lower = head.lower()

    def get(self, name: str) -> str | None:
        """The value of `name` (write it in lower case)."""
        key = f"\r\n{name}:".encode()
        found = self._lower.rfind(key)
        if found < 0:
            return None
        start = found + len(key)
        return self._head[start : self._head.index(b"\r", start)].decode("latin-1").strip()


class Decoder:
    """Takes the chunk framing off a body; `feed` raises `httptools.HttpParserError`."""

    __slots__ = ("feed", "on_body")

    def __init__(self, take: Callable[[bytes], object]) -> None:
        self.on_body = take
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        self.feed: Callable[[bytes], None] = parser.feed_data


class Relayed(msgspec.Struct, frozen=True):
    """How a relay ended."""

    ok: bool
    """Whether the whole answer was passed on."""
    body_bytes: int
    """Bytes of the body as the upstream sent them, chunk framing included."""
    error: UpstreamError | None = None
    """What ended it otherwise."""


class Response:
    """An answer whose head has come: read it, take its lines, or give it to `relay`."""

    __slots__ = ("_headers", "link", "status")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.status = link.status
        self._headers: ResponseHeaders | None = None

    @property
    def headers(self) -> ResponseHeaders:
        """The answer's header fields; most answers are relayed without a look at them."""
        if self._headers is None:
            self._headers = ResponseHeaders(self.link.head)
        return self._headers

    async def read(self, max_bytes: int = MIB) -> bytes:
        """The whole body, de-chunked.

        Raises:
            UpstreamProtocolError: it is longer than `max_bytes`.
            UpstreamClosed, UpstreamTimeout: the connection ended, or stalled, first.
        """
        pieces: list[bytes] = []
        size = 0
        async for piece in self._pieces():
            size += len(piece)
            if size > max_bytes:
                raise UpstreamProtocolError(
                    f"the backend's answer is longer than {max_bytes} bytes"
                )
            pieces.append(piece)
        return b"".join(pieces)

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines as they come, without their ends (`\\n` or `\\r\\n`).

        Raises:
            UpstreamProtocolError: a line is longer than `line_bytes_max`.
            UpstreamClosed, UpstreamTimeout: the connection ended, or stalled, first.
        """
        line_bytes_max = self.link.limits.line_bytes_max
        rest = b""
        async for piece in self._pieces():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > line_bytes_max:
                raise UpstreamProtocolError("a line of the backend's answer is too long")
            for line in lines:
                yield line.removesuffix(b"\r")
        if rest:
            yield rest

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The body without its framing, piece by piece as it comes."""
        link = self.link
        decoded: list[bytes] = []
        decoder = Decoder(decoded.append) if link.framing is CHUNKED else None
        while True:
            kept = link.take()
            if decoder is None:
                decoded += kept
            else:
                for data in kept:
                    decoder.feed(data)
            for piece in decoded:
                yield piece
            decoded.clear()
            if kept:
                continue
            if link.state is DONE:
                return
            if link.error is not None:
                raise link.error
            await link.wait()

"""One client's connection: reads requests, runs their handlers in turn, notices departure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import httptools
import structlog

from serverlessllm.core.errors import (
    Draining,
    HeadersTooLarge,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    SLLMError,
    Unavailable,
)
from serverlessllm.edge.request import Request, Source

if TYPE_CHECKING:
    from serverlessllm.edge.server import EdgeServer

_log = structlog.get_logger(__name__)

_METHODS = {name: name.decode() for name in (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD")}
_SCHEMES = (b"http", b"https")


class _Refused(Exception):
    """Raised through the parser to stop it; carries what to answer."""

    def __init__(self, error: SLLMError) -> None:
        super().__init__()
        self.error = error


def _origin_form(url: bytes) -> bytes:
    """The path of an absolute URL; anything else that is no path is left as it is."""
    scheme, found, rest = url.partition(b"://")
    return b"/" + rest.partition(b"/")[2] if found and scheme.lower() in _SCHEMES else url


class Connection(asyncio.Protocol):
    """Reads ahead at most `pipeline_max` requests; answers them in order, one task each."""

    def __init__(self, server: EdgeServer) -> None:
        self._server = server
        self._settings = server.settings
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self.lost = False
        # Receiving.
        self._url = b""
        self._fields: dict[bytes, bytes] = {}
        self._receiving: Request | None = None
        self._in_head = False
        self._head_bytes = 0
        self._body_bytes = 0
        self._framing_bytes = 0
        self._since_s = server.sweeper.now_s
        self._deaf = False
        self._reading = True
        self._upgrading = False
        self._resuming = False
        # Answering.
        self._active: Request | None = None
        self._queue: deque[Request] = deque()
        self.task: asyncio.Task[None] | None = None
        self._lingering = False
        # Sending.
        self._full = False
        self._room: asyncio.Future[None] | None = None
        self._source: Source | None = None
        self._sent_bytes = 0
        self._flushed_bytes = 0
        self._flushed_s = 0.0

    # The transport's events.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        high = self._settings.write_buffer_bytes_max
        self._transport.set_write_buffer_limits(high=high, low=high // 4)
        open_connections = self._server.admit(self)
        spare = open_connections - self._settings.connections_max
        if spare > self._settings.backlog:
            self._transport.abort()  # too many even to be told so
        elif spare > 0:
            self._refuse(Unavailable("too many connections; try again", retry_after_s=1.0))

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        size = len(data)
        if self._receiving is not None:
            self._framing_bytes += size
        elif not self._in_head:
            self._in_head = True
            self._head_bytes = size
            self._since_s = self._server.sweeper.now_s
        else:
            self._head_bytes += size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            self._stop_reading(error)
            return
        if self._in_head and self._head_bytes > self._settings.header_bytes_max:
            self._refuse(HeadersTooLarge("the request's headers are too long"))
        elif self._framing_bytes > self._settings.header_bytes_max and self._receiving is not None:
            self._refuse(InvalidRequest("the body's framing is longer than the body"))

    def eof_received(self) -> None:
        # A FIN is the only sign of a departed client: nothing may be kept open for it. What is
        # answered and only unsent still goes out.
        if self._active is not None:
            self._leave()
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's
        self.lost = True
        self._leave()
        self._wake()
        self._server.forget(self)

    def pause_writing(self) -> None:
        self._full = True
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        self._full = False
        if self._source is not None:
            self._source.resume()
        self._wake()

    # The parser's events.

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        fields = self._fields
        self._fields = {}
        if self._resuming:
            self._resuming = False
            return
        url = self._url
        self._url = b""
        self._in_head = False
        parser = self._parser
        keep_alive = parser.should_keep_alive()
        version = "1.1"
        if not keep_alive or b"connection" in fields:
            version = parser.get_http_version()
        framed = version == "1.1"
        path, _, query = url.partition(b"?")
        if not path.startswith(b"/"):
            path = _origin_form(path)
        method = parser.get_method()
        request = Request(
            self,
            _METHODS.get(method) or method.decode(),
            path.decode(),
            query.decode(),
            fields,
            self._server.clock.now_s(),
            keep_alive=keep_alive and framed,
            framed=framed,
        )
        request.refusal = self._refusal(fields, url, version)
        self._receiving = request
        self._body_bytes = 0
        self._framing_bytes = 0
        self._since_s = self._server.sweeper.now_s
        self._enqueue(request)
        if request.refusal is not None:
            raise _Refused(request.refusal)

    def on_body(self, data: bytes) -> None:
        self._framing_bytes = 0
        self._body_bytes += len(data)
        if self._body_bytes > self._settings.body_bytes_max:
            raise _Refused(RequestTooLarge(self._too_large()))
        cast("Request", self._receiving).take(data)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        request = cast("Request", self._receiving)
        self._receiving = None
        if self._fields:
            self._fields = {}  # trailers
        request.received()

    # Receiving.

    def _too_large(self) -> str:
        return f"the body is longer than {self._settings.body_bytes_max} bytes"

    def _refusal(self, fields: dict[bytes, bytes], url: bytes, version: str) -> SLLMError | None:
        """Why a request with this head is not even given to the handler."""
        settings = self._settings
        if self._head_bytes > settings.header_bytes_max:
            # The head may share its packet with a body: only then is it worth counting.
            size = len(url) + sum(map(len, fields)) + sum(map(len, fields.values()))
            if size > settings.header_bytes_max:
                return HeadersTooLarge("the request's headers are too long")
        if len(fields) > settings.headers_max:
            return HeadersTooLarge("the request has too many headers")
        if version == "1.1":
            if b"host" not in fields:
                return InvalidRequest("the request has no Host header")
        elif version != "1.0" or b"transfer-encoding" in fields:
            return InvalidRequest(f"HTTP/{version} is not spoken here in this way")
        if fields.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            return InvalidRequest("this transfer-encoding is not spoken here")
        if int(fields.get(b"content-length", 0)) > settings.body_bytes_max:
            return RequestTooLarge(self._too_large())
        if b"upgrade" in fields:
            self._upgrading = self._parser.should_upgrade()
        return None

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read on as if no upgrade had been asked for: the parser skips the body of such a
        request (and some HTTP clients offer h2c with every POST), so a new one takes over."""
        self._upgrading = False
        request = self._receiving
        if request is None or self._deaf:
            return
        if request.method == "CONNECT":
            self._refuse(InvalidRequest("CONNECT is not spoken here"))
            return
        length = request.headers.get("content-length")
        framing = f"content-length: {length or 0}"
        if request.headers.get("transfer-encoding") is not None:
            framing = "transfer-encoding: chunked"
        self._parser = httptools.HttpRequestParser(self)
        self._resuming = True
        self._parser.feed_data(f"POST / HTTP/1.1\r\n{framing}\r\n\r\n".encode())
        self._url = b""
        if rest:
            self.data_received(rest)

    def _stop_reading(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if isinstance(cause, _Refused):
            self._refuse(cause.error)
        elif isinstance(error, httptools.HttpParserCallbackError) and cause is not None:
            raise cause
        elif self._active is not None and self._receiving is None and not self._last.keep_alive:
            self._deaf = True  # bytes after `Connection: close`
        else:
            self._refuse(InvalidRequest(f"the request is not HTTP: {error}"))

    @property
    def _last(self) -> Request:
        """The request read last."""
        return self._queue[-1] if self._queue else cast("Request", self._active)

    def _refuse(self, error: SLLMError) -> None:
        """Take no more of what the client sends; answer `error` when its turn comes."""
        self._deaf = True
        self._in_head = False
        if self._receiving is not None:
            self._receiving.keep_alive = False
            self._receiving.broken(error)
            return
        now_s = self._server.clock.now_s()
        request = Request(self, "", "", "", {}, now_s, keep_alive=False, framed=True)
        request.refusal = error
        self._enqueue(request)

    # Answering.

    def _enqueue(self, request: Request) -> None:
        if self._active is None:
            self._begin(request)
            return
        self._queue.append(request)
        waiting = len(self._queue)
        if waiting >= self._settings.pipeline_max:
            if waiting > 8 * self._settings.pipeline_max and not self._deaf:
                raise _Refused(InvalidRequest("too many requests at once on one connection"))
            self._pause_reading()

    def _begin(self, request: Request) -> None:
        self._active = request
        self.task = self._server.loop.create_task(self._run(request))

    async def _run(self, request: Request) -> None:
        """The boundary of a request: whatever goes wrong in it ends here."""
        try:
            if request.refusal is not None:
                raise request.refusal
            await self._server.handler(request)
            if not request.finished:
                raise RuntimeError(f"{request.method} {request.path}: the handler did not answer")
        except SLLMError as error:
            self._fail(request, error)
        except asyncio.CancelledError:
            self._fail(request, Draining("this server is shutting down", retry_after_s=1.0))
            raise
        except Exception:  # noqa: BLE001 - the boundary of a request
            _log.exception("request failed", request_id=request.id, path=request.path)
            self._fail(request, SLLMError())
        self._answered(request)

    def _fail(self, request: Request, error: SLLMError) -> None:
        if self.lost or request.finished:
            return
        if request.started:
            request.abort()
        else:
            request.respond(*self._server.render_error(error))

    def _answered(self, request: Request) -> None:
        self._active = None
        self.task = None
        if self.lost or self._transport.is_closing():
            return
        if self._receiving is request or (self._deaf and not self._queue):
            self._linger()
        elif not request.keep_alive:
            self._transport.close()
        elif self._queue:
            self._begin(self._queue.popleft())
            if not self._reading and len(self._queue) < self._settings.pipeline_max:
                self._reading = True
                self._transport.resume_reading()
        else:
            self._since_s = self._server.sweeper.now_s
            if self._server.stopping:
                self._transport.close()

    def _linger(self) -> None:
        """Close so that the client reads the answer: a close on unread bytes would reset it."""
        self._deaf = True
        self._lingering = True
        self._receiving = None
        self._since_s = self._server.clock.now_s()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    def _leave(self) -> None:
        """The client has gone: whatever was under way for it ends."""
        self._queue.clear()
        self._deaf = True
        if self._source is not None:
            self._source.detach()
        if self.task is not None:
            self.task.cancel()
            self._server.adopt(self.task)
            self.task = None

    def _pause_reading(self) -> None:
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    # Sending (`request.Line`).

    def send(self, data: bytes) -> None:
        if not self.lost:
            self._sent_bytes += len(data)
            self._transport.write(data)

    async def room(self) -> None:
        while self._full and not self.lost:
            self._room = self._server.loop.create_future()
            await self._room

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def will_close(self) -> bool:
        return (
            self._server.stopping
            or self._receiving is self._active
            or (self._deaf and not self._queue)
        )

    def own_headers(self, request: Request) -> bytes:
        return self._server.answer_headers(request)

    def cut(self) -> None:
        if not self.lost:
            self._transport.abort()

    def attach(self, source: Source) -> Callable[[bytes], None]:
        self._source = source
        if self._full:
            source.pause()
        return self._transport.write

    def release(self, source: Source) -> None:
        self._source = None
        self._sent_bytes += source.passed_bytes

    # Deadlines.

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return self._active is None and not self._in_head and not self._lingering

    def close(self) -> None:
        """Close once everything written has gone out."""
        self._transport.close()

    def interrupt(self) -> None:
        """Cancel the handler while its client is still there, then close."""
        task = self.task
        if task is None:
            self._transport.close()
            return
        self.task = None
        self._queue.clear()
        self._deaf = True
        task.cancel()
        self._server.adopt(task)
        task.add_done_callback(lambda _: self._transport.close())

    def sweep(self, now_s: float) -> None:
        """Look at every deadline of this connection."""
        settings = self._settings
        age_s = now_s - self._since_s
        if self._stalled(now_s):
            self._transport.abort()
        elif self._lingering:
            if age_s >= settings.swallow_s:
                self._transport.abort()
        elif self._receiving is not None and not self._deaf:
            judged_s = age_s - settings.body_rate_grace_s
            if age_s >= settings.body_timeout_s or (
                judged_s > 0 and self._body_bytes < judged_s * settings.body_rate_min_bytes_s
            ):
                self._refuse(RequestTimeout("the body did not arrive in time"))
        elif self._in_head:
            if age_s >= settings.header_timeout_s:
                self._refuse(RequestTimeout("the request's headers did not arrive in time"))
        elif self._active is None and age_s >= settings.idle_timeout_s:
            self._transport.close()

    def _stalled(self, now_s: float) -> bool:
        """Whether the client has taken none of its waiting bytes for too long."""
        waiting_bytes = self._transport.get_write_buffer_size()
        passed_bytes = 0 if self._source is None else self._source.passed_bytes
        flushed_bytes = self._sent_bytes + passed_bytes - waiting_bytes
        if not waiting_bytes or flushed_bytes != self._flushed_bytes:
            self._flushed_bytes = flushed_bytes
            self._flushed_s = now_s
            return False
        return now_s - self._flushed_s >= self._settings.write_stall_timeout_s

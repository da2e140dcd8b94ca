"""Read requests off a connection, within the limits and deadlines of their receipt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

from serverlessllm.core.errors import (
    HeadersTooLarge,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    SLLMError,
)
from serverlessllm.core.units import KIB
from serverlessllm.edge.known import KnownHead, learn
from serverlessllm.edge.limits import Sweeper
from serverlessllm.edge.request import Line, Request, RequestHeaders
from serverlessllm.edge.settings import EdgeSettings

_METHODS: Final = {name: name.decode() for name in (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD")}
_SCHEMES: Final = (b"http", b"https")
_TARGETS_MAX: Final = 1024
"""Targets remembered as their parts: clients ask for few paths, again and again."""
_TARGET_BYTES_MAX: Final = 256
"""A longer one is not remembered."""
_targets: Final[dict[bytes, tuple[str, str]]] = {}
_PECULIAR: Final = frozenset((b"transfer-encoding", b"expect", b"upgrade"))
"""Fields that say more of a request's framing than its length does."""
_SINGLE: Final = frozenset((b"host", b"authorization", b"x-api-key"))
"""Fields that decide who is asked by whom: of two, somebody before us may have read the other."""
_SLICE_BYTES: Final = 32 * KIB
"""What the parser gets at once: limits are looked at in between, however much one read holds."""
_SHORT_BYTES: Final = 64 * KIB
"""The handler starts when a body of this size is here; a longer one it awaits itself, so that it
may be refused before it has come."""


class Inbox(Line, Protocol):
    """The connection whose requests these are."""

    def enqueue(self, request: Request) -> None:
        """A request's head has come."""
        ...

    def closing_after_last(self) -> bool:
        """Whether the request that came last is the last that is answered."""
        ...


class _Refused(Exception):
    """Raised through the parser to stop it; carries what to answer."""

    def __init__(self, error: SLLMError) -> None:
        super().__init__()
        self.error = error


def _split_target(target: bytes) -> tuple[str, str]:
    """Path and query; the path of an absolute URL, or what is no path at all, as it is."""
    path, _, query = target.partition(b"?")
    if not path.startswith(b"/"):
        scheme, found, rest = path.partition(b"://")
        if found and scheme.lower() in _SCHEMES:
            path = b"/" + rest.partition(b"/")[2]
    parts = path.decode(), query.decode()
    if len(target) <= _TARGET_BYTES_MAX:
        if len(_targets) >= _TARGETS_MAX:
            _targets.clear()
        _targets[target] = parts
    return parts


def _length(fields: dict[bytes, bytes]) -> int:
    """Of the body; the parser has seen to it that it is a number, with as many zeros before it as
    its client liked."""
    return int(fields[b"content-length"].lstrip(b"0") or 0)


class Receiver:
    """The parser's callbacks of one connection: each head becomes a request at once, its body
    follows. What cannot be a request is refused, and nothing after it is read."""

    def __init__(
        self, inbox: Inbox, settings: EdgeSettings, sweeper: Sweeper, now_s: Callable[[], float]
    ) -> None:
        self._inbox = inbox
        self._settings = settings
        self._sweeper = sweeper
        self._now_s = now_s
        self._parser = httptools.HttpRequestParser(self)
        self.receiving: Request | None = None
        """Its head is here, its body is not whole."""
        self.deaf = False
        """Whether what still comes is thrown away."""
        self.pieces = 0
        """Of bodies: each costs as much as many bytes."""
        self.in_head = False
        self.since_s = self._sweeper.now_s
        """When the head, the body or the idle time that is under way began."""
        self._url = b""
        self._fields: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body_bytes = 0
        self._framing_bytes = 0
        self._upgrading = False
        self._resuming = False
        self._twice = b""
        """A field of the head that may be there only once, and is not."""
        self._heads = 0
        """That what is being parsed has completed."""
        self._known: KnownHead | None = None
        self._common: Request | None = None
        """The latest request, if a head like its own may be known by its bytes."""
        self._left_bytes = 0
        """Of a body whose head was known: still to come."""

    def feed(self, data: bytes) -> None:
        """Bytes of the client."""
        if self.deaf:
            return
        if self.receiving is not None:
            if self._left_bytes:
                self._take_rest(data)
                return
        elif not self.in_head and self._known is not None and self._take_known(self._known, data):
            return
        if len(data) <= _SLICE_BYTES:
            self._parse(data)
            return
        for start in range(0, len(data), _SLICE_BYTES):
            self.feed(data[start : start + _SLICE_BYTES])

    def _parse(self, data: bytes) -> None:
        fresh = False
        if self.receiving is not None:
            self._framing_bytes += len(data)
        elif self.in_head:
            self._head_bytes += len(data)
        else:
            fresh = self.in_head = True
            self._head_bytes = len(data)
            self.since_s = self._sweeper.now_s
        self._heads = 0
        rest = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self._stop(error)
            return
        if rest is not None:  # not inside of the `except`: errors carry what was raised before
            self._ignore_upgrade(rest)
            return
        request, self._common = self._common, None
        if fresh and request is not None:
            self._known = learn(data, request.method, request.path, request.query, request.headers)
        most = self._settings.header_bytes_max
        if self.in_head and self._head_bytes > most:
            self.refuse(HeadersTooLarge("the request's headers are too long"))
        elif self._framing_bytes > most and self.receiving is not None:
            self.refuse(InvalidRequest("the body's framing is longer than the body"))

    def _take_known(self, known: KnownHead, data: bytes) -> bool:
        """Take a request whose head is `known`; False: the parser must look."""
        found = known.match(data)
        if found is None:
            return False
        end, length = found
        spare = len(data) - end - length
        if spare > 0 or not 0 < length <= _SHORT_BYTES or length > self._settings.body_bytes_max:
            return False
        request = Request(
            self._inbox,
            known.method,
            known.path,
            known.query,
            known.headers,
            self._now_s(),
            True,
        )
        if spare == 0:
            request.take_whole(data[end:])
            self.since_s = self._sweeper.now_s
        else:
            self.receiving = request
            self._left_bytes = -spare
            self._body_bytes = self._framing_bytes = 0
            self.since_s = self._sweeper.now_s
            if end < len(data):
                self._body_bytes = len(data) - end
                request.take(data[end:])
        self._inbox.enqueue(request)
        return True

    def _take_rest(self, data: bytes) -> None:
        """More of a body whose head was known."""
        request = cast("Request", self.receiving)
        body = data[: self._left_bytes]
        request.take(body)
        self._body_bytes += len(body)
        self._left_bytes -= len(body)
        if not self._left_bytes:
            self.receiving = None
            request.received()
            if len(body) < len(data):
                self.feed(data[len(body) :])

    def refuse(self, error: SLLMError) -> None:
        """Take no more of what the client sends; answer `error` when its turn comes."""
        self.deaf = True
        self.in_head = False
        if self.receiving is not None:
            self.receiving.keep_alive = False
            self.receiving.broken(error)
            return
        nothing = RequestHeaders({})
        request = Request(self._inbox, "", "", "", nothing, self._now_s(), False)
        request.refusal = error
        request.ready = True
        self._inbox.enqueue(request)

    def sweep(self, now_s: float) -> bool:
        """Refuse what has not come in time; whether there was something."""
        settings = self._settings
        age_s = now_s - self.since_s
        if self.deaf:
            return False
        if self.receiving is not None:
            judged_s = age_s - settings.body_rate_grace_s
            if age_s >= settings.body_timeout_s or (
                judged_s > 0 and self._body_bytes < judged_s * settings.body_rate_min_bytes_s
            ):
                self.refuse(RequestTimeout("the body did not arrive in time"))
                return True
        elif self.in_head and age_s >= settings.header_timeout_s:
            self.refuse(RequestTimeout("the request's headers did not arrive in time"))
            return True
        return False

    # The parser's events.

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._fields.setdefault(name.lower(), value) is not value:
            self._repeat(name.lower(), value)

    def _repeat(self, name: bytes, value: bytes) -> None:
        """A field that was there before: the last one counts, where two can be."""
        self._fields[name] = value
        if name in _SINGLE and not self._resuming and self.receiving is None:
            self._twice = name

    def on_headers_complete(self) -> None:
        fields = self._fields
        self._fields = {}
        if self._resuming:
            self._resuming = False
            return
        url = self._url
        self._url = b""
        self.in_head = False
        parser = self._parser
        keep_alive = parser.should_keep_alive()
        version = "1.1"
        if not keep_alive or b"connection" in fields:
            version = parser.get_http_version()
        path, query = _targets.get(url) or _split_target(url)
        method = parser.get_method()
        request = Request(
            self._inbox,
            _METHODS.get(method) or method.decode(),
            path,
            query,
            RequestHeaders(fields),
            self._now_s(),
            keep_alive,
        )
        if version != "1.1":
            request.framed = request.keep_alive = False
        self._classify(request, fields)
        self.receiving = request
        self._body_bytes = self._framing_bytes = 0
        self.since_s = self._sweeper.now_s
        request.refusal = self._refusal(request, fields, url, version)
        self._inbox.enqueue(request)
        if request.refusal is not None:
            raise _Refused(request.refusal)

    def _classify(self, request: Request, fields: dict[bytes, bytes]) -> None:
        """Whether the handler awaits the body itself, and whether the head is of the common kind:
        of those that one read holds, the last one counts, and only if it is the only one."""
        plain = _PECULIAR.isdisjoint(fields) and b"content-length" in fields
        long = plain and _length(fields) > _SHORT_BYTES
        request.ready = long or b"transfer-encoding" in fields or b"expect" in fields
        self._common = request if plain and request.keep_alive and self._heads == 0 else None
        self._heads += 1

    def on_body(self, data: bytes) -> None:
        self._framing_bytes = 0
        self.pieces += 1
        self._body_bytes += len(data)
        if self._body_bytes > self._settings.body_bytes_max:
            raise _Refused(self._too_large())
        cast("Request", self.receiving).take(data)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        request = cast("Request", self.receiving)
        self.receiving = None
        if self._fields:
            self._fields = {}  # trailers
        request.received()

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"the body is longer than {self._settings.body_bytes_max} bytes")

    def _refusal(
        self, request: Request, fields: dict[bytes, bytes], url: bytes, version: str
    ) -> SLLMError | None:
        """Why a request with this head is not even given to the handler."""
        settings = self._settings
        if self._head_bytes > settings.header_bytes_max:
            # The head may share its packet with a body: only then is it worth counting.
            size = len(url) + sum(map(len, fields)) + sum(map(len, fields.values()))
            if size > settings.header_bytes_max:
                return HeadersTooLarge("the request's headers are too long")
        if len(fields) > settings.headers_max:
            return HeadersTooLarge("the request has too many headers")
        if b"content-length" in fields:
            if _length(fields) > settings.body_bytes_max:
                return self._too_large()
        elif b"transfer-encoding" in fields and (
            fields[b"transfer-encoding"].lower() != b"chunked" or version != "1.1"
        ):
            return InvalidRequest("this transfer-encoding is not spoken here")
        return self._misfit(request, fields, version)

    def _misfit(
        self, request: Request, fields: dict[bytes, bytes], version: str
    ) -> InvalidRequest | None:
        """What is HTTP, but none that is spoken here."""
        if self._twice:
            return InvalidRequest(f"the request has more than one {self._twice.decode()} header")
        if b"upgrade" in fields:
            self._upgrading = self._parser.should_upgrade()
        if not request.path.startswith("/") and request.path != "*":
            return InvalidRequest("the request's target is not a path")
        if version == "1.1":
            return None if b"host" in fields else InvalidRequest("the request has no Host header")
        return None if version == "1.0" else InvalidRequest(f"HTTP/{version} is not spoken here")

    def _stop(self, error: httptools.HttpParserError) -> None:
        """The parser gave up, or was told to."""
        cause = error.__context__
        if isinstance(cause, _Refused):
            self.refuse(cause.error)
        elif isinstance(error, httptools.HttpParserCallbackError) and cause is not None:
            raise cause
        elif self.receiving is None and self._inbox.closing_after_last():
            self.deaf = True  # bytes after `Connection: close`
        else:
            self.refuse(InvalidRequest(f"the request is not HTTP: {error}"))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read on as if no upgrade had been asked for: the parser skips the body of such a
        request (and some HTTP clients offer h2c with every POST), so a new one takes over."""
        self._upgrading = False
        request = cast("Request", self.receiving)
        framing = f"content-length: {request.headers.get('content-length') or 0}"
        if request.headers.get("transfer-encoding") is not None:
            framing = "transfer-encoding: chunked"
        self._parser = httptools.HttpRequestParser(self)
        self._resuming = True
        self._parser.feed_data(f"POST / HTTP/1.1\r\n{framing}\r\n\r\n".encode())
        self._url = b""
        if rest:
            self.feed(rest)

"""`Idempotency-Key`: a request that is sent twice is answered once, and the answer given twice.

An answer is recorded while it goes out, by standing between the request and its connection; the
path of a request without the header knows nothing of it. What did not end well is not kept: the
next try really tries.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable

import httptools

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import ClientError, InvalidRequest, TooManyRequests
from serverlessllm.edge.request import Line, Request, Source
from serverlessllm.edge.response import Decoder
from serverlessllm.orchestrator.rest.guard import caller_of
from serverlessllm.orchestrator.settings import OrchestratorSettings

IDEMPOTENCY_HEADER = "idempotency-key"
KEY_CHARS_MAX = 255

_RETRY_S = 1.0
_ERROR_STATUS_MIN = 400
_HEAD_END = b"\r\n\r\n"
_STREAM = b"text/event-stream"
_ENDS = (b"[DONE]", b'"response.completed"', b'"response.incomplete"', b'"message_stop"')
"""What the last event of a whole stream holds, by dialect."""
_NOT_AGAIN = re.compile(
    rb"\r\n(?:x-request-id|server-timing|openai-processing-ms|x-ratelimit-[^:\r]*|connection|date"
    rb"|transfer-encoding|content-length)[ \t]*:[^\r]*",
    re.IGNORECASE,
)
"""Fields that are about that time's request, or its framing."""

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)")

Scope = tuple[str, str, str]
"""Of whom, for which path, under which key."""


class IdempotencyKeyReused(ClientError):
    """The `Idempotency-Key` was sent before, with another body."""

    code = "idempotency_key_reused"


class IdempotencyInProgress(ClientError):
    """The first request with this `Idempotency-Key` is still being answered."""

    status = 409
    code = "idempotency_in_progress"
    permanent = False


class _Kept:
    """One request: what it was, and its answer once that is whole."""

    __slots__ = ("body", "digest", "ends_s", "lines", "status")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.status = 0
        """0: still being answered."""
        self.lines = b""
        self.body = b""
        self.ends_s = 0.0

    @property
    def size_bytes(self) -> int:
        return len(self.lines) + len(self.body)


class Recorder:
    """Between a request and its connection (`request.Line`): keeps a copy of what goes out, as long
    as `take` has room for the bytes."""

    def __init__(self, line: Line, bytes_max: int, take: Callable[[int], bool]) -> None:
        self._line = line
        self._left = bytes_max
        self._take = take
        self._pieces: list[bytes] = []
        self.size_bytes = 0
        """Of the copy."""

    @property
    def lost(self) -> bool:
        return self._line.lost

    @property
    def data(self) -> bytes:
        """All of it; empty when it was too much."""
        return b"".join(self._pieces)

    def _keep(self, data: bytes) -> None:
        if self._left < 0:
            return
        self._left -= len(data)
        if self._left >= 0 and self._take(len(data)):
            self._pieces.append(data)
            self.size_bytes += len(data)
        else:
            self.forget()

    def forget(self) -> None:
        """Give the copy up, and the bytes back."""
        self._pieces.clear()
        self._left = -1
        self._take(-self.size_bytes)
        self.size_bytes = 0

    def send(self, data: bytes) -> None:
        self._keep(data)
        self._line.send(data)

    async def room(self) -> None:
        await self._line.room()

    def will_close(self) -> bool:
        return self._line.will_close()

    def own_headers(self, request: Request) -> bytes:
        return self._line.own_headers(request)

    def cut(self) -> None:
        self._line.cut()

    def attach(self, source: Source) -> Callable[[bytes], None]:
        write = self._line.attach(source)

        def keep_and_write(data: bytes) -> None:
            self._keep(data)
            write(data)

        return keep_and_write

    def release(self, source: Source) -> None:
        self._line.release(source)


class Replays:
    """The answers that may be given again: bounded in number, bytes and time."""

    def __init__(self, settings: OrchestratorSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._running: dict[Scope, _Kept] = {}
        self._kept: dict[Scope, _Kept] = {}
        """The oldest first."""
        self._bytes = 0
        """Of what is kept, and of what is being recorded."""

    async def answer(
        self, request: Request, key: str, serve: Callable[[Request], Awaitable[int | None]]
    ) -> int:
        """Let `serve` answer, or give the answer that it gave before; the status, 0 where `serve`
        does not tell.

        Raises:
            InvalidRequest: the key is empty or too long.
            IdempotencyKeyReused, IdempotencyInProgress: what their names say.
        """
        if not 0 < len(key) <= KEY_CHARS_MAX:
            raise InvalidRequest(f"Idempotency-Key: from 1 to {KEY_CHARS_MAX} characters")
        digest = hashlib.sha256(await request.body()).digest()
        caller = caller_of(request)
        scope = ("" if caller is None else caller.id, request.path, key)
        self._forget_old()
        kept = self._kept.get(scope) or self._running.get(scope)
        if kept is None:
            return await self._record(request, scope, _Kept(digest), serve)
        if kept.digest != digest:
            raise IdempotencyKeyReused(
                "this Idempotency-Key was sent before with another body: use a new one"
            )
        if not kept.status:
            raise IdempotencyInProgress(
                "the first request with this Idempotency-Key is still being answered",
                retry_after_s=_RETRY_S,
            )
        again = b"%bidempotency-replayed: true\r\ncontent-length: %d\r\n"
        request.begin(again % (kept.lines, len(kept.body)), kept.body)
        request.status, request.finished = kept.status, True
        return kept.status

    async def _record(
        self,
        request: Request,
        scope: Scope,
        kept: _Kept,
        serve: Callable[[Request], Awaitable[int | None]],
    ) -> int:
        if len(self._running) >= self._settings.idempotency_keys_max:
            raise TooManyRequests("too many requests with an Idempotency-Key are running")
        self._running[scope] = kept
        line = request.line
        most = self._settings.idempotency_answer_bytes_max
        request.line = recorder = Recorder(line, most, self._take)
        try:
            status = await serve(request)
            if request.connected and request.finished:
                data = recorder.data
                recorder.forget()
                self._keep(scope, kept, data)
            return status or 0
        finally:
            recorder.forget()
            request.line = line
            del self._running[scope]

    def _take(self, size_bytes: int) -> bool:
        """Count bytes of a recording, if there is room when older answers are forgotten."""
        if size_bytes > 0 and self._bytes + size_bytes > self._settings.idempotency_bytes_max:
            self._forget_old(size_bytes)
            if self._bytes + size_bytes > self._settings.idempotency_bytes_max:
                return False
        self._bytes += size_bytes
        return True

    def _keep(self, scope: Scope, kept: _Kept, data: bytes) -> None:
        """Keep the answer, if it is one to be given again."""
        head, _, body = data.partition(_HEAD_END)
        status = int(head[9:12] or b"0")
        whole = _whole(head.lower(), body)
        if not status or status >= _ERROR_STATUS_MIN or whole is None:
            return
        kept.status, kept.body = status, whole
        kept.lines = _NOT_AGAIN.sub(b"", head) + b"\r\n"
        kept.ends_s = self._clock.now_s() + self._settings.idempotency_ttl_s
        self._kept[scope] = kept
        self._bytes += kept.size_bytes
        self._forget_old()

    def _forget_old(self, room_bytes: int = 0) -> None:
        """Forget what is over its time, and what is over the bounds with `room_bytes` more."""
        settings, now_s = self._settings, self._clock.now_s()
        while self._kept:
            scope, oldest = next(iter(self._kept.items()))
            if (
                now_s < oldest.ends_s
                and len(self._kept) <= settings.idempotency_keys_max
                and self._bytes + room_bytes <= settings.idempotency_bytes_max
            ):
                return
            del self._kept[scope]
            self._bytes -= oldest.size_bytes


def _whole(head: bytes, body: bytes) -> bytes | None:
    """The body without its framing; None when not all that was to be said is in it."""
    length = _LENGTH.search(head)
    if length is not None:
        return body if int(length[1]) == len(body) else None
    if b"transfer-encoding: chunked" not in head or not body.endswith(b"\r\n\r\n"):
        return None
    pieces: list[bytes] = []
    try:
        Decoder(pieces.append).feed(body)
    except httptools.HttpParserError:
        return None
    whole = b"".join(pieces)
    if _STREAM not in head:
        return whole
    # A stream may end cleanly with an error event, or with what only looks like an end.
    last = whole.rstrip().rpartition(b"\n\n")[2]
    return whole if any(end in last for end in _ENDS) else None

"""One client's connection: runs its requests' handlers in turn, notices its departure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from serverlessllm.core.errors import Draining, InvalidRequest, SLLMError, Unavailable
from serverlessllm.edge.quick import Quick, Work
from serverlessllm.edge.receiver import Receiver
from serverlessllm.edge.request import Request, Source
from serverlessllm.edge.steps import Run, Steps

if TYPE_CHECKING:
    from serverlessllm.edge.server import EdgeServer

_log: Final = structlog.get_logger(__name__)

_PIPELINE_FACTOR: Final = 8
"""One read may hold more requests than `pipeline_max` before reading can pause: how many times."""
_PIECES_AT_ONCE: Final = 1024
"""Of a client's bodies, before it is somebody else's turn."""


class Connection(asyncio.Protocol):
    """Answers requests in the order they came, one handler each."""

    def __init__(self, server: EdgeServer, *, counted: bool = True) -> None:
        self.server = server
        self.counted = counted
        """Whether it is one of those that `connections_max` is about."""
        self.lost = False
        self._settings = server.settings
        self._transport: asyncio.Transport
        self._receiver = Receiver(self, server.settings, server.sweeper, server.clock.now_s)
        self.own_headers = server.answer_headers
        self._reading = True
        # Answering.
        self._active: Request | None = None
        self._queue: deque[Request] = deque()
        self._run: Steps | None = None
        """Of the active request, once its handler has started."""
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
        spare = self.server.admit(self)
        if spare < -self._settings.backlog:
            self._transport.abort()  # too many even to be told so
        elif spare < 0:
            error = Unavailable("too many connections; try again", retry_after_s=1.0)
            self._receiver.refuse(error)
            self._proceed()

    def data_received(self, data: bytes) -> None:
        self._receiver.feed(data)
        if self._receiver.pieces > _PIECES_AT_ONCE:
            self._breathe()
        if self._run is None:
            self._proceed()

    def eof_received(self) -> None:
        # A FIN is the only sign of a departed client: nothing may be kept open for it. What is
        # answered and only unsent still goes out.
        if self._active is not None:
            self.lost = True  # before its handler is told, which may ask
            self._leave()
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's
        self.lost = True
        self._leave()
        self._wake()
        self.server.forget(self)

    def pause_writing(self) -> None:
        self._full = True
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        self._full = False
        if self._source is not None:
            self._source.resume()
        self._wake()
        if self._active is not None and self._run is None:
            self.server.loop.call_soon(self._proceed)  # not inside of the transport's write

    # Answering.

    def enqueue(self, request: Request) -> None:
        """A request's head has come: its turn is now, or after those before it."""
        if self._active is None:
            self._active = request
            return
        self._queue.append(request)
        most = self._settings.pipeline_max
        if len(self._queue) < most:
            return
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()
        if len(self._queue) == most * _PIPELINE_FACTOR:
            request.refusal = InvalidRequest("too many requests at once on one connection")
            self._receiver.deaf = True

    def closing_after_last(self) -> bool:
        """Whether the request that came last is the last that is answered."""
        last = self._queue[-1] if self._queue else self._active
        return last is not None and not last.keep_alive

    def _proceed(self) -> None:
        """Start the handler whose turn it is. Not from inside the parser: it may answer at once."""
        request = self._active
        if (
            request is not None
            and self._run is None
            and not self._full  # answers that nobody reads would pile up
            and not self.lost
            and (request.ready or self._refused_early(request))
            and not self._begin_quick(request)
        ):
            self._start(self._handle(request))

    def _begin_quick(self, request: Request) -> bool:
        """Whether it is answered, or will be, without a coroutine."""
        quick = self.server.quick
        if quick is None or request.refusal is not None or request.whole is None:
            return False
        try:
            work = quick(request)
        except Exception:  # noqa: BLE001 - the boundary of a request
            self._broke(request)
            self._answered(request)
            return True
        if work is None:
            return False
        if work.link is None:
            self.end_quick(request, work)
        else:
            self._run = Quick(self, request, work, work.link)
        return True

    def end_quick(self, request: Request, work: Work) -> None:
        """An answer that came without a coroutine is here; or one must take over."""
        try:
            rest = work.go_on()
        except Exception:  # noqa: BLE001 - the boundary of a request
            self._broke(request)
            work.give_up()
        else:
            if rest is not None:
                self._start(self._handle(request, rest))
                return
        self._answered(request)

    def _start(self, handler: Coroutine[Any, Any, None]) -> None:
        run = self._run = Run(handler, self.server.loop)
        if self.server.stepped:
            run.step()
        else:
            run.become_task()

    def _refused_early(self, request: Request) -> bool:
        """Whether the handler need not wait for the rest of the body; asked once a request."""
        if not request.judged:
            request.judged = True
            request.ready = self.server.refuses(request)
        return request.ready

    async def _handle(self, request: Request, rest: Awaitable[None] | None = None) -> None:
        """The boundary of a request: whatever goes wrong in it ends here."""
        try:
            if request.refusal is not None:
                raise request.refusal
            await (self.server.handler(request) if rest is None else rest)
            if not request.finished:
                raise RuntimeError(f"{request.method} {request.path}: the handler did not answer")
        except SLLMError as error:
            self._fail(request, error)
        except asyncio.CancelledError:
            self._fail(request, _shutting_down())
            raise
        except Exception:  # noqa: BLE001 - the boundary of a request
            self._broke(request)
        self._answered(request)

    def _broke(self, request: Request) -> None:
        """By a bug: say so inside the `except`."""
        _log.exception("request failed", request_id=request.id, path=request.path)
        self._fail(request, SLLMError())

    def _fail(self, request: Request, error: SLLMError) -> None:
        if self.lost or request.finished:
            return
        if request.started:
            request.abort()
        else:
            request.respond(*self.server.render_error(error))

    def _answered(self, request: Request) -> None:
        self._active = self._run = None
        receiver = self._receiver
        if self.lost or self._transport.is_closing():
            return
        if receiver.receiving is request or (receiver.deaf and not self._queue):
            self._linger()
        elif not request.keep_alive:
            self._transport.close()
        elif self._queue:
            self._active = self._queue.popleft()
            self.server.loop.call_soon(self._proceed)  # not deeper into the stack
            if len(self._queue) < self._settings.pipeline_max:
                self._resume_reading()
        elif self.server.stopping:
            self._transport.close()
        elif not receiver.in_head:
            receiver.since_s = self.server.sweeper.now_s

    def _linger(self) -> None:
        """Close so that the client reads the answer: a close on unread bytes would reset it."""
        self._lingering = True
        self._receiver.deaf = True
        self._receiver.receiving = None
        self._receiver.since_s = self.server.clock.now_s()
        if self._transport.can_write_eof():  # not with TLS
            self._transport.write_eof()
        self._resume_reading()

    def _resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    def _breathe(self) -> None:
        """Let others have their turn: the loop reads a socket many times before it looks around,
        and a read may hold ten thousand chunks."""
        self._receiver.pieces = 0
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()
            self.server.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if len(self._queue) < self._settings.pipeline_max and not self._transport.is_closing():
            self._resume_reading()

    def _leave(self) -> None:
        """The client has gone: whatever was under way for it ends."""
        self._queue.clear()
        self._receiver.deaf = True
        if self._source is not None:
            self._source.detach()
        self._cancel()

    def _cancel(self) -> asyncio.Task[None] | None:
        """Cancel the handler; the task that ends it."""
        run, self._run = self._run, None
        task = None if run is None else run.cancel()
        if task is not None:
            self.server.adopt(task)
        return task

    # Sending (`request.Line`).

    def send(self, data: bytes) -> None:
        if not self.lost:
            self._sent_bytes += len(data)
            self._transport.write(data)

    async def room(self) -> None:
        while self._full and not self.lost:
            self._room = self.server.loop.create_future()
            await self._room

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def will_close(self) -> bool:
        receiver = self._receiver
        return (
            self.server.stopping
            or receiver.receiving is self._active
            or (receiver.deaf and not self._queue)
        )

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

    # What the server asks.

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return not (self._active or self._receiver.in_head or self._lingering)

    def close(self) -> None:
        """Close once everything written has gone out."""
        self._transport.close()

    def interrupt(self) -> None:
        """Cancel the handler while its client is still there, then close."""
        self._queue.clear()
        self._receiver.deaf = True
        active = self._active
        task = self._cancel()
        if task is None:
            if active is not None:
                self._fail(active, _shutting_down())
            self._transport.close()
        else:
            task.add_done_callback(lambda _: self._transport.close())

    def sweep(self, now_s: float) -> bool:
        """Look at every deadline of this connection; whether one has passed."""
        settings = self._settings
        age_s = now_s - self._receiver.since_s
        if self._stalled(now_s) or (self._lingering and age_s >= settings.swallow_s):
            self._transport.abort()
            return True
        if self.idle:
            if age_s < settings.idle_timeout_s:
                return False
            self._transport.close()
            return True
        if self._lingering:
            return False
        passed = self._receiver.sweep(now_s)
        self._proceed()
        return passed

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


def _shutting_down() -> Draining:
    return Draining("this server is shutting down", retry_after_s=1.0)

"""One call: its metadata, its messages, what its client's slowness may cost, and how it ends.

On the wire a call with one message in a direction is a stream of one. All methods are served as
streams, so that one boundary reads, bounds and ends them all.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import InvalidRequest, RequestTimeout, SLLMError, TooManyRequests
from serverlessllm.core.ids import ModelId
from serverlessllm.edge.limits import Sweeper
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.orchestrator.grpc.statuses import Failure, Metadata, Refused, failure_of
from serverlessllm.orchestrator.grpc.wire import Malformed, check_parts
from serverlessllm.orchestrator.rest.guard import Given
from serverlessllm.orchestrator.tallies import Tallies
from serverlessllm.telemetry.logs import log

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[bytes, bytes]

_log = log("orchestrator")

M = TypeVar("M", bound=Message)
A = TypeVar("A", bound=Message)

_OK = 200
_GONE = 499
_ID_CHARS_MAX = 128
_id_prefix = f"grpc-{os.urandom(6).hex()}-"
_count = itertools.count(1)


class Call:
    """What a method needs of gRPC. Messages cross it one at a time in each direction."""

    def __init__(self, context: Context, settings: EdgeSettings, clock: Clock) -> None:
        self._context = context
        self._settings = settings
        self._clock = clock
        self._task = asyncio.current_task()
        self._due_s = math.inf
        self._told = False
        self._untold: Metadata = ()
        pairs = context.invocation_metadata() or ()
        self.metadata = {
            # Anything else is not text as gRPC has it, and could break out of a header's line.
            key: value
            for key, value in pairs
            if isinstance(value, str) and value.isascii() and value.isprintable()
        }
        """Of a repeated name the last."""
        given = self.metadata.get("x-request-id", "")
        self.id = given if 0 < len(given) <= _ID_CHARS_MAX else f"{_id_prefix}{next(_count):x}"
        """Of the request; the front door's answer may correct it."""
        self.late: SLLMError | None = None
        """Why the call was cut, if it was."""

    def said(self, name: str) -> str | None:
        """The client's metadata of that (lower-case) name."""
        return self.metadata.get(name)

    def left_s(self) -> float | None:
        """Until the client's deadline; None: it has none."""
        return self._context.time_remaining()

    async def receive(self, kind: type[M]) -> M:
        """The one request of a call that is no stream.

        Raises:
            InvalidRequest: there is none, or it is not such a message.
        """
        self._due_s = self._clock.now_s() + self._settings.body_timeout_s
        try:
            data = await self._context.read()
        finally:
            self._due_s = math.inf
        if not isinstance(data, bytes):
            raise InvalidRequest("the call has no message")
        return _parsed(kind, data)

    async def requests(self, kind: type[M]) -> AsyncIterator[M]:
        """Every message of a stream; the client's pauses are its own.

        Raises:
            InvalidRequest: one is not such a message.
        """
        while isinstance(data := await self._context.read(), bytes):
            yield _parsed(kind, data)

    async def tell(self, metadata: Metadata) -> None:
        """Send the initial metadata; what comes later is left for the end."""
        if self._told:
            self._untold += metadata
            return
        self._told = True
        await self._context.send_initial_metadata((("x-request-id", self.id), *metadata))

    async def send(self, message: Message) -> None:
        """Send a message; returns when there is room for more.

        Raises:
            CancelledError: the client has gone.
        """
        self._due_s = self._clock.now_s() + self._settings.write_stall_timeout_s
        try:
            await self._context.write(message.SerializeToString())
        except grpc.aio.InternalError as error:  # the connection broke under it
            raise asyncio.CancelledError from error
        finally:
            self._due_s = math.inf

    def end(self, failure: Failure | None = None) -> None:
        """Say how the call ended."""
        trailers: Metadata = (("x-request-id", self.id), *self._untold)
        if failure is not None:
            trailers += failure.trailers
            self._context.set_code(failure.code)
            self._context.set_details(failure.fields.message)
        self._context.set_trailing_metadata(trailers)

    def sweep(self, now_s: float) -> None:
        """Cut the call when its client is too slow."""
        if now_s >= self._due_s and self._task is not None:
            self._due_s = math.inf
            self.late = RequestTimeout("the client did not send, or read, in time")
            self._task.cancel()


Serve = Callable[[Call], Awaitable[None]]


class Calls:
    """The boundary of every call: whatever happens inside, it ends with a status.

    `check_key` raises for the metadata of a stranger, of whom no message is read then. A call whose
    client does not read its end takes none of the `calls_max` places.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        clock: Clock,
        *,
        calls_max: int,
        check_key: Callable[[Given], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._calls_max = calls_max
        self._check_key = check_key
        self._taken = 0
        self._tallies = Tallies()
        self._running: dict[Call, asyncio.Task[None] | None] = {}
        self._sweeper = Sweeper(self._sweep, settings.sweep_interval_s, clock)

    def start(self) -> None:
        """Begin to look at deadlines."""
        self._sweeper.start()

    async def close(self) -> None:
        """Cancel what still runs, and wait for it."""
        tasks = [task for task in self._running.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sweeper.close()

    def handler(
        self, path: str, serve: Serve, *, public: bool = False
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        """What gRPC is given for the method of that path; a `public` one is for anybody, and
        however busy this server is."""

        async def handle(_: object, context: Context) -> None:
            call = Call(context, self._settings, self._clock)
            self._running[call] = asyncio.current_task()
            began_s, status = self._clock.now_s(), _GONE
            try:
                failure = await self._serve(serve if public else self._admitted(serve), call)
                call.end(failure)
                status = _OK if failure is None else failure.status
            finally:
                del self._running[call]
                seconds = self._clock.now_s() - began_s
                self._tallies.of(path, ModelId("")).count(status, seconds, began_s, None)

        return grpc.stream_stream_rpc_method_handler(handle)

    def _admitted(self, serve: Serve) -> Serve:
        """The same for those who have a key, and while there is room."""

        async def serve_admitted(call: Call) -> None:
            self._check_key(call.metadata)
            if self._taken >= self._calls_max:
                raise TooManyRequests("too many calls at once", retry_after_s=1.0)
            self._taken += 1
            try:
                await serve(call)
            finally:
                self._taken -= 1

        return serve_admitted

    async def _serve(self, serve: Serve, call: Call) -> Failure | None:
        """Why the call failed, if it did."""
        try:
            await serve(call)
        except (SLLMError, Refused) as error:
            return failure_of(error)
        except asyncio.CancelledError:
            if call.late is None:
                raise
            return failure_of(call.late)
        except Exception:  # noqa: BLE001 - the boundary of a call
            _log.error("gRPC call failed by a bug", exc_info=True, request=call.id)
            return failure_of(SLLMError())
        return None

    def _sweep(self, now_s: float) -> None:
        for call in list(self._running):
            call.sweep(now_s)


def one(kind: type[M], answer: Callable[[Call, M], Awaitable[A]]) -> Serve:
    """A method that takes one message and gives one."""

    async def serve(call: Call) -> None:
        await call.send(await answer(call, await call.receive(kind)))

    return serve


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        check_parts(kind, data)
        return kind.FromString(data)
    except (DecodeError, Malformed) as error:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest(f"the message is not a {name}, or a text is not UTF-8") from error

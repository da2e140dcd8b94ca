"""Asks this process's own front door on behalf of a call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec

from serverlessllm.core.errors import BackendDied, Draining
from serverlessllm.edge.upstream import Response, UpstreamError
from serverlessllm.orchestrator.grpc.statuses import (
    LIMIT_HEADERS,
    Loading,
    Metadata,
    Refused,
    failure_in,
    failure_in_event,
)
from serverlessllm.orchestrator.listeners import LISTENER_HEADER
from serverlessllm.orchestrator.rest.front import Front
from serverlessllm.orchestrator.settings import OrchestratorSettings

_PASSED_ON = ("authorization", "x-api-key", "idempotency-key")
_TOLD = ("server-timing", "openai-processing-ms", *LIMIT_HEADERS)
_WAIT = "x-sllm-wait"
_ANSWER_S = 0.2
"""Of a client's deadline: kept for the answer that says how far the load is."""
_BAD = 400
_DATA = b"data:"
_COMMENT = b":"
_DONE = b"[DONE]"
_ERROR = b'"error"'
_EVENT_STREAM = "text/event-stream"


_comments = msgspec.json.Decoder(Loading)


class Asker(Protocol):
    """On whose behalf: a call, or one request of a stream."""

    id: str

    def said(self, name: str) -> str | None:
        """Its metadata of that name."""
        ...

    def left_s(self) -> float | None:
        """Until its deadline, if it has one."""
        ...

    async def tell(self, metadata: Metadata) -> None:
        """What its client may know of the answer before it comes."""
        ...


class Asking:
    """`draining` tells whether the front door is closing."""

    def __init__(
        self, front: Front, settings: OrchestratorSettings, draining: Callable[[], bool]
    ) -> None:
        self._front = front
        self._answer_bytes_max = settings.grpc_answer_bytes_max
        self._draining = draining

    @asynccontextmanager
    async def ask(
        self, call: Asker, method: str, path: str, body: bytes = b"", *, listener: str | None = None
    ) -> AsyncIterator[Response]:
        """A good answer; leaving before its end cancels it. The listener of that name is told how
        far a load is that an answer without a stream waits for.

        Raises:
            Refused: the answer is an error.
            SLLMError: there is no (whole) answer.
        """
        headers = _headers(call)
        if listener is not None:
            headers.append((LISTENER_HEADER, listener))
        try:
            async with self._front.ask(method, path, headers, body) as response:
                said = response.headers.get
                call.id = said("x-request-id") or call.id
                if response.status >= _BAD:
                    raise Refused(await failure_in(response))
                await call.tell(
                    tuple((name, value) for name in _TOLD if (value := said(name)) is not None)
                )
                yield response
        except UpstreamError as error:
            if self._draining():
                raise Draining("this server is shutting down; send the request again") from error
            raise

    async def whole(self, call: Asker, method: str, path: str, body: bytes = b"") -> bytes:
        """The body of a good answer; raises as `ask`."""
        async with self.ask(call, method, path, body) as response:
            return await self.read(response)

    async def read(self, response: Response) -> bytes:
        """The whole body of an answer.

        Raises:
            UpstreamError: it is too long, or broke off.
        """
        return await response.read(self._answer_bytes_max)


def is_stream(response: Response) -> bool:
    """Whether an answer comes as events."""
    return (response.headers.get("content-type") or "").startswith(_EVENT_STREAM)


async def events(response: Response) -> AsyncIterator[bytes | Loading]:
    """The data of each event, and how far the load is while there is none.

    Raises:
        Refused: the stream ended with an error.
        SLLMError: it broke off.
    """
    async for line in response.lines():
        if line.startswith(_DATA):
            data = line[len(_DATA) :].strip()
            if data == _DONE:
                return
            if _ERROR in data[:12]:
                raise Refused(failure_in_event(data))
            yield data
        elif line.startswith(_COMMENT):
            with contextlib.suppress(msgspec.DecodeError):  # a comment of somebody else's
                yield _comments.decode(line[len(_COMMENT) :])
    raise BackendDied("the answer ended before its end; send the request again")


def _headers(call: Asker) -> list[tuple[str, str]]:
    headers = [(name, value) for name in _PASSED_ON if (value := call.said(name)) is not None]
    wait = _wait(call.said(_WAIT), call.left_s())
    if wait is not None:
        headers.append((_WAIT, wait))
    return [*headers, ("content-type", "application/json"), ("x-request-id", call.id)]


def _wait(asked: str | None, left_s: float | None) -> str | None:
    """How long the client waits for a cold model: what it says, but not past its deadline."""
    if left_s is None or math.isinf(left_s):
        return asked
    left_s = max(0.0, left_s - _ANSWER_S)
    try:
        wanted_s = left_s if asked is None else float(asked)
    except ValueError:
        return asked  # the front door says what is wrong with it
    return asked if wanted_s < left_s else f"{left_s:.3f}"

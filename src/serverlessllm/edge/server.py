"""The listener: one coroutine a request, the client's leaving cancels it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import Address, RequestId
from serverlessllm.edge.settings import EdgeSettings

Headers = bytes | Sequence[tuple[str, str]]
"""Pairs, or (the hot path) ready lines: `b"name: value\\r\\n"` each."""
RenderError = Callable[[SLLMError], tuple[int, Sequence[tuple[str, str]], bytes]]
Handler = Callable[["Request"], Awaitable[None]]


class RequestHeaders:
    """Header fields by lower-case name; of a repeated one the last."""

    def get(self, name: str) -> str | None:
        """The value of `name` (write it in lower case)."""
        raise NotImplementedError

    def items(self) -> list[tuple[str, str]]:
        """All of them, names in lower case."""
        raise NotImplementedError


class Request:
    """One HTTP message and the way to answer it. Each answer carries `x-request-id`."""

    id: RequestId
    method: str
    path: str
    """As sent (percent escapes kept), without the query."""
    query: str
    """Without `?`; empty when there is none."""
    headers: RequestHeaders
    arrived_s: float
    """When the headers were complete, on the edge's clock."""

    @property
    def started(self) -> bool:
        """Whether the answer's head has been written."""
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        """Whether the client is still there."""
        raise NotImplementedError

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            RequestTooLarge, RequestTimeout, InvalidRequest: too long, too slow, bad framing.
        """
        raise NotImplementedError

    def respond(self, status: int, headers: Headers = (), body: bytes = b"") -> None:
        """A whole answer at once; `content-length` is added."""
        raise NotImplementedError

    def start(self, status: int, headers: Headers = ()) -> None:
        """Begin a streamed answer (chunked; until close for HTTP/1.0)."""
        raise NotImplementedError

    async def write(self, data: bytes) -> None:
        """One piece of a streamed answer; returns when the client has room for more."""
        raise NotImplementedError

    def finish(self) -> None:
        """End a streamed answer cleanly."""
        raise NotImplementedError

    def abort(self) -> None:
        """Cut the connection so that the client sees the answer is truncated."""
        raise NotImplementedError


class EdgeServer:
    """A listener on one address; owns its connections and their handlers' tasks.

    A `SLLMError` that the handler lets through is rendered by `render_error`; any other
    exception is logged with the request's id and rendered as an internal error.
    """

    def __init__(
        self,
        handler: Handler,
        settings: EdgeSettings,
        render_error: RenderError,
        clock: Clock,
    ) -> None:
        raise NotImplementedError

    async def start(self, address: Address) -> Address:
        """Listen on `unix:/path` or `http://host:port`; port 0 takes a free one. Returns the
        actual address."""
        raise NotImplementedError

    async def drain(self, grace_s: float) -> None:
        """Keep accepting for `drain_accept_s`, stop listening, let answers finish for up to
        `grace_s`, cancel the handlers that remain (`relay` then ends a stream with its error
        event), and close."""
        raise NotImplementedError

    async def close(self) -> None:
        """Stop listening, cancel every handler, wait for them, close every connection."""
        raise NotImplementedError

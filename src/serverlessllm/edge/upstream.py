"""HTTP requests to agents and backends over kept connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import Address
from serverlessllm.edge.settings import UpstreamSettings


class UpstreamError(SLLMError):
    """An upstream did not answer as it should."""

    status = 502
    code = "backend_died"


class UpstreamUnreachable(UpstreamError):
    """No connection: nothing was sent, another upstream may be asked."""


class UpstreamClosed(UpstreamError):
    """The connection ended before the answer was whole; `before_head`: before any of it."""

    before_head: bool


class UpstreamProtocolError(UpstreamError):
    """The upstream answered with something that is not HTTP, or more than a limit allows."""

    code = "backend_protocol_error"


class UpstreamTimeout(UpstreamError):
    """The answer did not come, or stalled, past its deadline."""

    status = 504
    code = "deadline_exceeded"


class UpstreamBusy(UpstreamError):
    """Too many requests wait for a connection to this upstream."""

    status = 503
    code = "overloaded"


class ResponseHeaders:
    """Header fields of an answer by lower-case name; of a repeated one the last."""

    def get(self, name: str) -> str | None:
        """The value of `name` (write it in lower case)."""
        raise NotImplementedError


class Response:
    """An answer whose head has come: read it, take its lines, or give it to `relay`."""

    status: int
    headers: ResponseHeaders

    async def read(self, max_bytes: int = 1024 * 1024) -> bytes:
        """The whole body, de-chunked.

        Raises:
            UpstreamProtocolError: it is longer than `max_bytes`.
            UpstreamClosed: the connection ended first.
        """
        raise NotImplementedError

    def lines(self) -> AsyncIterator[bytes]:
        """The body's lines as they come, without their ends (`\\n` or `\\r\\n`)."""
        raise NotImplementedError


class Exchange:
    """One request and its answer; leaving the block gives back or closes the connection."""

    async def __aenter__(self) -> Response:
        raise NotImplementedError

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raise NotImplementedError


class Upstreams:
    """Kept connections per address. Leaving or cancelling an unfinished exchange closes its
    connection, so that the backend stops generating."""

    def __init__(self, settings: UpstreamSettings, clock: Clock) -> None:
        raise NotImplementedError

    def send(
        self,
        address: Address,
        method: str,
        path: str,
        headers: bytes | Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        timeout_s: float | None = None,
    ) -> Exchange:
        """`async with upstreams.send(...) as response`. `path` includes the query; `host` and
        `content-length` are added. `timeout_s`: until the answer's head.

        Raises (on entering):
            UpstreamUnreachable, UpstreamClosed, UpstreamProtocolError, UpstreamTimeout,
            UpstreamBusy.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Close every connection; those in use end as `UpstreamClosed`."""
        raise NotImplementedError

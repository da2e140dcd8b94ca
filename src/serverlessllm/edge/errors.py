"""What can go wrong with an upstream."""

from __future__ import annotations

from serverlessllm.core.errors import SLLMError


class UpstreamError(SLLMError):
    """An upstream did not answer as it should."""

    status = 502
    code = "backend_died"


class UpstreamUnreachable(UpstreamError):
    """No connection: nothing was sent, another upstream may be asked."""


class UpstreamClosed(UpstreamError):
    """The connection ended before the answer was whole."""

    def __init__(self, message: str, *, before_head: bool) -> None:
        super().__init__(message)
        self.before_head = before_head
        """Whether nothing of the answer had been understood yet."""


class UpstreamProtocolError(UpstreamError):
    """The upstream answered with something that is not HTTP, or more than a limit allows."""

    code = "backend_protocol_error"


class UpstreamTimeout(UpstreamError):
    """The answer did not come, or stalled, past its deadline."""

    status = 504
    code = "deadline_exceeded"


class UpstreamSilent(UpstreamTimeout):
    """Somebody found out that the upstream is dead, although its connections stand."""

    status = 502
    code = "backend_died"


class UpstreamBusy(UpstreamError):
    """Too many requests wait for a connection to this upstream."""

    status = 503
    code = "overloaded"

"""The one place that turns an error into the body and headers that a client sees."""

from __future__ import annotations

import msgspec

from serverlessllm.core.errors import (
    BackendProtocolError,
    ClientError,
    SLLMError,
    Unavailable,
)

RETRY_AFTER_MAX_S = 120
"""A client library does not retry at all when told to wait longer."""
RETRY_AFTER_DEFAULT_S = 1.0
_MESSAGE_CHARS_MAX = 2000


class ErrorFields(msgspec.Struct, frozen=True, kw_only=True):
    """The inside of `{"error": …}`: always these four keys."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorFields


_encoder = msgspec.json.Encoder()


def error_body(error: SLLMError) -> bytes:
    """The JSON body of an error."""
    return _encoder.encode(
        ErrorBody(
            ErrorFields(message=error.message, type=error.type, param=error.param, code=error.code)
        )
    )


def render_error(error: SLLMError) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body of the answer that reports `error`."""
    headers = [("content-type", "application/json")]
    if error.status in {429, 503}:
        wait_s = RETRY_AFTER_DEFAULT_S if error.retry_after_s is None else error.retry_after_s
        headers.append(("retry-after", str(max(1, min(RETRY_AFTER_MAX_S, round(wait_s))))))
    if error.permanent:
        headers.append(("x-should-retry", "false"))
    return error.status, headers, error_body(error)


class BackendRefused(ClientError):
    """The backend refused the request as it was sent; its own words are the message."""

    def __init__(self, status: int, message: str, *, param: str | None, code: str) -> None:
        super().__init__(message, param=param)
        self.status = status  # type: ignore[misc]  # the backend's own status, per answer
        self.code = code  # type: ignore[misc]


def translate_backend_error(status: int, body: bytes) -> SLLMError:
    """What a backend's non-2xx answer means to the client."""
    raise NotImplementedError

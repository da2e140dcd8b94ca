"""Errors in the shape that Anthropic's clients read."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Struct, UnsetType

from serverlessllm.core.errors import SLLMError
from serverlessllm.openai.chats import Failure, Loading

_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What a status does not say is the client's fault below 500, ours from there on."""


class _Error(Struct, frozen=True, kw_only=True):
    type: str
    message: str


class _Body(Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    error: _Error
    request_id: str
    loading: Loading | UnsetType = UNSET
    """How far the model's load is."""


def error_body(failure: Failure, request_id: str) -> bytes:
    """The JSON that reports a failure, as a whole body or an event's data."""
    body = _Body(
        error=_Error(type=_type(failure), message=failure.error.message),
        request_id=request_id,
        loading=UNSET if failure.loading is None else failure.loading,
    )
    return msgspec.json.encode(body)


def error_frame(failure: Failure, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return b"event: error\ndata: %b\n\n" % error_body(failure, request_id)


def _type(failure: Failure) -> str:
    status = failure.status or _status_of(failure.error.code)
    return _BY_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error")


def _status_of(code: str) -> int:
    """The status that an error inside a stream would have had."""
    waiting: list[type[SLLMError]] = [SLLMError]
    while waiting:
        kind = waiting.pop()
        if kind.__dict__.get("code") == code:
            return kind.status
        waiting += kind.__subclasses__()
    return SLLMError.status

"""How an error of the contract looks in gRPC: status, trailing metadata, and its JSON."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import msgspec

from serverlessllm.core.cluster import JobError
from serverlessllm.core.errors import BackendProtocolError, SLLMError
from serverlessllm.core.failures import error_of
from serverlessllm.edge.upstream import Response
from serverlessllm.openai.errors import ErrorFields
from serverlessllm.orchestrator.rest.routes import render

Metadata = tuple[tuple[str, str], ...]

CODE_TRAILER = "x-sllm-code"
"""The `code` of the error contract."""
PARAM_TRAILER = "x-sllm-param"
"""The path of the offending field."""
_KINDS = ("requests", "tokens")
LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in _KINDS
)
"""What a key has left; of every answer to a limited key."""
_RETRY_HEADERS = ("retry-after", "x-should-retry")
_UNKNOWN_STATUS = 502
"""Of an error event whose code is not ours."""

_BY_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.ABORTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    431: grpc.StatusCode.RESOURCE_EXHAUSTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Loading(msgspec.Struct, frozen=True):
    """How far the load of a cold model is, as the HTTP API tells it."""

    state: str
    stage: str = ""
    bytes: int = 0
    total: int | None = None
    eta_s: float | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a call failed, as the HTTP API says it."""

    status: int
    """HTTP's."""
    fields: ErrorFields
    body: bytes
    """The JSON of the HTTP answer."""
    loading: Loading | None = None
    headers: Metadata = ()
    """Of `LIMIT_HEADERS` and what says whether to try again."""

    @property
    def code(self) -> grpc.StatusCode:
        return _BY_STATUS.get(self.status, grpc.StatusCode.INTERNAL)

    @property
    def trailers(self) -> Metadata:
        """The trailing metadata, but for the request's id."""
        trailers = [(CODE_TRAILER, self.fields.code), *self.headers]
        param = self.fields.param
        if param and param.isascii() and param.isprintable():
            trailers.append((PARAM_TRAILER, param))
        return tuple(trailers)


class Refused(Exception):
    """The front door's answer is an error."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.fields.message)
        self.failure = failure


class _Body(msgspec.Struct, frozen=True):
    error: ErrorFields
    loading: Loading | None = None


_decoder = msgspec.json.Decoder(_Body)


def failure_of(error: SLLMError | Refused) -> Failure:
    """Of an error that was raised here, or that the front door answered with."""
    if isinstance(error, Refused):
        return error.failure
    status, headers, body = render(error)
    return _failure(status, body, tuple(pair for pair in headers if pair[0] in _RETRY_HEADERS))


async def failure_in(response: Response) -> Failure:
    """Of an answer whose status is not good."""
    said = response.headers.get
    names = (*_RETRY_HEADERS, *LIMIT_HEADERS)
    headers = tuple((name, value) for name in names if (value := said(name)) is not None)
    return _failure(response.status, await response.read(), headers)


def failure_in_event(data: bytes) -> Failure:
    """Of the last event of a stream that failed; its code says what the status would have been."""
    fields = _failure(_UNKNOWN_STATUS, data, ()).fields
    record = JobError(code=fields.code, message=fields.message, status=_UNKNOWN_STATUS)
    known = error_of(record)
    status = known.status if known.code == fields.code else _UNKNOWN_STATUS
    return _failure(status, data, ())


def _failure(status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> Failure:
    try:
        said = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BackendProtocolError("an error that is not of the contract") from error
    return Failure(
        status=status,
        fields=said.error,
        body=body,
        loading=said.loading,
        headers=tuple(headers),
    )

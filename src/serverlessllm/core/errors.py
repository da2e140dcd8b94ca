"""The error tree: one class per `code` of the error contract.

An adapter raises these (translating what its library raises); the HTTP edge turns them into
a response once, in `serverlessllm.openai.errors`. The message is for the client: it says what
was wrong, where, and what to do, and it never carries a prompt, a key or a path of the server.
"""

from __future__ import annotations

from typing import ClassVar


class SLLMError(Exception):
    """A fault with a place in the error contract.

    `status` is the HTTP status, `type` and `code` the OpenAI error fields, `param` the path of
    the offending field. `retry_after_s` becomes `Retry-After`; `permanent` becomes
    `x-should-retry: false`.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    permanent: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "internal error; the request id finds it in the server's log",
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ClientError(SLLMError):
    """The request cannot succeed as it was sent."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    permanent = True


class InvalidRequest(ClientError):
    """A field is missing, of the wrong type, or out of range; `param` names it."""


class InvalidJSON(ClientError):
    """The body is not JSON, is not UTF-8, or is nested too deep."""

    code = "invalid_json"


class InvalidModelName(ClientError):
    """The model's name does not match `[org/]name[@revision]`."""

    code = "invalid_model_name"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"model name {name[:200]!r} is not valid: write [org/]name[@revision] in letters, "
            "digits, '.', '_' and '-'",
            param="model",
        )


class Unauthorized(ClientError):
    """A credential is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ClientError):
    """Whoever asks may not: a foreign web page, a name we do not serve under, a command."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class RouteNotFound(ClientError):
    """No such route."""

    status = 404
    code = "not_found"


class ModelNotFound(ClientError):
    """No model of that name is registered, and no allowed source has it."""

    status = 404
    code = "model_not_found"


class MethodNotAllowed(ClientError):
    """The route exists, but not for this method."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: tuple[str, ...] = ()) -> None:
        """`allow`: the methods that it exists for."""
        super().__init__(message)
        self.allow = allow


class Conflict(ClientError):
    """What is asked contradicts what exists."""

    status = 409
    code = "conflict"


class RequestTimeout(ClientError):
    """The request was not received within its deadline."""

    status = 408
    code = "request_timeout"
    permanent = False


class RequestTooLarge(ClientError):
    """The body is longer than the limit."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(ClientError):
    """The body is not `application/json`."""

    status = 415
    code = "unsupported_media_type"


class HeadersTooLarge(ClientError):
    """The request's headers are longer or more than the limit."""

    status = 431
    code = "headers_too_large"


class UnsupportedOperation(ClientError):
    """The backend of this model has no such operation (embeddings, say)."""

    code = "unsupported_operation"


class TooManyRequests(SLLMError):
    """The queue of this model, or of the server, is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class BackendProtocolError(SLLMError):
    """A backend answered with something that is not the protocol."""

    status = 502
    code = "backend_protocol_error"


class BackendDied(SLLMError):
    """The backend or its agent went away during the answer."""

    status = 502
    code = "backend_died"


class Unavailable(SLLMError):
    """The request may succeed later."""

    status = 503
    code = "overloaded"


class Draining(Unavailable):
    """This server is shutting down; another, or this one after its restart, will answer."""

    code = "draining"


class ModelLoading(Unavailable):
    """The model is still loading after the wait budget; the load goes on."""

    code = "model_loading"


class ModelNotReady(Unavailable):
    """This agent has no ready instance of the model: ask it to load, or ask another."""

    code = "model_not_ready"


class NoCapacity(Unavailable):
    """No agent can take the model now."""

    code = "no_capacity"


class MetadataUnavailable(Unavailable):
    """The metadata store does not answer; known models are still served."""

    code = "metadata_unavailable"


class UnreadableRecord(Unavailable):
    """A record in the metadata store is damaged, or a newer version of this program wrote it."""

    code = "unreadable_record"


class StoreUnavailable(Unavailable):
    """The checkpoint store does not answer."""

    code = "store_unavailable"


class SourceUnavailable(Unavailable):
    """The source of the raw weights does not answer."""

    code = "source_unavailable"


class LoadFailed(Unavailable):
    """The model could not be loaded; the reason is in the message."""

    code = "load_failed"


class BackendCrashLoop(Unavailable):
    """The backend crashed too often; the agent's log has its last lines."""

    code = "backend_crash_loop"


class Fenced(Unavailable):
    """A newer registration of the same owner exists: this one must stop."""

    code = "fenced"


class DeadlineExceeded(SLLMError):
    """The answer did not come before the deadline."""

    status = 504
    code = "deadline_exceeded"


class OutOfSpace(SLLMError):
    """The store or a cache tier is full, and nothing may be evicted."""

    status = 507
    code = "out_of_space"


class CheckpointError(SLLMError):
    """A checkpoint, or a raw file given for one, is not valid; says which part and why."""

    status = 503
    code = "invalid_checkpoint"
    permanent = True


class CorruptChunk(CheckpointError):
    """A chunk's bytes do not match its digest."""

    code = "corrupt_chunk"


class UnsupportedCheckpoint(CheckpointError):
    """A raw format that cannot be converted; names the way out."""

    code = "unsupported_checkpoint"

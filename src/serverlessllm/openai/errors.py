"""The one place that turns an error into the body and headers that a client sees."""

from __future__ import annotations

import re

import msgspec

from serverlessllm.core.errors import (
    BackendProtocolError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    MethodNotAllowed,
    OutOfSpace,
    RequestTooLarge,
    SLLMError,
    TooManyRequests,
    Unavailable,
    UnsupportedOperation,
)

RETRY_AFTER_MAX_S = 120
"""A client library does not retry at all when told to wait longer."""
RETRY_AFTER_DEFAULT_S = 1.0
_MESSAGE_CHARS_MAX = 2000
_TOO_LONG = ("exceed_context_size_error", "context_length_exceeded")
"""How llama.cpp and the OpenAI-like servers call it."""
_TOO_LARGE = re.compile(r"[\w ]+\(\d+ tokens\) (?:is|are) too large to process")
_TOO_LONG_WORDS = re.compile(r"maximum (?:context|model) length|than the model's context length")
"""vLLM and SGLang say it in words only."""
_PROMPTS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/v1/rerank": "documents",
}
"""The field that holds what may be too long, by route."""
_UNFIT = re.compile(r"Failed to parse (?:messages|tools|tool call arguments)|Jinja Exception")
"""With these words llama.cpp blames itself for what is wrong with the request, or with how it fits
the model's chat template."""


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


def error_fields(error: SLLMError) -> ErrorFields:
    """What the body of an error says."""
    return ErrorFields(message=error.message, type=error.type, param=error.param, code=error.code)


def error_body(error: SLLMError) -> bytes:
    """The JSON body of an error."""
    return _encoder.encode(ErrorBody(error_fields(error)))


def render_error(error: SLLMError) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body of the answer that reports `error`."""
    headers = [("content-type", "application/json")]
    if error.status in {429, 503}:
        wait_s = RETRY_AFTER_DEFAULT_S if error.retry_after_s is None else error.retry_after_s
        headers.append(("retry-after", str(max(1, min(RETRY_AFTER_MAX_S, round(wait_s))))))
    if isinstance(error, MethodNotAllowed) and error.allow:
        headers.append(("allow", ", ".join(error.allow)))
    if error.permanent:
        headers.append(("x-should-retry", "false"))
    return error.status, headers, error_body(error)


class ContextTooLong(InvalidRequest):
    """The prompt and the wanted answer do not fit the model's context."""

    code = "context_length_exceeded"


def translate_backend_error(status: int, body: bytes, route: str = "") -> SLLMError:
    """What a backend's non-2xx answer means to a client of `route`.

    A refusal (4xx) keeps the backend's words, which are about the request; a failure (5xx) does
    not: they are about the server.
    """
    said = _read(body)
    message, param = said.message, said.param
    if status in {501, 404, 405}:
        return UnsupportedOperation(message or "the model's backend has no such operation")
    if status == 409:
        return Conflict(message or "the model's backend refused the request", param=param)
    if status == 413:
        return RequestTooLarge(message or "the request is too large for the model's backend")
    if status == 429:
        return TooManyRequests("the model's backend is busy; try again")
    if status == 503:
        return Unavailable("the model's backend is not ready; try again")
    if status in {408, 504}:
        return DeadlineExceeded("the model's backend did not finish in time")
    if status == 507:
        return OutOfSpace("the model's backend is out of space")
    refused = 400 <= status < 500 and status not in {401, 403, 407}
    if refused or _TOO_LARGE.match(message) or _UNFIT.match(message):
        return _refusal(said, status, route)
    return BackendProtocolError(f"the model's backend failed (status {status})")


def _refusal(said: _Said, status: int, route: str) -> InvalidRequest:
    message = said.message
    if said.type in _TOO_LONG or said.code in _TOO_LONG or _says_too_long(message):
        return ContextTooLong(
            message or "the request is longer than the model's context",
            param=_PROMPTS.get(route, said.param),
        )
    return InvalidRequest(
        message or f"the model's backend refused the request (status {status})", param=said.param
    )


def _says_too_long(message: str) -> bool:
    return bool(_TOO_LARGE.match(message) or _TOO_LONG_WORDS.search(message))


class _Said(msgspec.Struct, frozen=True):
    """What a backend's error body says, whatever its dialect."""

    message: str = ""
    param: str | None = None
    type: str = ""
    code: str = ""


def _read(body: bytes) -> _Said:
    """`{"error": {…}}`, `{"error": "…"}`, `{"message": …}`, `{"detail": …}`, text, nothing."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return _Said(message=_clean(body.decode("utf-8", "replace")))
    if isinstance(found, dict):
        found = found.get("error", found)
    if isinstance(found, str):
        return _Said(message=_clean(found))
    if not isinstance(found, dict):
        return _Said()
    message = found.get("message", found.get("detail"))
    param, kind, code = found.get("param"), found.get("type"), found.get("code")
    return _Said(
        message=_clean(message) if isinstance(message, str) else "",
        param=param[:200] if isinstance(param, str) else None,
        type=kind if isinstance(kind, str) else "",
        code=code if isinstance(code, str) else "",
    )


def _clean(text: str) -> str:
    """Printable, and short enough for an error; an HTML page says nothing to a client."""
    if text.lstrip()[:1] == "<":
        return ""
    return "".join(c if c.isprintable() else " " for c in text[:_MESSAGE_CHARS_MAX]).strip()

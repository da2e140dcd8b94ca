"""What an engine says instead of an answer."""

from __future__ import annotations

import re

import msgspec

from serverlessllm.core.errors import BackendProtocolError, SLLMError
from serverlessllm.openai.answers.asked import Kind
from serverlessllm.openai.errors import translate_backend_error

_OURS = range(400, 600)
_STATUS = re.compile("[45][0-9]{2}")
_CLIENTS = ("badrequest", "invalid_request", "invalidrequest", "validation")
"""How an error's type begins that is about the request."""


def failure(data: bytes, kind: Kind) -> SLLMError:
    """The error that this is, in any of the usual dialects; else that it is no answer of `kind`."""
    try:
        said = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return nonsense("it is not JSON")
    if not isinstance(said, dict) or not {"error", "message", "detail"} & said.keys():
        return nonsense("it is neither an answer nor an error")
    return translate_backend_error(_status(said.get("error", said)), data, kind)


def not_streamed(body: bytes, kind: Kind) -> SLLMError:
    """What a 2xx answer means that is whole where a stream was asked for: some engines tell an
    error like that."""
    try:
        said = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        said = None
    is_error = isinstance(said, dict) and "choices" not in said
    return failure(body, kind) if is_error else nonsense("it is not a stream of events")


def nonsense(why: str) -> BackendProtocolError:
    """The answer cannot be read."""
    return BackendProtocolError(f"the answer of the model's backend cannot be read: {why}")


def _status(error: object) -> int:
    if not isinstance(error, dict):
        return 500
    for name in ("code", "status", "status_code", "http_status_code"):
        value = error.get(name)
        if isinstance(value, str) and _STATUS.fullmatch(value):
            value = int(value)
        if isinstance(value, int) and value in _OURS:
            return value
    kind = error.get("type")
    return 400 if isinstance(kind, str) and kind.lower().startswith(_CLIENTS) else 500

"""Read what the system must know of a request; the backend gets the original bytes."""

from __future__ import annotations

import msgspec

from serverlessllm.core.ids import ModelId
from serverlessllm.openai.settings import RequestLimits


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What routing needs of a request."""

    model: ModelId
    stream: bool = False
    keep_alive_s: float | None = None
    """This request's own; -1 for ever; None: the model's."""


def check_content_type(content_type: str | None) -> None:
    """Raise `UnsupportedMediaType` unless it is JSON (or not said at all)."""
    raise NotImplementedError


def parse_chat(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """`POST /v1/chat/completions`.

    Raises:
        InvalidJSON: not UTF-8, not JSON, nested too deep, or not an object.
        InvalidRequest: a field is missing, of a wrong type or out of range; `param` names it.
        InvalidModelName: the model's name cannot be one.
    """
    raise NotImplementedError


def parse_completion(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """`POST /v1/completions`; raises as `parse_chat`."""
    raise NotImplementedError


def parse_embeddings(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """`POST /v1/embeddings`; raises as `parse_chat`."""
    raise NotImplementedError

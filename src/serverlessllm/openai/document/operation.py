"""What the document says of a route."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

JSON = "application/json"
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
TEXT = "text/plain"


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a request says outside of its body."""

    name: str
    where: Literal["path", "query", "header"]
    type: Any
    """As msgspec understands types."""
    description: str
    example: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that is no error."""

    status: int = 200
    description: str
    type: Any = None
    """Of the body: one value, or each event or line of it. None: it is text."""
    content_type: str = JSON


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path."""

    path: str
    """As OpenAPI writes it, such as `/v1/models/{model}`."""
    method: Literal["get", "post", "delete"]
    tag: str
    summary: str
    description: str = ""
    body: Any = None
    """Type of the request's body; None: it has none."""
    example: str = ""
    """A body as JSON, short enough to be tried at once."""
    answers: tuple[Answer, ...]
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[int, ...]
    """Statuses of the errors that it can answer."""
    error: Any = None
    """Type of an error's body; None: as everywhere."""
    open: bool = False
    """Whether it needs no API key."""

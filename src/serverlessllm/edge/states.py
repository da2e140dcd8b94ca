"""Where a link stands."""

from __future__ import annotations

from enum import IntEnum


class LinkState(IntEnum):
    """What a link is doing."""

    IDLE = 0
    HEAD = 1
    """A request was sent; its answer's head is awaited."""
    BODY = 2
    DONE = 3
    """The answer is whole."""
    DEAD = 4


class Framing(IntEnum):
    """How the end of an answer's body is told."""

    NONE = 0
    LENGTH = 1
    CHUNKED = 2
    CLOSE = 3

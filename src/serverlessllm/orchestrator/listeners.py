"""Who hears of a load although its answer comes whole: a caller inside this process.

HTTP has no place for progress before such an answer, gRPC has. What asks the front door on a
client's behalf leaves a listener here, and sends its name with the request, which calls it while it
waits. Outside nobody knows a name.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from serverlessllm.core.agentapi import LoadEvent

LISTENER_HEADER = "x-sllm-listener"

Listener = Callable[[LoadEvent], Awaitable[None]]
"""Returns when there is room for more."""


class Listeners:
    """One for each request that may have to wait, for as long as it does."""

    def __init__(self) -> None:
        self._listeners: dict[str, Listener] = {}

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[str]:
        """The name to send; the listener is called until the block's end."""
        name = secrets.token_hex(16)
        self._listeners[name] = listener
        try:
            yield name
        finally:
            del self._listeners[name]

    def named(self, name: str | None) -> Listener | None:
        """The listener of that name, if there is one."""
        return None if name is None else self._listeners.get(name)

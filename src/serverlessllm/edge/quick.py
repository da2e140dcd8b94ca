"""A request that is answered without a coroutine: all that it waits for is one exchange.

Most requests are sent on over an idle connection, and their answers come whole in one read. For
them a coroutine, and what it awaits, cost as much as the rest of the policy. What turns out to be
anything else is left to a coroutine, with the exchange as it stands.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final, Protocol

from serverlessllm.edge.states import LinkState

if TYPE_CHECKING:
    from serverlessllm.edge.connection import Connection
    from serverlessllm.edge.link import Link
    from serverlessllm.edge.request import Request

_HEAD: Final = LinkState.HEAD


class Work(Protocol):
    """What is done about one request."""

    link: Link | None
    """Where it has been sent; None: nowhere yet, `go_on` knows what is to be done."""

    def go_on(self) -> Awaitable[None] | None:
        """The head of the answer has come, or never will: finish the request (None), or say what
        will do so."""
        ...

    def give_up(self) -> None:
        """The client has gone, or must not be served any longer."""
        ...


class Quick:
    """Runs a request's work on when its link has something new; as `steps.Run` otherwise."""

    __slots__ = ("_connection", "_link", "_over", "_request", "_work")

    def __init__(self, connection: Connection, request: Request, work: Work, link: Link) -> None:
        self._connection = connection
        self._request = request
        self._work = work
        self._link = link
        self._over = False
        link.tell(self)

    def step(self) -> None:
        """The link has changed."""
        if self._over:
            return
        if self._link.state is _HEAD:  # not all of it, or only an interim one
            self._link.tell(self)
            return
        self._over = True
        self._connection.end_quick(self._request, self._work)

    def cancel(self) -> None:
        """End it, at once."""
        if not self._over:
            self._over = True
            self._work.give_up()

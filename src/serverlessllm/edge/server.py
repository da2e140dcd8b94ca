"""The listener: one coroutine a request, which the client's leaving cancels."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import Address
from serverlessllm.edge.connection import Connection
from serverlessllm.edge.limits import Sweeper
from serverlessllm.edge.quick import Work
from serverlessllm.edge.request import Request, RequestHeaders
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.edge.wire import Headers, join_address, split_address

__all__ = ["EdgeServer", "Headers", "Request", "RequestHeaders"]

RenderError = Callable[[SLLMError], tuple[int, Sequence[tuple[str, str]], bytes]]
Handler = Callable[[Request], Awaitable[None]]
AnswerHeaders = Callable[[Request], bytes]
Refuses = Callable[[Request], bool]

_TURNS_TO_CONNECT = 3
"""Turns of the event loop from `accept` to `connection_made`."""
_SHARES = 16
"""Of the connections, looked at one after the other in an interval: a share of the most that there
may be by default holds the event loop for less than 0.3 ms."""


def _no_headers(_: Request) -> bytes:
    return b""


def _never(_: Request) -> bool:
    return False


def _free(path: str) -> None:
    """Remove a socket that nobody listens on any more."""
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()


class EdgeServer:
    """A listener on one address or more; owns its connections and their handlers' tasks.

    A `SLLMError` that the handler lets through is rendered by `render_error`; any other
    exception is logged with the request's id and rendered as an internal error.
    `answer_headers` gives the header lines (`b"name: value\\r\\n"` each) that every answer
    carries beside `x-request-id`: errors, refusals and relayed answers included.
    `refuses` is asked of a request whose body is still to come: whether the handler will refuse it
    whatever the body is, and so starts at once, and nothing is kept of the body.
    `stepped` handlers run without a task until they wait for more than an exchange with an
    upstream (`edge.steps`); one that needs a task from the start says `await in_task()`.
    `quick` is asked first what is to be done about a whole request; None: the handler does it.

    The process's main should call `gc.collect(); gc.freeze()` once everything is started: the
    collector then leaves the start-up's objects alone.
    """

    def __init__(
        self,
        handler: Handler,
        settings: EdgeSettings,
        render_error: RenderError,
        clock: Clock,
        answer_headers: AnswerHeaders = _no_headers,
        *,
        refuses: Refuses = _never,
        stepped: bool = False,
        quick: Callable[[Request], Work | None] | None = None,
    ) -> None:
        self.handler = handler
        self.settings = settings
        self.render_error = render_error
        self.clock = clock
        self.answer_headers = answer_headers
        self.refuses = refuses
        self.stepped = stepped
        self.quick = quick
        self.loop: asyncio.AbstractEventLoop
        self.stopping = False
        """Whether each answer is the last of its connection."""
        self.sweeper = Sweeper(self._sweep, settings.sweep_interval_s / _SHARES, clock)
        self._shares: list[set[Connection]] = [set() for _ in range(_SHARES)]
        self._turn = 0
        """Whose deadlines are looked at next."""
        self._connections: dict[Connection, set[Connection]] = {}
        """Each with its share."""
        self._counted = 0
        """Of them: those that `connections_max` is about."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(
        self,
        address: Address,
        bound: socket.socket | None = None,
        tls: ssl.SSLContext | None = None,
        *,
        counted: bool = True,
    ) -> Address:
        """Listen on `unix:/path` or `http://host:port`; port 0 takes a free one. Returns the
        actual address. May be called again, for one address more. `bound` is a socket that has
        the address already, perhaps with other processes; it is closed with the listener. With
        `tls` a port speaks https; its address stays `http://`. Connections that are not `counted`
        are never one too many: they come from whoever bounds them already.

        Raises:
            OSError: the address cannot be had.
            ValueError: it is not an address.
        """
        self.loop = asyncio.get_running_loop()
        where = split_address(address)
        backlog = self.settings.backlog
        connect = partial(Connection, self, counted=counted)
        if bound is not None:
            listener = await self.loop.create_server(
                connect, sock=bound, backlog=backlog, **self._tls_options(tls)
            )
        elif isinstance(where, str):
            _free(where)
            self._paths.append(where)
            listener = await self.loop.create_unix_server(connect, where, backlog=backlog)
        else:
            host, port = where
            listener = await self.loop.create_server(
                connect, host, port, backlog=backlog, **self._tls_options(tls)
            )
            port = listener.sockets[0].getsockname()[1]
            address = join_address(host, port)
        self._listeners.append(listener)
        self.sweeper.start()
        return address

    def _tls_options(self, tls: ssl.SSLContext | None) -> dict[str, Any]:
        """Of `create_server`: a handshake may be as slow as headers, a goodbye as a last read."""
        if tls is None:
            return {}
        return {
            "ssl": tls,
            "ssl_handshake_timeout": self.settings.header_timeout_s,
            "ssl_shutdown_timeout": self.settings.swallow_s,
        }

    @property
    def connections(self) -> int:
        """Open client connections."""
        return len(self._connections)

    async def drain(self, grace_s: float) -> None:
        """Keep accepting for `drain_accept_s`, stop listening, let answers finish for up to
        `grace_s`, cancel the handlers that remain (`relay` then ends a stream with its error
        event), and close."""
        self.stopping = True
        await self.clock.sleep(self.settings.drain_accept_s)
        self._stop_listening()
        for connection in list(self._connections):
            if connection.idle:
                connection.close()
        await self._empty_within(grace_s)
        for connection in list(self._connections):
            connection.interrupt()
        await self._empty_within(self.settings.drain_cut_s)
        await self.close()

    async def close(self) -> None:
        """Stop listening, cancel every handler, wait for them, close every connection."""
        self.stopping = True
        self._stop_listening()
        for _ in range(_TURNS_TO_CONNECT):
            # What the kernel has handed over becomes a connection in the loop's next turns.
            await asyncio.sleep(0)
        for connection in list(self._connections):
            connection.cut()
        await self._empty.wait()
        if self._leaving:
            await asyncio.wait(self._leaving)
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners.clear()
        while self._paths:
            _free(self._paths.pop())
        await self.sweeper.close()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()

    async def _empty_within(self, limit_s: float) -> None:
        """Return when no connection is left, or after `limit_s`."""
        empty = self.loop.create_task(self._empty.wait())
        late = self.loop.create_task(self._sleep(limit_s))
        try:
            await asyncio.wait((empty, late), return_when=asyncio.FIRST_COMPLETED)
        finally:
            empty.cancel()
            late.cancel()
            await asyncio.wait((empty, late))

    async def _sleep(self, delay_s: float) -> None:
        await self.clock.sleep(delay_s)

    # What connections tell.

    def admit(self, connection: Connection) -> int:
        """A connection is open; returns for how many more there is room, below 0: for this one
        there is none."""
        # Only the smallest grows: none is ever larger than an even share of the most there were.
        share = min(self._shares, key=len)
        share.add(connection)
        self._connections[connection] = share
        self._empty.clear()
        if not connection.counted:
            return 0
        self._counted += 1
        return self.settings.connections_max - self._counted

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        share = self._connections.pop(connection, None)
        if share is None:
            return
        share.remove(connection)
        self._counted -= connection.counted
        if not self._connections:
            self._empty.set()

    def adopt(self, task: asyncio.Task[None]) -> None:
        """A handler whose client has gone is still cleaning up."""
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _sweep(self, now_s: float) -> None:
        share = self._shares[self._turn]
        self._turn = (self._turn + 1) % _SHARES
        self._look(iter(list(share)), now_s)

    def _look(self, connections: Iterator[Connection], now_s: float) -> None:
        """At their deadlines. When one has passed, others have a turn before the next one."""
        for connection in connections:
            if not connection.lost and connection.sweep(now_s):
                self.loop.call_soon(self._look, connections, now_s)
                return

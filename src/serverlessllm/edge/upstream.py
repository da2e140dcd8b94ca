"""HTTP requests to agents and backends over kept connections."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Generator, Sequence
from types import TracebackType
from typing import Any, Final

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import Address
from serverlessllm.edge.errors import (
    UpstreamBusy,
    UpstreamClosed,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamSilent,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from serverlessllm.edge.limits import Sweeper
from serverlessllm.edge.link import HEAD, IDLE, Link
from serverlessllm.edge.response import Response, ResponseHeaders
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.steps import in_task
from serverlessllm.edge.wire import encode_headers, split_address

__all__: Final = [
    "Exchange",
    "Response",
    "ResponseHeaders",
    "UpstreamBusy",
    "UpstreamClosed",
    "UpstreamError",
    "UpstreamProtocolError",
    "UpstreamSilent",
    "UpstreamTimeout",
    "UpstreamUnreachable",
    "Upstreams",
]

_METHODS_WITH_BODY: Final = ("POST", "PUT", "PATCH")
_STARTS_MAX: Final = 256
_START_CHARS_MAX: Final = 256
_SILENT: Final = "the backend is silent"


class Pool:
    """The connections to one address: the last one given back is the next one used."""

    def __init__(self, owner: Upstreams, address: Address) -> None:
        self._owner = owner
        self._where = split_address(address)
        self.settings = owner.settings
        self.loop = owner.loop
        self.idle: list[Link] = []
        self.links: set[Link] = set()
        self.opened = 0
        """Connections made so far: shows whether they are reused."""
        self._connecting: set[_Deadline] = set()
        self._waiters: deque[asyncio.Future[Link | None]] = deque()
        host = "localhost" if isinstance(self._where, str) else self._where[0]
        port = "" if isinstance(self._where, str) else f":{self._where[1]}"
        self._host = f"[{host}]{port}" if ":" in host else f"{host}{port}"
        self.starts: dict[tuple[str, str], bytes] = {}
        """The first two lines of the requests sent most: few paths, again and again."""

    def start(self, method: str, path: str) -> bytes:
        """The first two lines of a request.

        Raises:
            ValueError: the path would break out of its line.
        """
        if len(f"{method} {path}".split()) != 2 or not path.isprintable():
            raise ValueError(f"{method} {path!r}: not a request line")
        lines = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\n".encode()
        if len(self.starts) >= _STARTS_MAX:
            self.starts.clear()
        if len(path) <= _START_CHARS_MAX:  # a long one is somebody's own, and would be kept
            self.starts[method, path] = lines
        return lines

    async def take(self) -> Link:
        """A fresh connection, or one that another request has just given back.

        Raises:
            UpstreamUnreachable, UpstreamBusy, UpstreamTimeout.
        """
        settings = self.settings
        if len(self.links) + len(self._connecting) >= settings.connections_per_address_max:
            if len(self._waiters) >= settings.waiters_per_address_max:
                raise UpstreamBusy("the backend has too many requests waiting", retry_after_s=1.0)
            link = await self._turn()
            if link is not None:
                return link
        return await self.connect()

    async def connect(self) -> Link:
        """A fresh connection, whatever the bound says (the caller has or frees a place)."""
        await in_task()
        deadline = self._owner.deadline(self.settings.connect_timeout_s)
        self._connecting.add(deadline)
        try:
            async with deadline:
                if isinstance(self._where, str):
                    _, link = await self.loop.create_unix_connection(self._link, self._where)
                else:
                    _, link = await self.loop.create_connection(self._link, *self._where)
        except OSError as error:  # TimeoutError is one, too
            raise UpstreamUnreachable("the backend cannot be reached") from error
        finally:
            self._connecting.discard(deadline)
        self.opened += 1
        return link

    @property
    def now_s(self) -> float:
        """The time of the last sweep."""
        return self._owner.now_s

    @property
    def forgotten(self) -> bool:
        """Whether nobody uses this pool."""
        return not (self.links or self._connecting or self._waiters)

    def give_back(self, link: Link) -> None:
        """The link is idle: the next waiter's, or kept."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(link)
                return
        link.state = IDLE
        link.idle_since_s = self._owner.now_s
        self.idle.append(link)

    def lost(self, link: Link) -> None:
        """The link is gone; safe to say twice."""
        if link not in self.links:
            return
        self.links.discard(link)
        if link.state is IDLE and link in self.idle:
            self.idle.remove(link)
        self._pass_on_place()

    def cut(self) -> None:
        """Whoever waits for this upstream, in whatever way, waits no longer."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(UpstreamSilent(_SILENT))
        for deadline in self._connecting:
            deadline.pass_now(self.loop)
        for link in list(self.links):
            link.fail(UpstreamSilent(_SILENT))

    def close(self) -> None:
        """Cut every connection; who waits for one gets told."""
        for link in list(self.links):
            link.abort()
        while self._waiters:
            self._pass_on_place()

    def sweep(self, now_s: float) -> None:
        """Close what has been idle too long, before its peer does; look at deadlines."""
        settings = self.settings
        oldest_s = now_s - max(0.0, settings.idle_expiry_s - settings.sweep_interval_s)
        for link in list(self.links):
            if link.state is IDLE:
                if link.idle_since_s <= oldest_s:
                    link.abort()
            else:
                link.sweep(now_s)

    def _link(self) -> Link:
        return Link(self)

    async def _turn(self) -> Link | None:
        """Wait for an idle link, or for a free place (None)."""
        waiter: asyncio.Future[Link | None] = self.loop.create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                link = waiter.result()
                if link is None:
                    self._pass_on_place()
                else:
                    self.give_back(link)
            raise

    def _pass_on_place(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class Exchange:
    """One request and its answer; leaving the block gives back or closes the connection."""

    __slots__ = ("_bodiless", "_link", "_owner", "_pool", "_request", "_timeout_s")

    def __init__(
        self,
        owner: Upstreams,
        pool: Pool,
        request: bytes,
        timeout_s: float | None,
        *,
        bodiless: bool,
    ) -> None:
        self._owner = owner
        self._pool = pool
        self._request = request
        self._timeout_s = timeout_s
        self._bodiless = bodiless
        self._link: Link | None = None

    def begin(self) -> Link | None:
        """Send the request if a connection is idle, without waiting for anything. `async with`
        goes on from there in any case, or `finish` ends it."""
        if not self._pool.idle:
            return None
        link = self._link = self._pool.idle.pop()
        self._send(link)
        return link

    def finish(self) -> None:
        """It is over: give its connection back, or close it. Safe to say twice."""
        link, self._link = self._link, None
        if link is not None:
            link.finish()

    async def __aenter__(self) -> Response:
        pool = self._pool
        link = self._link
        if link is None:
            link = self._link = pool.idle.pop() if pool.idle else await pool.take()
            self._send(link)
        while True:
            try:
                while link.state is HEAD:
                    await link.wait()
            except BaseException:
                link.abort()
                raise
            error = link.error
            if error is None:
                return Response(link)
            # A kept connection may have been closed by its peer just as it was used again:
            # nothing ran, so ask once more, on a connection that is surely new.
            if not (link.used and link.untouched and isinstance(error, UpstreamClosed)):
                link.abort()
                raise error
            link = self._link = await pool.connect()
            self._send(link)

    def _send(self, link: Link) -> None:
        deadline_s = None
        if self._timeout_s is not None:
            deadline_s = self._owner.clock.now_s() + self._timeout_s
        link.send(self._request, deadline_s, bodiless=self._bodiless)

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Awaitable[None]:
        self.finish()
        return _NOTHING


class _Nothing:
    """What need not be waited for."""

    def __await__(self) -> Generator[Any, Any, None]:
        return iter(())  # type: ignore[return-value] # nothing is ever sent to it


_NOTHING: Final = _Nothing()


class Upstreams:
    """Kept connections per address. Leaving or cancelling an unfinished exchange closes its
    connection, so that the backend stops generating."""

    def __init__(self, settings: UpstreamSettings, clock: Clock) -> None:
        self.settings = settings
        self.clock = clock
        self.loop: asyncio.AbstractEventLoop
        self._pools: dict[Address, Pool] = {}
        self._sweeper = Sweeper(self._sweep, settings.sweep_interval_s, clock)
        self._deadlines: dict[asyncio.Timeout, float] = {}

    def send(
        self,
        address: Address,
        method: str,
        path: str,
        headers: bytes | Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        timeout_s: float | None = None,
    ) -> Exchange:
        """`async with upstreams.send(...) as response`. `path` includes the query; `host` and
        `content-length` are added. `timeout_s`: until the answer's head.

        Raises (on entering):
            UpstreamUnreachable, UpstreamClosed, UpstreamProtocolError, UpstreamTimeout,
            UpstreamBusy.
        """
        pool = self._pools.get(address) or self._open(address)
        start = pool.starts.get((method, path)) or pool.start(method, path)
        lines = headers if isinstance(headers, bytes) else encode_headers(headers)
        length = b""
        if body or method in _METHODS_WITH_BODY:
            length = b"content-length: %d\r\n" % len(body)
        request = b"".join((start, lines, length, b"\r\n", body))
        return Exchange(self, pool, request, timeout_s, bodiless=method == "HEAD")

    async def close(self) -> None:
        """Close every connection; those in use end as `UpstreamClosed`."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        await self._sweeper.close()

    def opened(self, address: Address) -> int:
        """Connections made to `address` so far."""
        pool = self._pools.get(address)
        return 0 if pool is None else pool.opened

    @property
    def now_s(self) -> float:
        """The time of the last sweep."""
        return self._sweeper.now_s

    def deadline(self, delay_s: float) -> _Deadline:
        """`async with`: raises TimeoutError inside when this clock has moved on by `delay_s`."""
        return _Deadline(self._deadlines, self.clock.now_s() + delay_s)

    def cut(self, address: Address) -> None:
        """The upstream was found dead, though its connections stand: end them all. What was being
        asked of it fails with `UpstreamSilent`."""
        pool = self._pools.get(address)
        if pool is not None:
            pool.cut()

    def _open(self, address: Address) -> Pool:
        self.loop = asyncio.get_running_loop()
        self._sweeper.start()
        pool = self._pools[address] = Pool(self, address)
        return pool

    def _sweep(self, now_s: float) -> None:
        for timeout, deadline_s in list(self._deadlines.items()):
            if now_s >= deadline_s:
                timeout.reschedule(self.loop.time())
        for address, pool in list(self._pools.items()):
            pool.sweep(now_s)
            if pool.forgotten:
                del self._pools[address]


class _Deadline:
    """asyncio's timeout on our clock: it has no timer, a sweep makes it due."""

    __slots__ = ("_all", "_due_s", "_timeout")

    def __init__(self, deadlines: dict[asyncio.Timeout, float], due_s: float) -> None:
        self._all = deadlines
        self._due_s = due_s
        self._timeout = asyncio.timeout(None)

    def pass_now(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do not wait for it."""
        if self._timeout in self._all and self._timeout.when() is None:
            self._timeout.reschedule(loop.time())

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._all[self._timeout] = self._due_s

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._all[self._timeout]
        await self._timeout.__aexit__(kind, error, trace)

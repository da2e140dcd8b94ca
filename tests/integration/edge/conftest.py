"""Raw sockets on both sides of a real edge: clients and backends that say exactly what they are
told to, on a clock that moves only when told."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import uvloop

from serverlessllm.core.ids import Address
from serverlessllm.edge.relay import relay
from serverlessllm.edge.response import Relayed
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.openai.errors import render_error
from serverlessllm.testing.clock import VirtualClock

SOON_S = 30.0
"""Longer than anything here takes; a test that waits for it has failed."""
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: edge\r\n"


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the processes run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
async def _bounded() -> AsyncIterator[None]:
    """A test that hangs is cancelled: uvloop swallows what pytest-timeout raises in it."""
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel("the test has hung")

    handle = loop.call_later(2 * SOON_S, cancel)
    yield
    handle.cancel()


def post(body: bytes, *lines: str) -> bytes:
    """A whole request."""
    extra = "".join(f"{line}\r\n" for line in lines).encode()
    return b"%b%bcontent-length: %d\r\n\r\n%b" % (POST, extra, len(body), body)


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds; the test's own time-out bounds it."""
    while not holds():
        await asyncio.sleep(0)


class Answer(msgspec.Struct):
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes
    """De-chunked."""


class Peer:
    """One end of a connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def until(self, mark: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(mark), SOON_S)

    async def exactly(self, size: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(size), SOON_S)

    async def rest(self) -> bytes:
        """Everything until the other side closes (or resets)."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while more := await asyncio.wait_for(self.reader.read(65536), SOON_S):
                data += more
        return data

    async def gone(self) -> None:
        """Returns when the other side has closed."""
        await self.rest()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()

    async def head(self) -> tuple[str, dict[str, str]]:
        first, *lines = (await self.until(b"\r\n\r\n")).decode("latin-1")[:-4].split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return first, {name.lower(): value.strip() for name, _, value in pairs}

    async def chunk(self) -> bytes:
        """The next chunk's data; empty at the end."""
        size = int(await self.until(b"\r\n"), 16)
        data = await self.exactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def answer(self, *, head_only: bool = False) -> Answer:
        first, headers = await self.head()
        status = int(first.split()[1])
        body = b""
        if head_only or status in {204, 304}:
            pass
        elif "content-length" in headers:
            body = await self.exactly(int(headers["content-length"]))
        elif "transfer-encoding" in headers:
            while data := await self.chunk():
                body += data
        else:
            body = await self.rest()
        return Answer(status, headers, body)

    async def request(self) -> tuple[str, dict[str, str], bytes]:
        """For a backend: the next request's first line, headers and body."""
        first, headers = await self.head()
        return first, headers, await self.exactly(int(headers.get("content-length", "0")))


class Backend:
    """Accepts connections and hands them out in order; says nothing by itself."""

    def __init__(self) -> None:
        self.accepted = 0
        self._fresh: asyncio.Queue[Peer] = asyncio.Queue()
        self.peers: list[Peer] = []

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        peer = Peer(reader, writer)
        self.peers.append(peer)
        self._fresh.put_nowait(peer)

    async def accept(self) -> Peer:
        return await asyncio.wait_for(self._fresh.get(), SOON_S)


class Edge:
    """A server, its clock, and clients of it."""

    def __init__(self, server: EdgeServer, address: Address, clock: VirtualClock) -> None:
        self.server = server
        self.address = address
        self.clock = clock
        self._peers: list[Peer] = []

    async def connect(self, data: bytes = b"") -> Peer:
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        peer = Peer(*await asyncio.open_connection(host, int(port)))
        self._peers.append(peer)
        peer.send(data)
        return peer

    async def ask(self, data: bytes) -> Answer:
        peer = await self.connect(data)
        try:
            return await peer.answer(head_only=data.startswith(b"HEAD"))
        finally:
            peer.close()

    async def close(self) -> None:
        for peer in self._peers:
            peer.reset()
        await self.server.close()


MakeEdge = Callable[..., Awaitable[Edge]]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose socket paths are short enough."""
    path = Path(tempfile.mkdtemp(prefix="sllm-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture(params=[True, False], ids=["stepped", "tasks"])
def stepped(request: pytest.FixtureRequest) -> bool:
    """Whether handlers run without a task for as long as they can."""
    return bool(request.param)


@pytest.fixture
async def make_edge(clock: VirtualClock, stepped: bool) -> AsyncIterator[MakeEdge]:
    edges: list[Edge] = []

    async def make(handler: Callable[[Request], Awaitable[None]], **settings: object) -> Edge:
        server = EdgeServer(
            handler,
            msgspec.convert(settings, EdgeSettings),
            render_error,
            clock,
            lambda request: b"server-timing: total;dur=1\r\n",
            stepped=stepped,
        )
        edge = Edge(server, await server.start(Address("http://127.0.0.1:0")), clock)
        edges.append(edge)
        return edge

    yield make
    for edge in edges:
        await edge.close()


@pytest.fixture
async def backend(short_path: Path) -> AsyncIterator[Backend]:
    backend = Backend()
    server = await asyncio.start_unix_server(backend.take, short_path / "b.sock")
    yield backend
    for peer in backend.peers:
        peer.reset()
    server.close()
    await server.wait_closed()


@pytest.fixture
def backend_address(short_path: Path) -> Address:
    return Address(f"unix:{short_path}/b.sock")


@pytest.fixture
async def upstreams(clock: VirtualClock) -> AsyncIterator[Upstreams]:
    upstreams = Upstreams(UpstreamSettings(), clock)
    yield upstreams
    await upstreams.close()


class Proxy:
    """An edge whose handler relays everything to one backend."""

    def __init__(self, upstreams: Upstreams, backend: Backend, address: Address) -> None:
        self.upstreams = upstreams
        self.backend = backend
        self.address = address
        self.edge: Edge
        self.relayed: list[Relayed] = []
        self.error_event = b'data: {"error":{}}\n\n'
        self.opening: list[bytes] = []
        """What is written into the stream before the backend is asked."""
        self.idle_timeout_s: float | None = None
        self.first_bytes = 0

    async def handle(self, request: Request) -> None:
        body = await request.body()
        if self.opening:
            request.start(200, [("content-type", "text/event-stream")])
            for data in self.opening:
                await request.write(data)
        lines = [("x-request-id", request.id)]
        async with self.upstreams.send(
            self.address, request.method, request.path, lines, body
        ) as response:
            self.relayed.append(
                await relay(
                    request,
                    response,
                    headers=[("x-extra", "1")],
                    error_event=self.error_event,
                    on_first_byte=self._first_byte,
                    idle_timeout_s=self.idle_timeout_s,
                )
            )

    def _first_byte(self) -> None:
        self.first_bytes += 1

    async def connect(self, data: bytes = b"") -> Peer:
        return await self.edge.connect(data)


@pytest.fixture
async def proxy(
    make_edge: MakeEdge, upstreams: Upstreams, backend: Backend, backend_address: Address
) -> Proxy:
    proxy = Proxy(upstreams, backend, backend_address)
    proxy.edge = await make_edge(proxy.handle)
    return proxy

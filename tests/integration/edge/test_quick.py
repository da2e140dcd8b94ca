"""Requests that are answered without a coroutine, and what becomes of those that cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import pytest
from tests.integration.edge.conftest import Backend, Edge, Peer, post, until

from serverlessllm.core.ids import Address
from serverlessllm.edge.quick import Work
from serverlessllm.edge.relay import relay, relay_whole
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.edge.upstream import Exchange, Upstreams
from serverlessllm.openai.errors import render_error
from serverlessllm.testing.clock import VirtualClock

OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"content-length: 5\r\n\r\nhello"


class Relaying:
    """One request on its way to the backend."""

    def __init__(self, front: Front, request: Request, exchange: Exchange) -> None:
        self._front = front
        self._request = request
        self._exchange = exchange
        self.link = exchange.begin()

    def go_on(self) -> Awaitable[None] | None:
        if self._front.broken:
            raise RuntimeError("a bug")
        if self.link is None or not relay_whole(self._request, self.link):
            self._front.coroutines += 1
            return self._rest()
        self._exchange.finish()
        self._front.quick += 1
        return None

    def give_up(self) -> None:
        self._exchange.finish()
        self._front.given_up += 1

    async def _rest(self) -> None:
        async with self._exchange as response:
            await relay(self._request, response)


class Front:
    """An edge that asks one backend, and counts how."""

    def __init__(self, upstreams: Upstreams, address: Address, clock: VirtualClock) -> None:
        self._upstreams = upstreams
        self._address = address
        self.broken = False
        self.quick = self.coroutines = self.given_up = 0
        self.server = EdgeServer(
            self._handle, EdgeSettings(), render_error, clock, stepped=True, quick=self._begin
        )
        self.edge: Edge

    def _begin(self, request: Request) -> Work | None:
        if request.path == "/slow":
            return None
        body = request.whole or b""
        exchange = self._upstreams.send(self._address, request.method, request.path, (), body)
        return Relaying(self, request, exchange)

    async def _handle(self, request: Request) -> None:
        request.respond(200, (), b"by the handler")

    async def asked(self, backend: Backend) -> tuple[Peer, Peer]:
        """A client whose request is with the backend, over a connection that was used before."""
        client = await self.edge.connect(post(b"1"))
        peer = await backend.accept()
        await peer.request()
        peer.send(WHOLE)
        assert (await client.answer()).body == b"hello"
        assert (self.quick, self.coroutines) == (0, 1), "there was no connection yet"
        client.send(post(b"2"))
        await peer.request()
        return client, peer


@pytest.fixture
async def front(
    upstreams: Upstreams, backend_address: Address, clock: VirtualClock
) -> AsyncIterator[Front]:
    front = Front(upstreams, backend_address, clock)
    address = await front.server.start(Address("http://127.0.0.1:0"))
    front.edge = Edge(front.server, address, clock)
    yield front
    await front.edge.close()


async def test_a_whole_answer_needs_none(front: Front, backend: Backend) -> None:
    client, peer = await front.asked(backend)
    peer.send(WHOLE)
    answer = await client.answer()
    assert (answer.status, answer.body) == (200, b"hello")
    assert "x-request-id" in answer.headers
    assert (front.quick, front.coroutines, backend.accepted) == (1, 1, 1)
    client.send(post(b"") + post(b""))  # pipelined: one after the other
    for _ in range(2):
        await peer.request()
        peer.send(WHOLE)
        assert (await client.answer()).body == b"hello"
    assert (front.quick, backend.accepted) == (3, 1)


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 O", b"K\r\ncontent-length: 5\r\n", b"\r\nhello"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", WHOLE),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE[:20], WHOLE[20:]),
    ],
    ids=["a head in pieces", "an interim head", "both"],
)
async def test_a_head_is_waited_for(
    front: Front, backend: Backend, pieces: tuple[bytes, ...]
) -> None:
    client, peer = await front.asked(backend)
    for piece in pieces:
        peer.send(piece)
        for _ in range(5):
            await asyncio.sleep(0)
    assert (await client.answer()).body == b"hello"


@pytest.mark.parametrize(
    "pieces",
    [
        (OK + b"content-length: 5\r\n\r\nhe", b"llo"),
        (OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"),
        (OK + b"content-length: 5\r\n\r\n", b"hello"),
    ],
)
async def test_what_comes_in_pieces_is_left_to_a_coroutine(
    front: Front, backend: Backend, pieces: tuple[bytes, ...]
) -> None:
    client, peer = await front.asked(backend)
    peer.send(pieces[0])
    await until(lambda: front.coroutines == 2)
    peer.send(pieces[1])
    assert (await client.answer()).body == b"hello"
    assert front.quick == 0
    client.send(post(b"3"))
    await peer.request()
    peer.send(WHOLE)
    assert (await client.answer()).body == b"hello"
    assert (front.quick, backend.accepted) == (1, 1), "the connection is as good as before"


async def test_a_kept_connection_that_had_died_is_replaced(front: Front, backend: Backend) -> None:
    client, peer = await front.asked(backend)
    peer.close()
    fresh = await backend.accept()
    await fresh.request()
    fresh.send(WHOLE)
    assert (await client.answer()).body == b"hello"


async def test_a_client_that_leaves_takes_its_question_back(front: Front, backend: Backend) -> None:
    client, peer = await front.asked(backend)
    client.close()
    await peer.gone()
    assert (front.given_up, front.quick) == (1, 0)
    await until(lambda: front.server.connections == 0)


async def test_a_client_that_leaves_once_a_coroutine_answers_does_so_too(
    front: Front, backend: Backend
) -> None:
    client, peer = await front.asked(backend)
    peer.send(OK + b"content-length: 5\r\n\r\nhe")
    await until(lambda: front.coroutines == 2)
    client.close()
    await peer.gone()
    assert front.given_up == 0


async def test_a_drain_tells_who_still_waits(
    front: Front, backend: Backend, clock: VirtualClock
) -> None:
    client, peer = await front.asked(backend)
    draining = asyncio.create_task(front.server.drain(1.0))
    for _ in range(4):
        await until(lambda: clock.sleepers > 0)
        await clock.advance(3.0)
        if front.given_up:
            break
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    await peer.gone()
    while not draining.done():
        await clock.advance(3.0)
        await asyncio.sleep(0)
    await draining
    assert front.given_up == 1


async def test_a_bug_is_an_error_of_the_server(
    front: Front, backend: Backend, capfd: pytest.CaptureFixture[str]
) -> None:
    client, peer = await front.asked(backend)
    front.broken = True
    peer.send(WHOLE)
    assert (await client.answer()).status == 500
    assert front.given_up == 1
    assert "a bug" in "".join(capfd.readouterr())


async def test_the_handler_takes_what_is_not_for_it(front: Front) -> None:
    answer = await front.edge.ask(b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n")
    assert answer.body == b"by the handler"
    assert front.quick == front.coroutines == 0

"""Kept connections: reuse, one retry, bounds, deadlines, and what backends may not say."""

from __future__ import annotations

import asyncio
import socket

import pytest
from tests.integration.edge.conftest import Backend, Peer, until

from serverlessllm.core.ids import Address
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import (
    UpstreamBusy,
    UpstreamClosed,
    UpstreamError,
    UpstreamProtocolError,
    Upstreams,
    UpstreamSilent,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from serverlessllm.testing.clock import VirtualClock

OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"content-length: 0\r\n\r\n"


async def get(upstreams: Upstreams, address: Address, max_bytes: int = 1 << 20) -> bytes:
    async with upstreams.send(address, "GET", "/a?b=c") as response:
        assert response.status == 200
        return await response.read(max_bytes)


async def serve(backend: Backend, *answers: bytes) -> Peer:
    """Answer on one connection."""
    peer = await backend.accept()
    for answer in answers:
        await peer.request()
        peer.send(answer)
    return peer


async def test_a_request_and_its_answer(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    asking = asyncio.create_task(get(upstreams, backend_address))
    peer = await backend.accept()
    first, headers, _ = await peer.request()
    assert first == "GET /a?b=c HTTP/1.1"
    assert headers == {"host": "localhost"}
    peer.send(OK + b"Content-Type:  text/plain \r\ncontent-length: 5\r\n\r\nhello")
    assert await asking == b"hello"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK + b"content-length: 3\r\n\r\nabc", b"abc"),
        (OK + b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", b"abc"),
        (OK + b"\r\nabc", b"abc"),
    ],
)
async def test_a_body_is_read_whatever_its_framing(
    upstreams: Upstreams, backend: Backend, backend_address: Address, answer: bytes, body: bytes
) -> None:
    asking = asyncio.create_task(get(upstreams, backend_address))
    peer = await backend.accept()
    await peer.request()
    for byte in answer:
        peer.send(bytes((byte,)))
        await asyncio.sleep(0)
    if b"length" not in answer:
        peer.close()
    assert await asking == body


async def test_a_body_over_the_limit_is_not_read(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    serving = asyncio.create_task(serve(backend, OK + b"content-length: 99\r\n\r\nhello world"))
    with pytest.raises(UpstreamProtocolError, match="10 bytes"):
        await get(upstreams, backend_address, max_bytes=10)
    await (await serving).gone()


async def test_lines_come_as_they_are_written(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    serving = asyncio.create_task(
        serve(backend, OK + b"transfer-encoding: chunked\r\n\r\n4\r\none\n\r\n2\r\ntw\r\n")
    )
    async with upstreams.send(backend_address, "POST", "/load") as response:
        lines = response.lines()
        assert await anext(lines) == b"one"
        peer = await serving
        peer.send(b"a\r\no\r\n\nthree\n\r\n3\r\nend\r\n0\r\n\r\n")
        assert [line async for line in lines] == [b"two"[:2] + b"o", b"", b"three", b"end"]


async def test_a_line_without_end_is_refused(
    clock: VirtualClock, backend: Backend, backend_address: Address
) -> None:
    upstreams = Upstreams(UpstreamSettings(line_bytes_max=1000), clock)
    endless = OK + b"content-length: 5000\r\n\r\n" + b"x" * 2000
    serving = asyncio.create_task(serve(backend, endless))

    async def first_line() -> bytes:
        async with upstreams.send(backend_address, "GET", "/") as response:
            return await anext(response.lines())

    with pytest.raises(UpstreamProtocolError, match="too long"):
        await first_line()
    await serving
    await upstreams.close()


async def test_death_in_a_body_is_an_error(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    asking = asyncio.create_task(get(upstreams, backend_address))
    peer = await serve(backend, OK + b"content-length: 5\r\n\r\nhel")
    peer.close()
    with pytest.raises(UpstreamClosed) as caught:
        await asking
    assert not caught.value.before_head


async def test_nobody_there_is_unreachable(upstreams: Upstreams, backend_address: Address) -> None:
    with pytest.raises(UpstreamUnreachable):
        await get(upstreams, backend_address)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(UpstreamUnreachable):
            await get(upstreams, Address(f"http://127.0.0.1:{port}"))


async def test_the_last_connection_given_back_is_used_next(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    both = [asyncio.create_task(get(upstreams, backend_address)) for _ in range(2)]
    peers = [await backend.accept(), await backend.accept()]
    for peer, task in zip(peers, both, strict=True):
        await peer.request()
        peer.send(EMPTY)
        await task
    for _ in range(3):
        asking = asyncio.create_task(get(upstreams, backend_address))
        await peers[1].request()
        peers[1].send(EMPTY)
        await asking
    assert upstreams.opened(backend_address) == 2


async def test_a_connection_the_answer_closes_is_not_kept(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    for count in (1, 2):
        asking = asyncio.create_task(get(upstreams, backend_address))
        peer = await serve(backend, OK + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        await asking
        assert upstreams.opened(backend_address) == count
        await peer.gone()


async def _keep_one(upstreams: Upstreams, backend: Backend, address: Address) -> Peer:
    asking = asyncio.create_task(get(upstreams, address))
    peer = await serve(backend, EMPTY)
    await asking
    return peer


async def test_a_kept_connection_that_dies_unheard_is_replaced_once(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    kept = await _keep_one(upstreams, backend, backend_address)
    asking = asyncio.create_task(get(upstreams, backend_address))
    await kept.request()
    kept.reset()
    fresh = await backend.accept()
    assert (await fresh.request())[0] == "GET /a?b=c HTTP/1.1"
    fresh.reset()
    with pytest.raises(UpstreamClosed) as caught:
        await asking
    assert caught.value.before_head
    assert backend.accepted == 2


async def test_a_kept_connection_that_is_closing_is_replaced(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    await _keep_one(upstreams, backend, backend_address)
    upstreams._pools[backend_address].idle[0]._transport.close()  # its loss is not known yet
    asking = asyncio.create_task(get(upstreams, backend_address))
    await serve(backend, EMPTY)
    assert await asking == b""


async def test_a_fresh_connection_that_dies_is_not_asked_again(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    asking = asyncio.create_task(get(upstreams, backend_address))
    peer = await backend.accept()
    await peer.request()
    peer.close()
    with pytest.raises(UpstreamClosed):
        await asking
    assert backend.accepted == 1


async def test_nothing_is_asked_again_after_a_byte_of_the_answer(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    kept = await _keep_one(upstreams, backend, backend_address)
    asking = asyncio.create_task(get(upstreams, backend_address))
    await kept.request()
    kept.send(b"HTTP/1.1 2")
    kept.close()
    with pytest.raises(UpstreamClosed):
        await asking
    assert backend.accepted == 1


async def test_a_kept_connection_closed_meanwhile_is_not_used(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    kept = await _keep_one(upstreams, backend, backend_address)
    kept.close()
    await kept.writer.wait_closed()
    asking = asyncio.create_task(get(upstreams, backend_address))
    await serve(backend, EMPTY)
    assert await asking == b""


async def test_bytes_nobody_asked_for_end_a_kept_connection(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    kept = await _keep_one(upstreams, backend, backend_address)
    kept.send(EMPTY)
    await kept.gone()
    asking = asyncio.create_task(get(upstreams, backend_address))
    await serve(backend, EMPTY)
    assert await asking == b""
    assert backend.accepted == 2


async def test_a_connection_that_waits_for_its_first_request_is_not_idle(
    upstreams: Upstreams, backend: Backend, backend_address: Address, clock: VirtualClock
) -> None:
    pool = upstreams._open(backend_address)
    link = await pool.connect()
    peer = await backend.accept()
    await clock.advance(10)
    link.send(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", None, bodiless=False)
    assert link.error is None
    assert (await peer.request())[0] == "GET / HTTP/1.1"
    link.abort()


async def test_idle_connections_expire_before_their_peer_closes_them(
    upstreams: Upstreams, backend: Backend, backend_address: Address, clock: VirtualClock
) -> None:
    kept = await _keep_one(upstreams, backend, backend_address)
    await clock.advance(4)
    await kept.gone()
    asking = asyncio.create_task(get(upstreams, backend_address))
    await serve(backend, EMPTY)
    assert await asking == b""
    assert backend.accepted == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\ncontent-length: 0\n\n" + b"\r\n\r\n",
        OK + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        OK + b"transfer-encoding: gzip\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        OK + b"x-a: " + b"a" * 100_000,
    ],
    ids=["garbage", "bare LF", "two lengths", "coding", "101", "endless head"],
)
async def test_what_is_not_http_is_a_protocol_error(
    upstreams: Upstreams, backend: Backend, backend_address: Address, answer: bytes
) -> None:
    asking = asyncio.create_task(get(upstreams, backend_address))
    peer = await serve(backend, answer)
    with pytest.raises(UpstreamProtocolError) as caught:
        await asking
    assert caught.value.status == 502
    await peer.gone()


async def test_the_head_has_a_deadline(
    upstreams: Upstreams, backend: Backend, backend_address: Address, clock: VirtualClock
) -> None:
    async def ask() -> None:
        async with upstreams.send(backend_address, "GET", "/", timeout_s=2.0):
            raise AssertionError

    asking = asyncio.create_task(ask())
    peer = await backend.accept()
    await peer.request()
    await clock.advance(3)
    with pytest.raises(UpstreamTimeout):
        await asking
    await peer.gone()


async def test_connecting_has_a_deadline(upstreams: Upstreams, clock: VirtualClock) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        where = deaf.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(where)
        asking = asyncio.create_task(get(upstreams, Address(f"http://127.0.0.1:{where[1]}")))
        await until(lambda: clock.sleepers == 1)
        await clock.advance(6)
        with pytest.raises(UpstreamUnreachable):
            await asking
        for filler in fillers:
            filler.close()


async def test_cancelling_closes_the_connection(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    asking = asyncio.create_task(get(upstreams, backend_address))
    peer = await backend.accept()
    await peer.request()
    asking.cancel()
    await peer.gone()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_leaving_an_unread_answer_closes_the_connection(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    serving = asyncio.create_task(serve(backend, OK + b"content-length: 9\r\n\r\nhello"))
    async with upstreams.send(backend_address, "GET", "/") as response:
        assert response.headers.get("content-length") == "9"
    await (await serving).gone()


async def test_an_answer_nobody_takes_is_held_back(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    serving = asyncio.create_task(serve(backend, OK + b"content-length: 100000000\r\n\r\n"))
    async with upstreams.send(backend_address, "GET", "/"):
        peer = await serving
        peer.writer.transport.set_write_buffer_limits(high=65536)
        sent = 0
        full = asyncio.create_task(asyncio.sleep(0))
        for _ in range(1000):
            peer.send(b"x" * 65536)
            sent += 65536
            full = asyncio.create_task(peer.writer.drain())
            for _ in range(20):
                await asyncio.sleep(0)
            if not full.done():
                break
        assert not full.done()
        assert sent < 8 << 20
        full.cancel()


@pytest.fixture
async def narrow(clock: VirtualClock) -> object:
    upstreams = Upstreams(
        UpstreamSettings(connections_per_address_max=1, waiters_per_address_max=2), clock
    )
    yield upstreams
    await upstreams.close()


async def test_requests_wait_for_a_connection_in_turn(
    narrow: Upstreams, backend: Backend, backend_address: Address
) -> None:
    asking = [asyncio.create_task(get(narrow, backend_address)) for _ in range(3)]
    peer = await backend.accept()
    await until(lambda: len(asking) == 3)
    await peer.request()
    with pytest.raises(UpstreamBusy):
        await get(narrow, backend_address)
    for task in asking:
        if task is not asking[0]:
            await peer.request()
        peer.send(OK + b"content-length: 1\r\n\r\nx")
        assert await task == b"x"
    assert backend.accepted == 1


async def test_a_waiter_that_leaves_gives_its_turn_away(
    narrow: Upstreams, backend: Backend, backend_address: Address
) -> None:
    first = asyncio.create_task(get(narrow, backend_address))
    peer = await backend.accept()
    await peer.request()
    second, third = (asyncio.create_task(get(narrow, backend_address)) for _ in range(2))
    await asyncio.sleep(0)
    second.cancel()
    peer.send(EMPTY)
    await first
    await peer.request()
    peer.send(EMPTY)
    assert await third == b""
    assert second.cancelled()


async def test_a_place_freed_by_death_goes_to_the_next_waiter(
    narrow: Upstreams, backend: Backend, backend_address: Address
) -> None:
    first = asyncio.create_task(get(narrow, backend_address))
    peer = await backend.accept()
    await peer.request()
    second = asyncio.create_task(get(narrow, backend_address))
    await asyncio.sleep(0)
    peer.close()
    with pytest.raises(UpstreamClosed):
        await first
    await serve(backend, EMPTY)
    assert await second == b""


@pytest.mark.parametrize("turns", range(6))
async def test_a_waiter_gets_an_answer_however_its_turn_meets_a_closing_connection(
    narrow: Upstreams, backend: Backend, backend_address: Address, turns: int
) -> None:
    first = asyncio.create_task(get(narrow, backend_address))
    peer = await backend.accept()
    await peer.request()
    second = asyncio.create_task(get(narrow, backend_address))
    await asyncio.sleep(0)
    peer.send(EMPTY)
    for _ in range(turns):
        await asyncio.sleep(0)
    peer.reset()
    assert await first == b""
    await serve(backend, EMPTY)
    assert await second == b""


async def test_closing_ends_what_is_under_way(
    upstreams: Upstreams, backend: Backend, backend_address: Address
) -> None:
    asking = asyncio.create_task(get(upstreams, backend_address))
    peer = await backend.accept()
    await peer.request()
    await upstreams.close()
    with pytest.raises(UpstreamError):
        await asking
    await peer.gone()


async def test_a_backend_found_dead_fails_whoever_waits_for_it_in_whatever_way(
    narrow: Upstreams, backend: Backend, backend_address: Address
) -> None:
    asking = [asyncio.create_task(get(narrow, backend_address)) for _ in range(2)]
    peer = await backend.accept()
    await peer.request()
    narrow.cut(backend_address)  # one has asked, one waits for the connection
    for task in asking:
        with pytest.raises(UpstreamSilent):
            await task
    await peer.gone()
    again = asyncio.create_task(get(narrow, backend_address))
    kept = await serve(backend, EMPTY)
    assert await again == b""
    narrow.cut(backend_address)
    await kept.gone()  # an idle connection to the dead is of no use
    narrow.cut(Address("unix:/nobody/was/asked"))


async def test_a_backend_found_dead_is_not_connected_to_any_longer(upstreams: Upstreams) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        where = deaf.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(where)
        address = Address(f"http://127.0.0.1:{where[1]}")
        asking = asyncio.create_task(get(upstreams, address))
        while not asking.done():
            upstreams.cut(address)
            await asyncio.sleep(0)
        with pytest.raises(UpstreamUnreachable):
            await asking
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("path", ["/a b", "/a\r\nx: y", "/a\n"])
async def test_a_path_cannot_break_out_of_its_line(
    upstreams: Upstreams, backend_address: Address, path: str
) -> None:
    with pytest.raises(ValueError, match="request line"):
        upstreams.send(backend_address, "GET", path)

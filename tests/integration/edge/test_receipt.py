"""What a client may send, how long it may take, and what it is told otherwise."""

from __future__ import annotations

import asyncio
import socket

import pytest
from tests.integration.edge.conftest import POST, Edge, MakeEdge, post, until

from serverlessllm.edge.server import Request

SIZE = b"content-length: 3\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"


async def echo(request: Request) -> None:
    """Answer with what came."""
    body = await request.body()
    request.respond(200, [("x-path", request.path), ("x-query", request.query)], body)


@pytest.fixture
async def edge(make_edge: MakeEdge) -> Edge:
    return await make_edge(echo, header_bytes_max=2048, headers_max=20, body_bytes_max=4096)


NOT_HTTP = {
    "length and coding": POST + SIZE + CHUNKED + b"\r\n0\r\n\r\n",
    "coding and length": POST + CHUNKED + SIZE + b"\r\n0\r\n\r\n",
    "two lengths": POST + SIZE + b"content-length: 4\r\n\r\nabcd",
    "the same length twice": POST + SIZE + SIZE + b"\r\nabc",
    "a list of lengths": POST + b"content-length: 3, 3\r\n\r\nabc",
    "a signed length": POST + b"content-length: +3\r\n\r\nabc",
    "an endless length": POST + b"content-length: 99999999999999999999999\r\n\r\n",
    "a folded header": POST + b"x-a: a\r\n b\r\n\r\n",
    "space before the colon": POST + b"content-length : 3\r\n\r\nabc",
    "NUL in a header": POST + b"x-a: a\0b\r\n\r\n",
    "bare LF": b"POST / HTTP/1.1\nhost: edge\n\n",
    "NUL in the path": b"GET /a\0b HTTP/1.1\r\nhost: edge\r\n\r\n",
    "bytes in the path": b"GET /\xff HTTP/1.1\r\nhost: edge\r\n\r\n",
    "chunk size not hex": POST + CHUNKED + b"\r\nzz\r\nabc\r\n0\r\n\r\n",
    "chunk size overflow": POST + CHUNKED + b"\r\nfffffffffffffffff\r\nabc\r\n",
    "chunk without its end": POST + CHUNKED + b"\r\n3\r\nabcX\r\n0\r\n\r\n",
    "coding not last": POST + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "coding unknown": POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding we do not undo": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding in HTTP/1.0": b"POST / HTTP/1.0\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "HTTP/2": b"GET / HTTP/2.0\r\nhost: edge\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00",
    "CONNECT": b"CONNECT edge:80 HTTP/1.1\r\nhost: edge\r\n\r\n",
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP)
async def test_what_is_not_http_is_refused_and_nothing_after_it_is_read(
    edge: Edge, data: bytes
) -> None:
    smuggled = b"GET /smuggled HTTP/1.1\r\nhost: edge\r\n\r\n"
    client = await edge.connect(data + smuggled)
    answer = await client.answer()
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"]
    assert answer.headers["server-timing"]
    assert await client.rest() == b""


async def test_headers_may_be_long_but_not_too_long(edge: Edge) -> None:
    assert (await edge.ask(post(b"", f"x-a: {'a' * 1500}"))).status == 200
    assert (await edge.ask(post(b"", f"x-a: {'a' * 3000}"))).status == 431
    assert (await edge.ask(post(b"x" * 3000))).status == 200
    lines = [f"x-{n}: 1" for n in range(30)]
    assert (await edge.ask(post(b"", *lines))).status == 431


async def test_headers_without_end_are_cut_off_at_the_limit(edge: Edge) -> None:
    client = await edge.connect(POST + b"x-a: ")
    for _ in range(4):
        client.send(b"a" * 1000)
        await asyncio.sleep(0)
    assert (await client.answer()).status == 431


@pytest.mark.parametrize(
    "data",
    [
        POST + b"content-length: 5000\r\n\r\n",
        POST + CHUNKED + b"\r\n" + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 5,
    ],
    ids=["announced", "chunked"],
)
async def test_a_body_over_the_limit_is_413_and_the_client_can_read_it(
    edge: Edge, data: bytes
) -> None:
    client = await edge.connect(data)
    client.send(b"y" * 500_000)  # still sending: a close now would reset the connection
    assert (await client.answer()).status == 413
    assert await client.rest() == b""
    await edge.clock.advance(2)
    assert edge.server.connections == 0


async def test_slow_headers_are_408(edge: Edge) -> None:
    client = await edge.connect(POST[:20])
    await until(lambda: edge.server.connections == 1)
    for _ in range(4):
        client.send(b"x")
        await edge.clock.advance(3)
    assert (await client.answer()).status == 408
    assert await client.rest() == b""


async def test_a_body_that_does_not_come_is_408(make_edge: MakeEdge) -> None:
    edge = await make_edge(echo, body_rate_min_bytes_s=0)
    client = await edge.connect(POST + b"content-length: 10\r\n\r\n123")
    await until(lambda: edge.server.connections == 1)
    await edge.clock.advance(29)
    client.send(b"4")
    await edge.clock.advance(2)
    assert (await client.answer()).status == 408


async def test_a_trickled_body_is_408_long_before_the_deadline(edge: Edge) -> None:
    client = await edge.connect(POST + b"content-length: 4000\r\n\r\n123")
    await until(lambda: edge.server.connections == 1)
    for _ in range(8):
        client.send(b"x")
        await edge.clock.advance(1)
    assert (await client.answer()).status == 408


async def test_an_idle_connection_is_closed(edge: Edge) -> None:
    client = await edge.connect(post(b"1"))
    await client.answer()
    await edge.clock.advance(59)
    client.send(post(b"2"))
    assert (await client.answer()).body == b"2"
    await edge.clock.advance(62)
    assert await client.rest() == b""


async def test_expect_is_answered_when_the_body_is_wanted(edge: Edge) -> None:
    client = await edge.connect(POST + b"content-length: 3\r\nexpect: 100-continue\r\n\r\n")
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"abc")
    assert (await client.answer()).body == b"abc"


async def test_an_answer_before_the_body_closes_the_connection(make_edge: MakeEdge) -> None:
    async def refuse(request: Request) -> None:
        request.respond(404)

    edge = await make_edge(refuse)
    client = await edge.connect(POST + b"content-length: 3\r\nexpect: 100-continue\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (404, "close")
    assert await client.rest() == b""


async def test_chunked_bodies_are_joined_and_their_trailers_forgotten(edge: Edge) -> None:
    client = await edge.connect(
        POST
        + CHUNKED
        + b"\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nhost: evil\r\nx-request-id: t\r\n\r\n"
    )
    assert (await client.answer()).body == b"abcde"
    client.send(post(b""))
    answer = await client.answer()
    assert answer.headers["x-request-id"] != "t"


async def test_a_body_in_many_pieces_is_whole(edge: Edge) -> None:
    client = await edge.connect(POST + b"content-length: 4000\r\n\r\n")
    for _ in range(40):
        client.send(b"0123456789" * 10)
        await asyncio.sleep(0)
    assert (await client.answer()).body == b"0123456789" * 400


async def test_a_head_in_single_bytes_is_whole(edge: Edge) -> None:
    client = await edge.connect()
    client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in post(b"abc", "x-request-id: one-by-one"):
        client.send(bytes((byte,)))
        await asyncio.sleep(0)
    answer = await client.answer()
    assert (answer.body, answer.headers["x-request-id"]) == (b"abc", "one-by-one")


async def test_pipelined_requests_are_answered_in_order(make_edge: MakeEdge) -> None:
    running = 0

    async def one_at_a_time(request: Request) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1
        request.respond(200, (), await request.body())

    edge = await make_edge(one_at_a_time, pipeline_max=4)
    client = await edge.connect(b"".join(post(b"%d" % n) for n in range(30)))
    assert [(await client.answer()).body for _ in range(30)] == [b"%d" % n for n in range(30)]


async def test_a_flood_of_pipelined_requests_ends_the_connection(make_edge: MakeEdge) -> None:
    edge = await make_edge(echo, pipeline_max=2)
    client = await edge.connect(b"".join(post(b"%d" % n) for n in range(1000)))
    statuses = []
    while (answer := await client.answer()).headers.get("connection") != "close":
        statuses.append(answer.status)
    assert set(statuses) == {200}
    assert len(statuses) <= 2 * 8 + 1
    assert answer.status == 400


async def test_what_follows_a_request_to_close_is_ignored(edge: Edge) -> None:
    client = await edge.connect(post(b"1", "connection: close") + post(b"2"))
    answer = await client.answer()
    assert (answer.body, answer.headers["connection"]) == (b"1", "close")
    assert await client.rest() == b""


async def test_http_1_0_is_answered_and_closed(edge: Edge) -> None:
    client = await edge.connect(b"GET /a?b=c HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.headers["x-query"]) == (200, "b=c")
    assert await client.rest() == b""


async def test_head_has_no_body(edge: Edge) -> None:
    client = await edge.connect(b"HEAD /a HTTP/1.1\r\nhost: edge\r\n\r\n" + post(b"next"))
    assert (await client.answer(head_only=True)).status == 200
    assert (await client.answer()).body == b"next"


@pytest.mark.parametrize(
    ("framing", "body"),
    [("content-length: 3", b"abc"), ("transfer-encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n")],
)
async def test_an_upgrade_is_ignored_and_the_body_read(
    edge: Edge, framing: str, body: bytes
) -> None:
    head = POST + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n"
    client = await edge.connect(head + framing.encode() + b"\r\n\r\n" + body + post(b"next"))
    assert (await client.answer()).body == b"abc"
    assert (await client.answer()).body == b"next"


async def test_absolute_urls_and_queries(edge: Edge) -> None:
    answer = await edge.ask(b"GET http://edge/v1/models?a=b HTTP/1.1\r\nhost: edge\r\n\r\n")
    assert (answer.headers["x-path"], answer.headers["x-query"]) == ("/v1/models", "a=b")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-DEF_1.2:3", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ('a"b', False),
    ],
)
async def test_a_clients_request_id_is_kept_when_it_is_safe(
    edge: Edge, given: str, kept: bool
) -> None:
    answer = await edge.ask(post(b"", f"x-request-id: {given}"))
    assert (answer.headers["x-request-id"] == given) is kept
    assert answer.headers["x-request-id"]


async def test_request_ids_differ(edge: Edge) -> None:
    ids = {(await edge.ask(post(b""))).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5

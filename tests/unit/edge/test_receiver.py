"""Receipt without a socket: any split of the bytes gives the same requests."""

from __future__ import annotations

import itertools
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.edge.limits import Sweeper
from serverlessllm.edge.receiver import Inbox, Receiver
from serverlessllm.edge.request import Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.testing.clock import VirtualClock

STREAM = (
    b"POST /a?x=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
    b"GET /b HTTP/1.1\r\nhost: h\r\n\r\n"
    b"PUT /c HTTP/1.1\r\nhost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\n1\r\nd\r\n0\r\nx-trailer: 1\r\n\r\n"
    b"POST /d HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
    b"content-length: 2\r\n\r\nhi"
    b"DELETE /e HTTP/1.1\r\nhost: h\r\nx-trailer: no\r\n\r\n"
)


class Taken:
    """What a receiver needs of a connection; keeps the requests."""

    def __init__(self, **settings: int) -> None:
        clock = VirtualClock()
        self.settings = EdgeSettings(**settings)
        sweeper = Sweeper(lambda _: None, 1.0, clock)
        self.requests: list[Request] = []
        self.receiver = Receiver(cast("Inbox", self), self.settings, sweeper, clock.now_s)

    def enqueue(self, request: Request) -> None:
        self.requests.append(request)

    def closing_after_last(self) -> bool:
        return bool(self.requests) and not self.requests[-1].keep_alive


async def seen(taken: Taken) -> list[tuple[str, str, str, bytes, str | None]]:
    return [
        (r.method, r.path, r.query, await r.body(), r.headers.get("x-trailer"))
        for r in taken.requests
    ]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
async def test_any_split_gives_the_same_requests(cuts: list[int]) -> None:
    taken = Taken()
    places = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(places):
        if start < end:
            taken.receiver.feed(STREAM[start:end])
    assert await seen(taken) == [
        ("POST", "/a", "x=1", b"hello", None),
        ("GET", "/b", "", b"", None),
        ("PUT", "/c", "", b"abcd", None),
        ("POST", "/d", "", b"hi", None),
        ("DELETE", "/e", "", b"", "no"),
    ]
    assert not taken.receiver.deaf


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_requests_or_one_refusal(data: bytes, after_head: bool) -> None:
    taken = Taken()
    taken.receiver.feed(b"POST / HTTP/1.1\r\nhost: h\r\n" + data if after_head else data)
    refused = [request for request in taken.requests if request.refusal is not None]
    assert len(refused) <= 1
    assert taken.receiver.deaf or not refused


@pytest.mark.parametrize("piece", [b"t" * 500, b"x-t: 1\r\n" * 60], ids=["one", "many"])
def test_trailers_and_extensions_are_bounded(piece: bytes) -> None:
    taken = Taken(header_bytes_max=2048)
    head = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-t: "
    taken.receiver.feed(head)
    for _ in range(8):
        taken.receiver.feed(piece)
    assert taken.receiver.deaf
    assert taken.requests[0].refusal is None, "its handler runs, and learns it from the body"


def test_the_parser_knows_keep_alive_when_the_headers_are_complete() -> None:
    """The receiver asks then, though httptools answers truly only until the message is over."""
    for line, version, expected in (
        (b"", b"1.1", True),
        (b"connection: close\r\n", b"1.1", False),
        (b"", b"1.0", False),
    ):
        taken = Taken()
        taken.receiver.feed(b"GET / HTTP/" + version + b"\r\nhost: h\r\n" + line + b"\r\n")
        assert taken.requests[0].keep_alive is expected


HEAD = b"POST /v1/x?y=1 HTTP/1.1\r\nHost: h\r\nContent-Length: %b\r\nX-A: 1\r\n\r\n"
"""One that a connection sends again and again: it is not parsed again (`edge.known`)."""


@given(
    bodies=st.lists(st.binary(max_size=40), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 2000), max_size=16),
    name=st.sampled_from([b"Content-Length", b"content-length", b"cOnTeNt-LeNgTh"]),
)
async def test_any_split_of_equal_heads_gives_the_bodies(
    bodies: list[bytes], cuts: list[int], name: bytes
) -> None:
    head = HEAD.replace(b"Content-Length", name)
    stream = b"".join(head % str(len(body)).encode() + body for body in bodies)
    taken = Taken()
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(places):
        if start < end:
            taken.receiver.feed(stream[start:end])
    requests = taken.requests
    assert [await request.body() for request in requests] == bodies
    assert {(r.method, r.path, r.query, r.headers.get("x-a")) for r in requests} == {
        ("POST", "/v1/x", "y=1", "1")
    }
    assert taken.receiver.receiving is None
    assert not taken.receiver.deaf


async def test_a_known_head_gives_way_to_whatever_else_comes() -> None:
    taken = Taken()
    taken.receiver.feed(HEAD % b"2" + b"ab")
    taken.receiver.feed(HEAD % b"2" + b"cd" + HEAD % b"1" + b"e")
    taken.receiver.feed(b"GET /other HTTP/1.1\r\nhost: h\r\n\r\n")
    taken.receiver.feed(HEAD % b"0")
    taken.receiver.feed(HEAD % b"3" + b"f")
    taken.receiver.feed(b"gh" + HEAD % b"1")
    taken.receiver.feed(b"i")
    seen = [(request.path, await request.body()) for request in taken.requests]
    assert seen == [
        ("/v1/x", b"ab"),
        ("/v1/x", b"cd"),
        ("/v1/x", b"e"),
        ("/other", b""),
        ("/v1/x", b""),
        ("/v1/x", b"fgh"),
        ("/v1/x", b"i"),
    ]
    assert len({request.id for request in taken.requests}) == 7


@pytest.mark.parametrize(
    "second",
    [
        HEAD.replace(b"X-A: 1", b"Content-Length: 3") % b"2" + b"ab",
        HEAD.replace(b"X-A: 1", b"Transfer-Encoding: chunked") % b"2" + b"0\r\n\r\n",
        HEAD % b"2junk" + b"ab",
        HEAD % b"99999999999" + b"ab",
    ],
    ids=["two lengths", "length and chunks", "not a number", "too long"],
)
def test_a_head_that_is_nearly_known_is_judged_by_the_parser(second: bytes) -> None:
    taken = Taken()
    taken.receiver.feed(HEAD % b"2" + b"ab")
    taken.receiver.feed(second)
    assert taken.receiver.deaf
    assert taken.requests[0].refusal is None
    assert len(taken.requests) == 2

"""Heads, chunks and addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.ids import Address
from serverlessllm.edge.wire import (
    chunk,
    encode_headers,
    forwarded_head,
    join_address,
    split_address,
    status_line,
)


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("unix:/a/b.sock", "/a/b.sock"),
        ("http://127.0.0.1:80", ("127.0.0.1", 80)),
        ("http://host:8000/", ("host", 8000)),
        ("http://[::1]:1", ("::1", 1)),
    ],
)
def test_addresses(address: str, where: object) -> None:
    assert split_address(Address(address)) == where


@pytest.mark.parametrize(
    "address",
    ["", "unix:", "unix:a.sock", "https://a:1", "http://a", "http://:1", "a:1", "http://a:b"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="write unix:/path"):
        split_address(Address(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "host"])
def test_an_address_is_read_as_it_is_written(host: str) -> None:
    assert split_address(join_address(host, 80)) == (host, 80)


@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_encoded_headers_hold_as_many_lines_as_fields(headers: list[tuple[str, str]]) -> None:
    try:
        lines = encode_headers(headers)
    except ValueError:
        return
    assert lines.count(b"\n") == lines.count(b"\r\n") == lines.count(b"\r") == len(headers)


def test_ready_lines_are_taken_as_they_are() -> None:
    assert encode_headers(b"a: b\r\n") == b"a: b\r\n"


def test_a_chunk() -> None:
    assert chunk(b"x" * 17) == b"11\r\n" + b"x" * 17 + b"\r\n"


def test_status_lines() -> None:
    assert status_line(503) == b"HTTP/1.1 503 Service Unavailable\r\n"
    assert status_line(599) == b"HTTP/1.1 599 Unknown\r\n"


@pytest.mark.parametrize(
    "dropped",
    ["Connection", "keep-alive", "TE", "Trailer", "UPGRADE", "Proxy-Connection", "x-request-id"],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_hop_by_hop_fields_are_dropped_wherever_they_stand(dropped: str, place: int) -> None:
    lines = [b"A: 1", b"B-TE: connection: 2"]
    kept = b"HTTP/1.1 200 OK\r\n" + b"".join(line + b"\r\n" for line in lines)
    lines.insert(place, f"{dropped}: te".encode())
    head = b"HTTP/1.1 200 OK\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    assert forwarded_head(head, keep_framing=True) == kept


def test_framing_goes_when_it_changes() -> None:
    head = b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nA: 1\r\nContent-Length: 3\r\n\r\n"
    assert forwarded_head(head, keep_framing=False) == b"HTTP/1.1 200 OK\r\nA: 1\r\n"

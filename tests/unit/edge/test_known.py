"""A head that was sent before: never another request than the parser would have made of it."""

from __future__ import annotations

import pytest

from serverlessllm.edge.known import learn
from serverlessllm.edge.request import RequestHeaders

HEAD = b"POST /v1/x?y=1 HTTP/1.1\r\nHost: h\r\nContent-Length: %b\r\nX-A: 1\r\n\r\n"


def headers(**fields: bytes) -> RequestHeaders:
    return RequestHeaders({name.replace("_", "-").encode(): v for name, v in fields.items()})


def learned(head: bytes, length: bytes) -> object:
    return learn(head, "POST", "/v1/x", "y=1", headers(host=b"h", content_length=length))


def test_only_the_length_may_be_another() -> None:
    known = learn(HEAD % b"5", "POST", "/v1/x", "y=1", headers(host=b"h", content_length=b"5"))
    assert known is not None
    end = len(HEAD % b"123")
    assert known.match(HEAD % b"123") == (end, 123)
    assert known.match(HEAD % b"123" + b"body") == (end, 123)
    assert known.headers.get("content-length") is None, "it is not the next one's"
    for other in (
        (HEAD % b"123")[:-1],
        (HEAD % b"123").replace(b"X-A: 1", b"X-A: 2"),
        HEAD % b"",
        HEAD % b"-1",
        HEAD % b"+1",
        HEAD % b" 1",
        HEAD % b"1 ",
        HEAD % b"1,2",
        HEAD % b"0x5",
        HEAD % "\u0663".encode(),
        HEAD % b"5\nX-B: 1",
    ):
        assert known.match(other) is None


@pytest.mark.parametrize(
    ("head", "length"),
    [
        (HEAD.replace(b"\r\nX-A", b"\nX-A") % b"5", b"5"),
        (HEAD.replace(b"\r\n\r\n", b"\n\n") % b"5", b"5"),
        (HEAD.replace(b"Content-Length: ", b"Content-Length:") % b"5", b"5"),
        (HEAD.replace(b"Content-Length", b"CONTENT-LENGTH") % b"5", b"5"),
        (HEAD % b"5", b"6"),
        (HEAD % b"5 ", b"5"),
        (HEAD.replace(b"X-A: 1", b"X-A: " + b"1" * 5000) % b"5", b"5"),
        (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"5"),
        (HEAD[:40], b"5"),
    ],
)
def test_what_is_not_of_the_common_kind_is_not_learned(head: bytes, length: bytes) -> None:
    assert learned(head, length) is None

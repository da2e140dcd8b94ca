"""A head that a connection has sent before is not parsed again.

A client's heads differ from one request to the next in the length of the body, if at all. What
the parser made of one is kept for its connection; bytes that are the same but for the digits of
`content-length` mean the same. Everything else goes to the parser, which alone judges what is HTTP.
"""

from __future__ import annotations

from typing import Final

from serverlessllm.edge.request import RequestHeaders

_LENGTHS: Final = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_LENGTH_BYTES: Final = len(_LENGTHS[0])
_DIGITS_MAX: Final = 12
_HEAD_BYTES_MAX: Final = 4096
"""A longer head is not kept: connections are many."""


class KnownHead:
    """One head without its body's length, and what the parser made of it."""

    __slots__ = ("_after", "_before", "headers", "method", "path", "query")

    def __init__(
        self,
        before: bytes,
        after: bytes,
        method: str,
        path: str,
        query: str,
        headers: RequestHeaders,
    ) -> None:
        self._before = before
        self._after = after
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers

    def match(self, data: bytes) -> tuple[int, int] | None:
        """Where the head that `data` begins with ends, and the length of the body after it; None
        if it is not this one."""
        start = len(self._before)
        if not data.startswith(self._before):
            return None
        stop = data.find(b"\r", start, start + _DIGITS_MAX)
        digits = data[start:stop]
        if stop < 0 or not digits.isdigit() or not data.startswith(self._after, stop):
            return None
        return stop + len(self._after), int(digits)


def learn(
    data: bytes, method: str, path: str, query: str, headers: RequestHeaders
) -> KnownHead | None:
    """What to keep of the request that the parser has found at the start of `data`; None if its
    head is not one of the common kind. (It is for the caller to see that nothing but the
    length says how long the body is, and that the connection goes on.)"""
    end = data.find(b"\r\n\r\n", 0, _HEAD_BYTES_MAX) + 4
    if end < 4 or data.count(b"\n", 0, end) != data.count(b"\r\n", 0, end):
        return None
    for name in _LENGTHS:
        start = data.find(name, 0, end) + _LENGTH_BYTES
        if start >= _LENGTH_BYTES:
            break
    else:
        return None
    stop = data.index(b"\r", start)
    length = data[start:stop]
    if length != headers.fields.get(b"content-length") or not length.isdigit():
        return None
    # The fields are shared from now on, and this one is not the same each time.
    fields = {name: value for name, value in headers.fields.items() if name != b"content-length"}
    return KnownHead(data[:start], data[stop:end], method, path, query, RequestHeaders(fields))

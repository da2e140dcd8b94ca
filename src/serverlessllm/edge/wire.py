"""How heads, chunks and addresses are spelled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from serverlessllm.core.ids import Address

Headers = bytes | Sequence[tuple[str, str]]
"""Pairs, or (the hot path) ready lines: `b"name: value\\r\\n"` each."""

STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus
}
LAST_CHUNK: Final = b"0\r\n\r\n"
BODILESS: Final = frozenset((204, 304))
"""Statuses whose answers never have a body."""

HOP_BY_HOP: Final = (
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"upgrade",
)
"""Fields that speak of one connection only."""
OURS: Final = (b"x-request-id", b"server-timing", b"openai-processing-ms")
"""Fields that the proxy nearest to the client says itself."""

_dropped: Final = re.compile(
    rb"\r\n(?:" + b"|".join(HOP_BY_HOP + OURS) + rb")[ \t]*:[^\r]*", re.IGNORECASE
)
_dropped_with_framing: Final = re.compile(
    rb"\r\n(?:"
    + b"|".join((*HOP_BY_HOP, *OURS, b"transfer-encoding", b"content-length"))
    + rb")[ \t]*:[^\r]*",
    re.IGNORECASE,
)


def encode_headers(headers: Headers) -> bytes:
    """Header lines, ready to send.

    Raises:
        ValueError: a name or value would break out of its line, or is not latin-1.
    """
    if not headers:
        return b""
    if isinstance(headers, bytes):
        return headers
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1")
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers) or b"\0" in lines:
        raise ValueError("a header holds a line break or a NUL")
    return lines


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status


def chunk(data: bytes) -> bytes:
    """`data` (not empty) as one chunk."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


def forwarded_head(head: bytes, *, keep_framing: bool) -> bytes:
    """The lines of an upstream's head that its client should see, each with its CRLF.

    `head` ends with the empty line. Without `keep_framing` the body's length fields go, too.
    """
    pattern = _dropped if keep_framing else _dropped_with_framing
    lines = pattern.sub(b"", head[:-2])
    return lines if lines.startswith(b"HTTP/1.1") else b"HTTP/1.1" + lines[8:]


def split_address(address: Address) -> str | tuple[str, int]:
    """A socket's path, or host and port.

    Raises:
        ValueError: neither `unix:/path` nor `http://host:port`.
    """
    if address.startswith("unix:/"):
        return address[len("unix:") :]
    host, colon, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not address.startswith("http://") or not colon or not host or not port.isdigit():
        raise ValueError(f"address {address!r}: write unix:/path/to.sock or http://host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> Address:
    """The address of a host (name, IPv4 or IPv6) and a port."""
    return Address(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

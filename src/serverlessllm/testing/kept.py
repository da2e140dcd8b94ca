"""Kept connections to a server of several processes: each is with one of them, and says which."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping

import msgspec

from serverlessllm.core.ids import Address

_CONNECTIONS_MAX = 200


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def process(self) -> str:
        """The process that took the request: its mark in the ids that it gives."""
        return self.headers["x-request-id"].rpartition("-")[0]


class Kept:
    """One connection; requests one after the other. Ends as the server or the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: Address | str) -> Kept:
        host, _, port = address.removeprefix("http://").rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Whole:
        """A request and its answer.

        Raises:
            EOFError, ConnectionError: the connection ended before the answer did.
        """
        await self.send(method, path, body, headers)
        return await self.answer(bodiless=method == "HEAD")

    async def send(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        lines = {"host": "localhost", "content-type": "application/json"} | dict(headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        start = f"{method} {path} HTTP/1.1\r\n{head}content-length: {len(data)}\r\n\r\n"
        self.writer.write(start.encode() + data)
        await self.writer.drain()

    async def answer(self, *, bodiless: bool = False) -> Whole:
        status, headers = await self.head()
        if bodiless:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while piece := await self.chunk():
                body += piece
        else:
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return Whole(status=status, headers=headers, body=body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of an answer, whose body follows."""
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = text.strip().split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}

    async def chunk(self) -> bytes:
        """The next chunk of a streamed body; empty: its end (and the trailers have been read)."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        if size == 0:
            while await self.reader.readuntil(b"\r\n") != b"\r\n":
                pass
            return b""
        return (await self.reader.readexactly(size + 2))[:-2]

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):  # the other end was faster
            await self.writer.wait_closed()


async def one_of_each(address: Address | str, count: int) -> dict[str, Kept]:
    """A connection to each of `count` processes that share the address, by process.

    Raises:
        AssertionError: so many do not answer.
    """
    found: dict[str, Kept] = {}
    for _ in range(_CONNECTIONS_MAX):
        kept = await Kept.open(address)
        process = (await kept.ask("GET", "/livez")).process
        if process in found:
            await kept.close()
        else:
            found[process] = kept
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} of {count} processes answer")

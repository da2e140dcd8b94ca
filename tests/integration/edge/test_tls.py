"""https on the edge: who is served, who is cut, what a certificate must be."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import Address
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.edge.tls import load_certificate, server_tls
from serverlessllm.openai.errors import render_error
from serverlessllm.testing.waiting import eventually

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority, tmp_path) -> tuple[str, str]:
    return write(authority.issue_cert("127.0.0.1", "localhost"), tmp_path, "one")


def write(cert: trustme.LeafCert, folder: Path, name: str) -> tuple[str, str]:
    """Paths of the chain and of the key."""
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    key.write_bytes(cert.private_key_pem.bytes())
    return str(chain), str(key)


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def hello(request: Request) -> None:
    body = await request.body()
    if request.path == "/stream":
        request.start(200, (("content-type", "text/plain"),))
        for number in range(100):
            await request.write(b"%d\n" % number * 1000)
        request.finish()
        return
    request.respond(200, (("content-type", "text/plain"),), b"hello " + body)


@asynccontextmanager
async def serving(
    tls: ssl.SSLContext | None, settings: EdgeSettings | None = None, handler=hello
) -> AsyncIterator[tuple[EdgeServer, int]]:
    edge = EdgeServer(handler, settings or EdgeSettings(), render_error, SystemClock())
    try:
        address = await edge.start(Address("http://127.0.0.1:0"), tls=tls)
        yield edge, int(address.rpartition(":")[2])
    finally:
        await edge.close()


@asynccontextmanager
async def connected(
    port: int, context: ssl.SSLContext | None
) -> AsyncIterator[Callable[..., Awaitable[bytes]]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1 << 20)

    async def say(data: bytes, until: bytes | None = None) -> bytes:
        writer.write(data)
        async with asyncio.timeout(60):
            return await (reader.read() if until is None else reader.readuntil(until))

    try:
        yield say
    finally:
        writer.transport.abort()


async def test_a_client_that_trusts_the_authority_is_served(authority, files):
    async with (
        serving(server_tls(*files)) as (_, port),
        connected(port, trusting(authority)) as say,
    ):
        for _ in range(3):  # on one connection
            assert b"200 OK" in await say(GET, b"hello ")
        body = b"x" * 300_000
        head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        assert (await say(head % len(body) + body)).endswith(b"hello " + body)


async def test_a_stream_is_whole(authority, files):
    async with (
        serving(server_tls(*files)) as (_, port),
        connected(port, trusting(authority)) as say,
    ):
        said = await say(GET.replace(b"/ ", b"/stream "), b"\r\n0\r\n\r\n")
        assert said.count(b"99\n") == 1000


async def test_an_early_refusal_is_read_though_the_body_is_not(authority, files):
    settings = EdgeSettings(body_bytes_max=1000, swallow_s=0.2, sweep_interval_s=0.05)
    async with (
        serving(server_tls(*files), settings) as (edge, port),
        connected(port, trusting(authority)) as say,
    ):
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n"
        assert b" 413 " in await say(head + b"x" * 5000, b"\r\n\r\n")
        await eventually(lambda: not edge.connections)


async def test_a_client_that_leaves_cancels_its_handler(authority, files):
    cancelled, begun = asyncio.Event(), asyncio.Event()

    async def wait(_: Request) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(server_tls(*files), handler=wait) as (_, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(authority))
        writer.write(GET)
        async with asyncio.timeout(60):
            await begun.wait()
            writer.close()
            await cancelled.wait()


async def test_plain_http_and_old_tls_are_cut(authority, files):
    async with serving(server_tls(*files)) as (edge, port):
        async with connected(port, None) as say:
            try:
                said = await say(GET)
            except ConnectionError:
                said = b""
            assert b"HTTP" not in said
        old = trusting(authority)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with connected(port, old):
                pass
        assert edge.connections == 0


async def test_an_unfinished_handshake_does_not_hold_up_the_end(files):
    settings = EdgeSettings(header_timeout_s=0.3)
    async with serving(server_tls(*files), settings) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(60):
            with contextlib.suppress(ConnectionError):
                assert not await reader.read()  # nothing is said: the handshake's time runs out
        writer.transport.abort()
        silent = await asyncio.open_connection("127.0.0.1", port)
    silent[1].transport.abort()


async def test_a_new_certificate_is_shown_to_new_connections(authority, files, tmp_path):
    tls = server_tls(*files)
    assert tls is not None
    other = trustme.CA()
    async with serving(tls) as (_, port), connected(port, trusting(authority)) as old:
        load_certificate(tls, *write(other.issue_cert("127.0.0.1"), tmp_path, "two"))
        assert b"200 OK" in await old(GET, b"hello ")
        async with connected(port, trusting(other)) as new:
            assert b"200 OK" in await new(GET, b"hello ")
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connected(port, trusting(authority)):
                pass


def test_files_that_are_no_certificate_say_which_and_why(authority, files, tmp_path):
    chain, key = files
    _, other_key = write(authority.issue_cert("elsewhere"), tmp_path, "other")
    text = tmp_path / "text"
    text.write_text("nothing")
    missing = str(tmp_path / "none")
    for pair, said in (
        ((missing, key), "none cannot be read"),
        ((chain, missing), "none cannot be read"),
        ((chain, str(tmp_path)), "cannot be read"),
        ((chain, other_key), "mismatch"),
        ((str(text), key), "not a certificate"),
        ((chain, str(text)), "not a certificate"),
    ):
        with pytest.raises(ValueError, match=said):
            server_tls(*pair)
    tls = server_tls(chain, key)
    assert tls is not None
    with pytest.raises(ValueError, match="mismatch"):
        load_certificate(tls, chain, other_key)
    assert server_tls(None, None) is None

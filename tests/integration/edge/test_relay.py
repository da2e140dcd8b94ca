"""Answers that pass through: framing on both sides, back-pressure, death in every place."""

from __future__ import annotations

import asyncio

import pytest
from tests.integration.edge.conftest import Peer, Proxy, post, until

from serverlessllm.edge.upstream import UpstreamProtocolError, UpstreamTimeout
from serverlessllm.testing.clock import VirtualClock

MIB = 1 << 20
OK = b"HTTP/1.1 200 OK\r\n"
EVENTS = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
GET_1_0 = b"GET / HTTP/1.0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return chunk(f"data: {text}\n\n".encode())


async def asked(proxy: Proxy, data: bytes = b"") -> tuple[Peer, Peer]:
    """A client that has asked, and the backend's end with the request read."""
    client = await proxy.connect(data or post(b"{}"))
    backend = await proxy.backend.accept()
    await backend.request()
    return client, backend


async def test_a_whole_answer_passes_with_its_head_rewritten(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(
        OK + b"Server: b\r\nKeep-Alive: timeout=5\r\nConnection: keep-alive\r\nSet-Cookie: a\r\n"
        b"X-Request-Id: theirs\r\nSet-Cookie: b\r\nServer-Timing: theirs\r\n"
        b"Content-Type: text/plain\r\nContent-Length: 5\r\nTE: x\r\n\r\nhello"
    )
    head = (await client.until(b"\r\n\r\n")).split(b"\r\n")
    assert await client.exactly(5) == b"hello"
    assert head[:5] == [
        b"HTTP/1.1 200 OK", b"Server: b", b"Set-Cookie: a", b"Set-Cookie: b",
        b"Content-Type: text/plain",
    ]  # fmt: skip
    assert head[5:7] == [b"Content-Length: 5", b"x-extra: 1"]
    assert head[7].startswith(b"x-request-id: req-")
    assert head[8:] == [b"server-timing: total;dur=1", b"", b""]
    assert proxy.relayed[0].ok
    assert proxy.relayed[0].body_bytes == 5
    assert proxy.first_bytes == 1


async def test_the_request_passes_whole(proxy: Proxy) -> None:
    client = await proxy.connect(post(b"x" * 100_000, "x-request-id: mine"))
    backend = await proxy.backend.accept()
    first, headers, body = await backend.request()
    assert first == "POST /v1/chat/completions HTTP/1.1"
    assert headers["x-request-id"] == "mine"
    assert body == b"x" * 100_000
    backend.send(OK + b"content-length: 0\r\n\r\n")
    assert (await client.answer()).headers["x-request-id"] == "mine"


async def test_chunks_pass_as_they_are(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS)
    body = b"5;a=b\r\nda" + b"ta:\r\n" + chunk(b" 1\n\n") + b"0\r\n\r\n"
    backend.send(body[:8])
    await client.until(b"\r\n\r\n")
    assert await client.exactly(8) == body[:8]
    backend.send(body[8:])
    assert await client.exactly(len(body) - 8) == body[8:]
    await until(lambda: bool(proxy.relayed))
    assert proxy.relayed[0].ok
    assert proxy.relayed[0].body_bytes == len(body)
    assert proxy.first_bytes == 1


async def test_connections_are_kept_on_both_sides(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    for turn in range(6):
        if turn % 2:
            backend.send(EVENTS + event("1"))
            backend.send(event("2") + b"0\r\n")
            await client.head()
            backend.send(b"\r\n")
            await client.until(b"0\r\n\r\n")
        else:
            backend.send(OK + b"content-length: 2\r\n\r\n")
            backend.send(b"ok")
            assert (await client.answer()).body == b"ok"
        client.send(post(b"{}"))
        await backend.request()
    backend.send(OK + b"content-length: 0\r\n\r\n")
    await client.answer()
    assert proxy.backend.accepted == 1
    assert proxy.upstreams.opened(proxy.address) == 1


async def test_pipelined_requests_pass_in_order(proxy: Proxy) -> None:
    client, backend = await asked(proxy, post(b"1") + post(b"2"))
    backend.send(EVENTS + event("1") + b"0\r\n\r\n")
    await backend.request()
    backend.send(OK + b"content-length: 1\r\n\r\n2")
    assert (await client.answer()).body == b"data: 1\n\n"
    assert (await client.answer()).body == b"2"


async def test_http_1_0_clients_get_no_chunks(proxy: Proxy) -> None:
    client, backend = await asked(proxy, GET_1_0)
    backend.send(EVENTS + event("1"))
    _, headers = await client.head()
    assert "transfer-encoding" not in headers
    backend.send(event("2") + b"0\r\n\r\n")
    assert await client.rest() == b"data: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize("at_once", [False, True])
async def test_answers_that_end_with_the_connection_get_a_framing(
    proxy: Proxy, at_once: bool
) -> None:
    client, backend = await asked(proxy)
    backend.send(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nhello ")
    if at_once:
        backend.send(b"world")
        backend.close()
        answer = await client.answer()
    else:
        first, headers = await client.head()
        assert first == "HTTP/1.1 200 OK"
        assert headers["transfer-encoding"] == "chunked"
        assert await client.chunk() == b"hello "
        backend.send(b"world")
        assert await client.chunk() == b"world"
        backend.close()
        assert await client.chunk() == b""
        return
    assert answer.body == b"hello world"


async def test_answers_that_end_with_the_connection_for_http_1_0(proxy: Proxy) -> None:
    client, backend = await asked(proxy, GET_1_0)
    backend.send(OK + b"\r\nhello")
    await client.head()
    backend.close()
    assert await client.rest() == b"hello"


async def test_a_long_body_passes_whole(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    body = bytes(range(256)) * 40_000
    backend.send(OK + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert (await client.answer()).body == body


@pytest.mark.parametrize("framing", [b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"])
async def test_head_answers_have_no_body(proxy: Proxy, framing: bytes) -> None:
    client, backend = await asked(proxy, b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n")
    backend.send(OK + framing + b"\r\n")
    answer = await client.answer(head_only=True)
    assert {"content-length", "transfer-encoding"} & set(answer.headers)
    client.send(post(b""))
    second = await proxy.backend.accept()  # what follows a HEAD is not trusted for reuse
    await second.request()
    second.send(OK + b"content-length: 0\r\n\r\n")
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_statuses_without_a_body(proxy: Proxy, status: bytes) -> None:
    client, backend = await asked(proxy)
    backend.send(b"HTTP/1.1 " + status + b"\r\netag: 1\r\n\r\n")
    assert (await client.answer()).headers["etag"] == "1"
    client.send(post(b""))
    await backend.request()
    backend.send(OK + b"content-length: 0\r\n\r\n")
    await client.answer()


async def test_interim_answers_are_not_passed_on(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n")
    backend.send(OK + b"content-length: 2\r\n\r\nok")
    assert (await client.answer()).body == b"ok"
    client.send(post(b""))
    await backend.request()


async def test_bytes_beyond_the_length_are_dropped_with_the_connection(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(OK + b"content-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    assert (await client.answer()).body == b"ok"
    await backend.gone()
    client.send(post(b""))
    second = await proxy.backend.accept()
    await second.request()
    second.send(OK + b"content-length: 1\r\n\r\n2")
    assert (await client.answer()).body == b"2"


@pytest.mark.parametrize(
    "extra",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nsplit",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n\n0\r\n\r\n",
        b"HTTP/1.1 200 a:b\r\ncontent-length: 9\r\n\r\n",
        b"garbage",
        b"\r\n",
        b"0\r\n\r\n",
    ],
)
async def test_bytes_beyond_the_last_chunk_never_pass(proxy: Proxy, extra: bytes) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS + event("1"))
    await client.until(b"data: 1\n\n\r\n")
    backend.send(event("2") + b"0\r\n\r\n" + extra)
    assert await client.rest() == b""
    await until(lambda: bool(proxy.relayed))
    assert isinstance(proxy.relayed[0].error, UpstreamProtocolError)


async def test_trailers_pass(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    sent = event("1") + b"0\r\nx-t: 1\r\n\r\n"
    backend.send(EVENTS + sent)
    await client.head()
    assert await client.exactly(len(sent)) == sent


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        (EVENTS + event("1") + b"0\r\n\r\n", b"data: 1\n\n"),
        (OK + b"content-length: 9\r\n\r\ndata: 1\n\n", b"data: 1\n\n"),
        (OK + b"content-length: 0\r\n\r\n", b""),
        (OK + b"\r\ndata: 1\n\n", b"data: 1\n\n"),
    ],
    ids=["chunked", "length", "empty", "close"],
)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_body_joins_a_stream_that_has_begun(
    proxy: Proxy, answer: bytes, passed: bytes, version: str
) -> None:
    proxy.opening = [b": loading\n\n", b": still\n\n"]
    client, backend = await asked(
        proxy, post(b"").replace(b"HTTP/1.1", b"HTTP/" + version.encode())
    )
    _, headers = await client.head()
    assert headers.get("transfer-encoding") == ("chunked" if version == "1.1" else None)
    backend.send(answer)
    if b"chunked" not in answer and b"length" not in answer:
        await until(lambda: proxy.first_bytes == 1)
        backend.close()
    body = b""
    if version == "1.1":
        while data := await client.chunk():
            body += data
    else:
        body = await client.rest()
    assert body == b": loading\n\n: still\n\n" + passed
    await until(lambda: bool(proxy.relayed))
    assert proxy.relayed[0].ok


# The backend's death.


async def test_death_before_anything_is_an_error_not_an_answer(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.close()
    answer = await client.answer()
    assert (answer.status, b'"backend_died"' in answer.body) == (502, True)


async def test_death_after_the_head_is_still_an_error(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS)
    backend.close()
    answer = await client.answer()
    assert answer.status == 502
    client.send(post(b""))  # and the client's connection lives on
    await proxy.backend.accept()


@pytest.mark.parametrize("die", [Peer.close, Peer.reset], ids=["FIN", "RST"])
async def test_death_between_events_ends_the_stream_with_the_error(
    proxy: Proxy, die: object
) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS + event("1"))
    await client.head()
    assert await client.chunk() == b"data: 1\n\n"
    assert callable(die)
    die(backend)
    assert await client.chunk() == proxy.error_event
    assert await client.chunk() == b""
    await until(lambda: bool(proxy.relayed))
    assert not proxy.relayed[0].ok
    client.send(post(b""))
    await proxy.backend.accept()


async def test_death_between_events_for_http_1_0(proxy: Proxy) -> None:
    client, backend = await asked(proxy, GET_1_0)
    backend.send(EVENTS + event("1"))
    await client.head()
    backend.close()
    assert await client.rest() == b"data: 1\n\n" + proxy.error_event


async def test_death_in_a_stream_that_had_begun(proxy: Proxy) -> None:
    proxy.opening = [b": loading\n\n"]
    client, backend = await asked(proxy)
    backend.send(EVENTS + event("1"))
    await client.head()
    assert [await client.chunk(), await client.chunk()] == [b": loading\n\n", b"data: 1\n\n"]
    backend.close()
    assert [await client.chunk(), await client.chunk()] == [proxy.error_event, b""]


@pytest.mark.parametrize(
    "cut",
    [
        b"20\r\ndata: cut",
        b"b\r\ndata: cut\n\n",
        b"b\r\ndata: cut\n\n\r",
        b"2",
        b"2\r",
        b"0",
        b"0\r\n",
        b"4\r\nda\r\n\r\n",
        chunk(b"data: half an eve"),
    ],
)
async def test_death_elsewhere_shows_as_truncation(proxy: Proxy, cut: bytes) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS + event("1"))
    await client.head()
    await client.chunk()
    backend.send(cut)
    assert await client.exactly(len(cut)) == cut
    backend.close()
    assert await client.rest() == b""
    await until(lambda: bool(proxy.relayed))
    assert not proxy.relayed[0].ok


@pytest.mark.parametrize(
    "sent",
    [
        OK + b"content-length: 100\r\n\r\n{\n\n",
        OK + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n3\r\n{\n\n\r\n",
        OK + b"content-type: text/event-stream\r\ncontent-length: 100\r\n\r\ndata: 1\n\n",
    ],
)
async def test_death_in_an_answer_that_is_no_stream_shows_as_truncation(
    proxy: Proxy, sent: bytes
) -> None:
    client, backend = await asked(proxy)
    backend.send(sent)
    await client.until(b"\n\n")
    backend.close()
    data = await client.rest()
    assert proxy.error_event not in data
    assert not data.endswith(b"0\r\n\r\n")


async def test_events_whose_end_comes_alone_still_end(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS)
    for piece in (b"9\r\n", b"data: 1\n", b"\n", b"\r", b"\n"):
        backend.send(piece)
        assert (await client.until(piece)).endswith(piece)
    backend.close()
    assert [await client.chunk(), await client.chunk()] == [proxy.error_event, b""]


async def test_nonsense_in_the_framing_ends_the_stream(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS + event("1"))
    await client.head()
    await client.chunk()
    backend.send(b"not a chunk\r\n")
    assert await client.rest() == b""
    await backend.gone()


async def test_a_stall_counts_as_death(proxy: Proxy, clock: VirtualClock) -> None:
    proxy.idle_timeout_s = 5.0
    client, backend = await asked(proxy)
    backend.send(EVENTS + event("1"))
    await client.head()
    await client.chunk()
    await clock.advance(4)
    backend.send(event("2"))
    await client.chunk()
    await clock.advance(4)
    assert not proxy.relayed
    await clock.advance(3)
    assert await client.chunk() == proxy.error_event
    await backend.gone()
    assert isinstance(proxy.relayed[0].error, UpstreamTimeout)


# The client's leaving.


@pytest.mark.parametrize(
    "sent",
    [b"", EVENTS, EVENTS + event("1"), OK + b"content-length: 9\r\n\r\n"],
    ids=["silent", "head", "streaming", "waiting for the body"],
)
@pytest.mark.parametrize("leave", [Peer.close, Peer.reset], ids=["FIN", "RST"])
async def test_a_client_that_leaves_closes_the_backends_connection(
    proxy: Proxy, sent: bytes, leave: object
) -> None:
    client, backend = await asked(proxy)
    backend.send(sent)
    if b"data" in sent:
        await client.until(b"data: 1\n\n")
    assert callable(leave)
    leave(client)
    await backend.gone()
    await until(lambda: proxy.edge.server.connections == 0)


async def test_a_slow_reader_slows_the_backend_and_nobody_else(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's has it
    backend.writer.transport.set_write_buffer_limits(high=MIB)
    backend.send(EVENTS)
    sent = 0
    data = chunk(b"x" * 65536)

    async def flood() -> None:
        nonlocal sent
        while sent < 512:
            backend.send(data)
            await backend.writer.drain()
            sent += 1

    task = asyncio.create_task(flood())
    last = -1
    while sent != last:
        last = sent
        for _ in range(50):
            await asyncio.sleep(0)
    assert sent * 65536 < 16 * MIB, "kernel buffers, 256 KiB of ours, 1 MiB of the sender's"
    other, second = await asked(proxy)
    second.send(OK + b"content-length: 2\r\n\r\nok")
    assert (await other.answer()).body == b"ok"
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    await client.head()
    for _ in range(512):
        assert len(await client.chunk()) == 65536
    await task
    backend.send(b"0\r\n\r\n")
    assert await client.chunk() == b""


async def test_a_drain_ends_streams_with_the_error(proxy: Proxy, clock: VirtualClock) -> None:
    client, backend = await asked(proxy)
    backend.send(EVENTS + event("1"))
    await client.head()
    await client.chunk()
    sleepers = clock.sleepers
    drain = asyncio.create_task(proxy.edge.server.drain(grace_s=10))
    await until(lambda: clock.sleepers == sleepers + 1)
    await clock.advance(4)
    backend.send(event("2"))
    assert await client.chunk() == b"data: 2\n\n"
    await clock.advance(10)
    assert [await client.chunk(), await client.chunk()] == [proxy.error_event, b""]
    await drain
    await backend.gone()


@pytest.mark.parametrize("cut", range(1, 36, 2))
async def test_trailers_pass_wherever_they_are_cut(proxy: Proxy, cut: int) -> None:
    client, backend = await asked(proxy)
    sent = event("1") + b"0\r\nx-usage: 12 34\r\n\r\n"
    backend.send(EVENTS + sent[:cut])
    await client.head()
    came = await client.exactly(cut)
    backend.send(sent[cut:])
    assert came + await client.exactly(len(sent) - cut) == sent
    await until(lambda: bool(proxy.relayed))
    assert proxy.relayed[0].ok


async def test_line_breaks_before_an_answer_never_pass(proxy: Proxy) -> None:
    client, backend = await asked(proxy)
    backend.send(b"\r\n\n\r" + OK + b"content-length: 0\r\n\r\n")
    assert (await client.answer()).status == 502

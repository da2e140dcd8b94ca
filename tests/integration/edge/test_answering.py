"""Handlers, their errors, their clients' leaving, back-pressure, and the server's own end."""

from __future__ import annotations

import asyncio
import resource
import socket
from pathlib import Path

import pytest
import structlog
from tests.integration.edge.conftest import POST, MakeEdge, Peer, post, until

from serverlessllm.core.errors import ModelNotFound, TooManyRequests
from serverlessllm.core.ids import Address
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.openai.errors import render_error
from serverlessllm.testing.clock import VirtualClock

MIB = 1 << 20


class Held:
    """A handler that waits until it is told, and notes how it ended."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.ended: list[str] = []
        self.start_first = False

    async def __call__(self, request: Request) -> None:
        try:
            await request.body()
            if self.start_first:
                request.start(200)
                await request.write(b"first")
            self.entered.set()
            await self.go.wait()
            if self.start_first:
                request.finish()
            else:
                request.respond(200, (), b"done")
            self.ended.append("answered")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


async def ok(request: Request) -> None:
    request.respond(200, (), b"ok")


async def test_an_error_of_the_tree_is_rendered(make_edge: MakeEdge) -> None:
    async def missing(request: Request) -> None:
        raise ModelNotFound("no model of that name", param="model")

    edge = await make_edge(missing)
    client = await edge.connect(post(b"{}") + post(b"{}"))
    for _ in range(2):  # the connection lives on
        answer = await client.answer()
        assert answer.status == 404
        assert b'"code":"model_not_found"' in answer.body
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["server-timing"] == "total;dur=1"


async def test_a_busy_answer_says_when_to_come_back(make_edge: MakeEdge) -> None:
    async def busy(request: Request) -> None:
        raise TooManyRequests("the queue is full", retry_after_s=1000)

    answer = await (await make_edge(busy)).ask(post(b""))
    assert (answer.status, answer.headers["retry-after"]) == (429, "120")


async def test_a_bug_is_a_500_that_the_log_can_find(make_edge: MakeEdge) -> None:
    async def bug(request: Request) -> None:
        raise KeyError("a secret")

    edge = await make_edge(bug)
    with structlog.testing.capture_logs() as logs:
        answer = await edge.ask(post(b"", "x-request-id: find-me"))
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert logs[0]["request_id"] == "find-me"


async def test_a_handler_that_does_not_answer_is_a_bug(make_edge: MakeEdge) -> None:
    async def silent(request: Request) -> None:
        await request.body()

    edge = await make_edge(silent)
    with structlog.testing.capture_logs() as logs:
        assert (await edge.ask(post(b""))).status == 500
    assert logs


async def test_an_error_after_the_first_byte_cuts_the_answer(make_edge: MakeEdge) -> None:
    async def dies(request: Request) -> None:
        request.start(200)
        await request.write(b"first")
        raise ModelNotFound("too late")

    client = await (await make_edge(dies)).connect(post(b""))
    await client.head()
    data = await client.rest()
    assert not data.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("start_first", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("leave", [Peer.close, Peer.reset], ids=["FIN", "RST"])
async def test_a_client_that_leaves_cancels_its_handler_at_once(
    make_edge: MakeEdge, start_first: bool, leave: object
) -> None:
    held = Held()
    held.start_first = start_first
    edge = await make_edge(held)
    client = await edge.connect(post(b""))
    await held.entered.wait()
    assert callable(leave)
    leave(client)
    await until(lambda: held.ended == ["cancelled"])
    await until(lambda: edge.server.connections == 0)


async def test_a_client_that_half_closes_has_left(make_edge: MakeEdge) -> None:
    held = Held()
    edge = await make_edge(held)
    client = await edge.connect(post(b""))
    await held.entered.wait()
    client.writer.write_eof()
    await until(lambda: held.ended == ["cancelled"])
    assert await client.rest() == b""


async def test_a_client_that_leaves_in_its_body_cancels_the_handler(make_edge: MakeEdge) -> None:
    held = Held()
    edge = await make_edge(held)
    client = await edge.connect(POST + b"content-length: 10\r\n\r\n123")
    await until(lambda: edge.server.connections == 1)
    client.close()
    await until(lambda: edge.server.connections == 0)
    assert not held.entered.is_set()


async def test_requests_behind_the_one_that_is_left_never_run(make_edge: MakeEdge) -> None:
    held = Held()
    edge = await make_edge(held)
    client = await edge.connect(post(b"1") + post(b"2") + post(b"3"))
    await held.entered.wait()
    client.close()
    await until(lambda: edge.server.connections == 0)
    assert held.ended == ["cancelled"]


async def test_what_is_answered_still_goes_out_after_a_fin(make_edge: MakeEdge) -> None:
    async def big(request: Request) -> None:
        request.respond(200, (), b"x" * 4 * MIB)

    client = await (await make_edge(big)).connect(post(b""))
    await client.until(b"\r\n\r\n")
    client.writer.write_eof()
    assert len(await client.rest()) == 4 * MIB


class Flood:
    """Streams until it may write no more, counting."""

    def __init__(self) -> None:
        self.written_bytes = 0
        self.cancelled = asyncio.Event()

    async def __call__(self, request: Request) -> None:
        if request.path != "/v1/chat/completions":
            await ok(request)
            return
        request.start(200)
        try:
            while True:
                self.written_bytes += 65536
                await request.write(b"x" * 65536)
        finally:
            self.cancelled.set()


async def _stands_still(flood: Flood) -> None:
    """Return when the flood writes no more."""
    last = -1
    while flood.written_bytes != last:
        last = flood.written_bytes
        for _ in range(50):
            await asyncio.sleep(0)


async def test_a_slow_reader_waits_alone_and_is_cut_in_the_end(
    make_edge: MakeEdge, clock: VirtualClock
) -> None:
    flood = Flood()
    edge = await make_edge(flood)
    slow = await edge.connect(post(b""))
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's has it
    await _stands_still(flood)
    assert flood.written_bytes < 16 * MIB, "what the kernel takes, and 256 KiB"
    assert (await edge.ask(b"GET /other HTTP/1.1\r\nhost: edge\r\n\r\n")).body == b"ok"
    await clock.advance(59)
    assert not flood.cancelled.is_set()
    await clock.advance(4)
    assert flood.cancelled.is_set()


async def test_a_reader_that_reads_is_never_cut(make_edge: MakeEdge, clock: VirtualClock) -> None:
    flood = Flood()
    edge = await make_edge(flood)
    client = await edge.connect(post(b""))
    await client.head()
    for _ in range(10):
        for _ in range(100):
            await client.chunk()
        await clock.advance(40)
    assert not flood.cancelled.is_set()


async def test_too_many_connections_are_told_so(make_edge: MakeEdge) -> None:
    edge = await make_edge(ok, connections_max=1)
    first = await edge.connect(post(b""))
    assert (await first.answer()).status == 200
    second = await edge.connect()
    answer = await second.answer()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    second.close()
    await until(lambda: edge.server.connections == 1)
    first.send(post(b""))
    assert (await first.answer()).status == 200


async def test_connections_that_are_not_counted_take_nobody_s_place(
    make_edge: MakeEdge, short_path: Path
) -> None:
    edge = await make_edge(ok, connections_max=1)
    await edge.server.start(Address(f"unix:{short_path}/own.sock"), counted=False)
    own = [await asyncio.open_unix_connection(short_path / "own.sock") for _ in range(3)]
    await until(lambda: edge.server.connections == 3)
    first = await edge.connect(post(b""))
    assert (await first.answer()).status == 200
    second = await edge.connect()
    assert (await second.answer()).status == 503
    for reader, writer in own:
        writer.write(post(b""))
        assert (await reader.readline()).split()[1] == b"200"
        writer.close()
        await writer.wait_closed()


async def test_running_out_of_descriptors_is_survived(make_edge: MakeEdge) -> None:
    edge = await make_edge(ok)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = [socket.socket() for _ in range(3)]
    lowest = min(one.fileno() for one in kept)
    try:
        peers = [await edge.connect() for _ in range(2)]
        for one in kept:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 6, hard))
        refused = 0
        for _ in range(12):
            try:
                peers.append(await edge.connect())
            except OSError:
                refused += 1
        assert refused
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for peer in peers:
        peer.reset()
    await until(lambda: edge.server.connections == 0)
    assert (await edge.ask(post(b""))).status == 200


async def test_a_drain_lets_answers_finish(make_edge: MakeEdge, clock: VirtualClock) -> None:
    held = Held()
    edge = await make_edge(held)
    idle = await edge.connect()
    busy = await edge.connect(post(b""))
    await held.entered.wait()
    drain = asyncio.create_task(edge.server.drain(grace_s=60))
    await until(lambda: clock.sleepers == 2)
    late = await edge.connect(post(b""))  # still accepted
    await until(lambda: edge.server.connections == 3)
    await clock.advance(2.5)
    assert await idle.rest() == b""
    with pytest.raises(OSError, match="refused"):
        await edge.connect()
    held.go.set()
    for client in (busy, late):
        answer = await client.answer()
        assert (answer.body, answer.headers["connection"]) == (b"done", "close")
    await drain
    assert held.ended == ["answered", "answered"]
    assert edge.server.connections == 0


async def test_a_drain_cuts_what_does_not_finish(make_edge: MakeEdge, clock: VirtualClock) -> None:
    held = Held()
    edge = await make_edge(held)
    busy = await edge.connect(post(b""))
    await held.entered.wait()
    drain = asyncio.create_task(edge.server.drain(grace_s=60))
    await until(lambda: clock.sleepers == 2)
    await clock.advance(63)
    answer = await busy.answer()
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert b'"draining"' in answer.body
    await drain
    assert held.ended == ["cancelled"]


async def test_closing_cancels_and_waits_for_handlers(make_edge: MakeEdge) -> None:
    ended = asyncio.Event()

    async def tidy(request: Request) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    edge = await make_edge(tidy)
    await edge.connect(post(b""))
    await until(lambda: edge.server.connections == 1)
    await edge.server.close()
    assert ended.is_set() or edge.server.connections == 0


async def test_small_answers_do_not_wait_for_acknowledgements(make_edge: MakeEdge) -> None:
    options: list[int] = []

    async def look(request: Request) -> None:
        transport = request.line._transport  # type: ignore[attr-defined]
        accepted = transport.get_extra_info("socket")
        options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        request.respond(200)

    await (await make_edge(look)).ask(post(b""))
    assert options == [1]


async def test_a_unix_socket_is_taken_over_and_removed(short_path: Path) -> None:
    path = short_path / "e.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = EdgeServer(ok, EdgeSettings(), render_error, VirtualClock())
    address = Address(f"unix:{path}")
    assert await server.start(address) == address
    reader, writer = await asyncio.open_unix_connection(path)
    client = Peer(reader, writer)
    client.send(post(b""))
    assert (await client.answer()).body == b"ok"
    client.close()
    await server.close()
    assert not path.exists()


async def test_an_address_that_is_none_is_refused() -> None:
    server = EdgeServer(ok, EdgeSettings(), render_error, VirtualClock())
    with pytest.raises(ValueError, match="unix:/path"):
        await server.start(Address("ftp://example"))


async def test_headers_cannot_be_broken_out_of(make_edge: MakeEdge) -> None:
    async def splits(request: Request) -> None:
        request.respond(200, [("x-a", "1\r\nx-b: 2")])

    edge = await make_edge(splits)
    with structlog.testing.capture_logs():
        answer = await edge.ask(post(b""))
    assert answer.status == 500
    assert "x-b" not in answer.headers

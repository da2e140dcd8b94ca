"""No body that a client can send holds the event loop of the front door."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvloop
from tests.integration.orchestrator.conftest import JSON, ScriptedAgent, _running, beating

from serverlessllm.core.ids import Address
from serverlessllm.edge.server import Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.testing.hostile_http import CASES, CHAT, SLOW, Case
from serverlessllm.testing.hostile_json import START, bodies

STALL_S = 0.020
SOON_S = 60.0
TRIES = 3
"""A neighbour on the same core makes the same work take longer, but not each time."""
ANSWER = (
    b'{"id":"x","object":"o","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"text":"ok","message":{"role":"assistant","content":"ok"}}],"count":1,"tokens":[1],'
    b'"max_model_len":9,"data":[],"results":[]}'
)


class Quick(ScriptedAgent):
    """Reads nothing: it shares the loop with the front door, which alone is measured."""

    async def _serve(self, request: Request) -> None:
        await request.body()
        request.respond(200, JSON, ANSWER)


class Turns:
    """What each turn of an event loop costs: CPU time of this process, so that no neighbour counts,
    and a thread that keeps the interpreter does. A turn is one callback or more."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.worst_s = 0.0
        self._last_s = 0.0
        self._on = False

    def begin(self) -> None:
        self.worst_s, self._last_s, self._on = 0.0, time.process_time(), True
        self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        now_s = time.process_time()
        self.worst_s = max(self.worst_s, now_s - self._last_s)
        self._last_s = now_s
        if self._on:
            self._loop.call_soon(self._turn)

    def end(self) -> None:
        self._on = False


class Watched(threading.Thread):
    """A cluster on a watched event loop of its own."""

    def __init__(self) -> None:
        super().__init__(name="watched", daemon=True)
        self.started = threading.Event()

    def run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        edge = EdgeSettings(drain_accept_s=0.0, header_timeout_s=0.3, sweep_interval_s=0.05)
        async with _running(0, OrchestratorSettings(agent_wait_s=0.3), edge) as cluster:
            where = Address(f"unix:{cluster.directory}/quick.sock")
            agent = Quick("quick", cluster.registry, where)
            cluster.agents.append(agent)
            await agent.start()
            await cluster.warm("m")
            host, _, port = cluster.url.removeprefix("http://").rpartition(":")
            self.where = host, int(port)
            self.turns = Turns(self._loop)
            self.started.set()
            await beating(agent, self._ended)

    def call(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(function)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(SOON_S)

    def cost_s(self, data: bytes) -> tuple[float, bytes]:
        """What the worst turn cost while this was sent and answered, and the answer's status."""
        with socket.create_connection(self.where, SOON_S) as sock:
            self.call(self.turns.begin)
            try:
                sock.sendall(data)
                answer = sock.recv(1 << 16)
            except ConnectionResetError:
                answer = b""
            self.call(self.turns.end)
            return self.turns.worst_s, answer[9:12]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self.join(SOON_S)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    watched = Watched()
    watched.start()
    assert watched.started.wait(SOON_S)
    yield watched
    watched.close()


def post(path: str, body: bytes) -> bytes:
    head = CHAT.replace(b"/v1/chat/completions", path.encode())
    return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)


def stalls(watched: Watched, data: bytes) -> float:
    """The worst turn in the best of some tries; 0 when it is no stall."""
    costs = []
    for _ in range(TRIES):
        cost_s, status = watched.cost_s(data)
        assert status[:1] != b"5", status
        if cost_s <= STALL_S:
            return 0.0
        costs.append(cost_s)
    return min(costs)


@pytest.mark.parametrize("path", START)
def test_no_body_holds_the_event_loop(watched: Watched, path: str) -> None:
    stalled = {name: stalls(watched, post(path, body)) for name, body in bodies(path)}
    assert {name: cost_s for name, cost_s in stalled.items() if cost_s} == {}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.then == "read" and case not in SLOW],
    ids=lambda c: c.name,
)
def test_no_connection_holds_the_event_loop(watched: Watched, case: Case) -> None:
    assert not stalls(watched, b"".join(case.sends) or b"\r\n")


def test_small_chunks_do_not_hold_the_event_loop(watched: Watched) -> None:
    head = CHAT + b"transfer-encoding: chunked\r\n\r\n"
    assert not stalls(watched, head + b"1\r\na\r\n" * (1 << 19) + b"0\r\n\r\n")

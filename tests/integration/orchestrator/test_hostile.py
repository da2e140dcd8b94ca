"""The front door under hostile clients: each gets what is allowed, and nothing of it stays."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import msgspec
import pytest
import structlog
import uvloop
from tests.integration.orchestrator.conftest import _running, beating

from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.hostile_http import ALIVE, CASES, GOOD, SLOW, Case
from serverlessllm.testing.waiting import eventually_blocking

SOON_S = 60.0
PACE_S = 0.02
"""How fast a slow client is: what it is answered must not depend on it."""
KEPT = 8
"""Descriptors of connections that are kept for the next request, and tasks of the metadata that
come and go: less than one for each case."""
EDGE = EdgeSettings(
    header_timeout_s=0.3,
    body_timeout_s=0.4,
    body_rate_grace_s=0.2,
    idle_timeout_s=1.0,
    swallow_s=0.1,
    sweep_interval_s=0.05,
    drain_accept_s=0.0,
)


class Served(threading.Thread):
    """A cluster on an event loop of its own, so that nothing but the server runs on it."""

    def __init__(self) -> None:
        super().__init__(name="served", daemon=True)
        self.started = threading.Event()
        self.complaints: list[str] = []
        """What reached the loop or the log that should have ended in a request."""
        self._loop: asyncio.AbstractEventLoop
        self._ended: asyncio.Event

    def run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, told: self.complaints.append(repr(told)))
        self._ended = asyncio.Event()
        settings = OrchestratorSettings(agent_wait_s=0.3)
        async with _running(1, settings, EDGE) as cluster:
            await cluster.warm("m")
            self.cluster = cluster
            host, _, port = cluster.url.removeprefix("http://").rpartition(":")
            self.where = host, int(port)
            self.started.set()
            await beating(cluster.agents[0], self._ended)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self.join(SOON_S)
        assert not self.is_alive()

    def connections(self) -> int:
        edge = self.cluster.front._edge
        assert edge is not None
        return edge.connections

    def tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result(SOON_S)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    before = structlog.get_config()["processors"]

    def hear(_: Any, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        if method in {"exception", "error", "critical"}:
            served.complaints.append(repr(event))
        raise structlog.DropEvent

    structlog.configure(processors=[hear])
    served.start()
    assert served.started.wait(SOON_S)
    yield served
    served.close()
    structlog.configure(processors=before)


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes


class Told:
    """What the server says on one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self.closed = False

    def answer(self, *, head: bool = False) -> Answer | None:
        """The next answer; None: the connection has ended before it."""
        lines = self._until(b"\r\n\r\n")
        if lines is None:
            return None
        first, *fields = lines.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        if status == 100:
            return self.answer(head=head)
        pairs = (line.partition(":") for line in fields if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if head:
            return Answer(status, headers, b"")
        if "transfer-encoding" in headers:
            body = self._until(b"0\r\n\r\n")
        else:
            body = self._exactly(int(headers["content-length"]))
        return None if body is None else Answer(status, headers, body)

    def _until(self, mark: bytes) -> bytes | None:
        while mark not in self._data:
            if not self._more():
                return None
        found, _, self._data = self._data.partition(mark)
        return found + mark

    def _exactly(self, size: int) -> bytes | None:
        while len(self._data) < size:
            if not self._more():
                return None
        found, self._data = self._data[:size], self._data[size:]
        return found

    def _more(self) -> bool:
        try:
            data = self._sock.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self._data += data
        self.closed = not data
        return bool(data)


def play(where: tuple[str, int], case: Case) -> tuple[list[Answer], bool]:
    """Every answer, and whether the server has ended the connection."""
    with socket.create_connection(where, SOON_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _send(sock, case)
        if case.then == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return [], True
        if case.then == "fin":
            sock.shutdown(socket.SHUT_WR)
        told = Told(sock)
        answers: list[Answer] = []
        head = case.sends[0].startswith(b"HEAD")
        while case.closes or len(answers) < case.answers[0]:
            answer = told.answer(head=head)
            if answer is None:
                break
            answers.append(answer)
        if not case.closes and not told.closed and case.then == "read":
            sock.sendall(ALIVE)
            assert (again := told.answer()) is not None
            assert again.status == 200
        return answers, told.closed


def _send(sock: socket.socket, case: Case) -> None:
    """Until it is all sent, or the server takes no more."""
    if case.then == "deaf":
        sock.settimeout(0.2)
    try:
        for data in case.sends:
            sock.sendall(data)
            if len(case.sends) > 1 and case.then != "deaf":
                time.sleep(PACE_S)
        while case.then == "drip":
            sock.sendall(b"a")
            time.sleep(PACE_S)
            if _heard(sock):
                return
    except (ConnectionResetError, BrokenPipeError, TimeoutError):
        return
    finally:
        sock.settimeout(SOON_S)


def _heard(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


def check(case: Case, answer: Answer) -> None:
    assert answer.status in case.statuses
    assert answer.headers["x-request-id"] != "smuggled"
    assert answer.headers["server-timing"]
    if answer.status >= 400:
        error = json.loads(answer.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in error["message"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_client_gets_what_it_may_and_no_more(served: Served, case: Case) -> None:
    answers, closed = play(served.where, case)
    least, most = case.answers
    assert least <= len(answers) <= most
    for answer in answers:
        check(case, answer)
    assert closed or not case.closes
    good, _ = play(served.where, GOOD[0])
    assert [answer.status for answer in good] == [200]
    assert served.complaints == []


def test_nothing_of_them_stays(served: Served) -> None:
    eventually_blocking(lambda: served.connections() == 0)
    good, _ = play(served.where, GOOD[0])  # whatever is kept for the next request is there
    assert [answer.status for answer in good] == [200]
    tasks, descriptors = served.tasks(), open_descriptors()
    for case in CASES:
        if case not in SLOW:
            play(served.where, case)
    eventually_blocking(lambda: served.connections() == 0)
    eventually_blocking(lambda: served.tasks() <= tasks + KEPT)
    eventually_blocking(lambda: len(open_descriptors() - descriptors) <= KEPT)
    assert served.complaints == []

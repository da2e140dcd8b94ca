"""Many clients at once, clients that leave, clients that do not read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.served import Served, serving_anew

from serverlessllm.agent.settings import AgentSettings
from serverlessllm.core.ids import Address
from serverlessllm.testing.answers import Answer, ask_chat, check_error, figure
from serverlessllm.testing.hub import HubServer
from serverlessllm.testing.management import call, register
from serverlessllm.testing.waiting import eventually_blocking

CROWD = 200


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, hub: HubServer) -> Iterator[Served]:
    with serving_anew(tmp_path_factory.mktemp("crowd"), {"ingest.hub_endpoint": hub.url}) as system:
        talk = {"tokens": "100000", "token_s": "0.02"}
        register(system.address, model="talking", backend="fake", options=talk)
        silent = {"first_token_s": "3600"}
        register(system.address, model="silent", backend="fake", options=silent)
        yield system


def crowd(system: Served, hub: HubServer, model: str) -> list[Answer]:
    """What `CROWD` clients are answered who all ask before the hub gives the first byte."""
    hub.gate.clear()
    try:
        with ThreadPoolExecutor(CROWD) as pool:
            asked = [
                pool.submit(ask_chat, system.address, model, max_tokens=2) for _ in range(CROWD)
            ]
            waiting = "sllm_requests_waiting"
            eventually_blocking(lambda: figure(system.address, waiting, model=model) == CROWD)
            hub.gate.set()
            return [each.result() for each in asked]
    finally:
        hub.gate.set()


@pytest.mark.parametrize("slots", [CROWD, 2])
def test_a_crowd_for_a_cold_model_causes_one_ingest_and_one_load(system, hub, weights, slots):
    model = f"org/crowd-{slots}"
    hub.reset()
    hub.add(model, {"model.gguf": weights})
    spec = {"model": model, "source": f"hf://{model}", "backend": "fake"}
    register(system.address, **spec, options={"slots": str(slots), "token_s": "0.01"})
    counted = {"sllm_ingests_total": "ok", "sllm_loads_total": "ok"}
    before = {name: figure(system.address, name, outcome=ok) for name, ok in counted.items()}

    answers = crowd(system, hub, model)
    served = [answer for answer in answers if answer.status == 200]
    for answer in answers:
        if answer.status != 200:
            check_error(answer, 429, "queue_full")
    room = int(slots * (1 + AgentSettings().queue_factor))
    assert min(CROWD, room) <= len(served) <= CROWD
    assert len({json.dumps(answer.json()["choices"]) for answer in served}) == 1

    for name, ok in counted.items():
        assert figure(system.address, name, outcome=ok) == before[name] + 1, name
    assert hub.requests["api"] == 1
    assert hub.bytes_sent < 2 * weights.stat().st_size
    job = call(system.address, "GET", f"/api/jobs/{model}")
    assert (job["stage"], job["error"]) == ("done", None)
    assert system.starts(model) == 1
    assert ask_chat(system.address, model).status == 200
    assert system.held() == 0


def test_a_crowd_for_a_name_that_only_the_hub_knows(system, hub, weights):
    model = "org/new"
    hub.reset()
    hub.add(model, {"model.gguf": weights})
    answers = crowd(system, hub, model)
    served = [answer for answer in answers if answer.status == 200]
    assert served
    for answer in answers:
        if answer.status != 200:
            check_error(answer, 429, "queue_full")
    assert hub.requests["api"] == 1
    assert system.starts(model) == 1


class Client:
    """A raw connection that has asked for a chat."""

    def __init__(self, address: Address, model: str, *, stream: bool, buffer: int = 0) -> None:
        host, _, port = address.removeprefix("http://").partition(":")
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(30)
        self.socket.connect((host, int(port)))
        chat = {"model": model, "messages": [{"role": "user", "content": "Go."}], "stream": stream}
        body = json.dumps(chat).encode()
        self.socket.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )

    def read_until(self, text: bytes) -> None:
        seen = b""
        while text not in seen:
            more = self.socket.recv(65536)
            assert more, seen
            seen += more

    def leave(self) -> None:
        self.socket.close()


@pytest.mark.parametrize(
    ("model", "stream"),
    [("silent", True), ("silent", False), ("talking", True), ("talking", False)],
)
def test_a_client_that_leaves_is_noticed(system, model, stream):
    gone = figure(system.address, "sllm_clients_gone_total")
    client = Client(system.address, model, stream=stream)
    try:
        if model == "talking" and stream:
            client.read_until(b'"content":" ')
        eventually_blocking(lambda: system.backend("running") == 1)
        assert system.held() == 1
    finally:
        client.leave()
    eventually_blocking(lambda: system.backend("running") == 0)
    eventually_blocking(lambda: system.held() == 0)
    assert figure(system.address, "sllm_clients_gone_total") == gone + 1


def test_a_client_that_leaves_a_loading_model_is_no_reason_to_start_it(system, hub, weights):
    model = "org/unwanted"
    hub.reset()
    hub.add(model, {"model.gguf": weights})
    hub.gate.clear()
    waiting = "sllm_requests_waiting"
    try:
        client = Client(system.address, model, stream=True)
        try:
            client.read_until(b"\n: ")  # a comment tells how far the load is
        finally:
            client.leave()
        eventually_blocking(lambda: figure(system.address, waiting, model=model) == 0)
    finally:
        hub.gate.set()
    # What is fetched already is not thrown away; the engine is not started.
    jobs = f"/api/jobs/{model}"
    eventually_blocking(lambda: call(system.address, "GET", jobs)["stage"] == "done")
    assert system.starts(model) == 0


def test_a_client_that_does_not_read_holds_up_nobody_else(system):
    flood = {"tokens": "1000000", "slots": "8"}
    register(system.address, model="flooding", backend="fake", options=flood)
    client = Client(system.address, "flooding", stream=True, buffer=4096)
    try:
        client.read_until(b"data: ")
        seen: list[int] = []

        def stalled() -> bool:
            """The back-pressure has gone all the way to the engine: whoever could pass on more has
            had a turn between two looks."""
            call(system.address, "GET", "/api/models")
            seen.append(system.backend("progress"))
            return len(seen) > 10 and len(set(seen[-10:])) == 1

        eventually_blocking(stalled)
        assert system.backend("running") == 1
        for _ in range(20):
            assert ask_chat(system.address, "flooding", max_tokens=1).status == 200
        assert system.backend("running") == 1
        assert system.backend("progress") == seen[-1] + 20
    finally:
        client.leave()
    eventually_blocking(lambda: system.backend("running") == 0)

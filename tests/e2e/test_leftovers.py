"""What `sllm serve` leaves, ended in good order or killed, and what the next one makes of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from tests.e2e.served import Served, serving

from serverlessllm.core.ids import Address
from serverlessllm.testing.answers import Answer, ask_chat, connect
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.hub import HubServer
from serverlessllm.testing.management import call, register
from serverlessllm.testing.processes import alive
from serverlessllm.testing.waiting import eventually_blocking

CLIENTS = 12
TOKENS = 60
ENDLESS = 1_000_000
"""So many tokens take hours: such a stream does not end by itself."""
DRAM = 1


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


def register_models(system: Served, weights: Path) -> None:
    slow = {"tokens": str(ENDLESS), "token_s": "0.02", "slots": str(CLIENTS)}
    register(system.address, model="slow", backend="fake", options=slow)
    register(system.address, model="tiny", source=weights.as_uri(), backend="llamacpp")


def stream(
    address: Address,
    model: str,
    *,
    tokens: int = TOKENS,
    read_lines: int | None = None,
    begun: Callable[[], object] | None = None,
) -> list[str]:
    """The data lines of a streamed chat; who wants only some leaves after them. `begun` is called
    after the first."""
    connection = connect(address)
    try:
        chat = {"model": model, "messages": [{"role": "user", "content": "Go."}], "stream": True}
        headers = {"content-type": "application/json"}
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(chat | {"max_tokens": tokens}), headers
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        lines: list[str] = []
        while read_lines is None or len(lines) < read_lines:
            line = answer.readline()
            if not line:
                break
            if line.startswith(b"data: "):
                lines.append(line[len(b"data: ") :].decode().strip())
                if begun is not None and len(lines) == 1:
                    begun()
        return lines
    finally:
        connection.close()


def is_whole(lines: list[str]) -> bool:
    return len(lines) > 2 and lines[-1] == "[DONE]"


def is_broken_by_contract(lines: list[str]) -> bool:
    """An error as the last event, and nothing that looks like an end."""
    *events, last = map(json.loads, lines)
    return "error" in last and all(
        choice["finish_reason"] is None for event in events for choice in event["choices"]
    )


def sockets(system: Served) -> list[Path]:
    return [path for path in system.runtime_dir.rglob("*") if path.is_socket()]


def kill_children(system: Served, kind: str) -> int:
    """`kill -9` for those whose command line says `kind`; how many."""
    children = system.process.children(kind)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return len(children)


def check_warm(system: Served, model: str) -> None:
    """What the process before us had in memory is used as it lies there: no byte is read."""

    def placed() -> bool:
        placements = call(system.address, "GET", f"/api/models/{model}")["placements"]
        return any(p["on_agent"]["cache_level"] == DRAM for p in placements)

    eventually_blocking(placed)
    assert ask_chat(system.address, model, max_tokens=2).status == 200
    hops = call(system.address, "GET", f"/api/models/{model}")["last_load"]["hops"]
    assert sum(hop["bytes_moved"] for hop in hops) == 0
    assert not {hop["hop"] for hop in hops} & {"nvme→dram", "store→dram"}


def test_after_a_storm_and_sigterm_nothing_is_left_but_the_cache(data_dir, weights, hub, tmp_path):
    large = write_random_gguf(tmp_path / "large.gguf", layers=20, width=128)
    hub.add("org/large", {"model.gguf": large})
    with serving(data_dir, {"ingest.hub_endpoint": hub.url}) as system:
        register_models(system, weights)
        assert ask_chat(system.address, "tiny", max_tokens=2).status == 200
        with ThreadPoolExecutor(4 * CLIENTS) as pool:
            # Some read to the end, some leave early, some want what is still being fetched.
            hub.gate.clear()
            pulled = pool.submit(ask_chat, system.address, "org/large", max_tokens=1)
            storm = [pool.submit(stream, system.address, "slow") for _ in range(CLIENTS)]
            eventually_blocking(lambda: system.backend("progress") > CLIENTS)
            leavers = [
                pool.submit(stream, system.address, "slow", read_lines=1 + number)
                for number in range(CLIENTS)
            ]
            others = [
                pool.submit(ask_chat, system.address, "tiny", max_tokens=4) for _ in range(CLIENTS)
            ]
            eventually_blocking(lambda: kill_children(system, "ingest.worker") == 1)
            assert kill_children(system, "backends.inside.fake") == 1
            hub.gate.set()
            for each in storm:
                lines = each.result()
                assert is_whole(lines) or is_broken_by_contract(lines)
            assert all(each.result() for each in leavers)
            assert {each.result().status for each in others} == {200}
            assert pulled.result().status == 200

            # SIGTERM while streams run: they are finished, then all ends.
            begun = Barrier(4 + 1)
            last = [pool.submit(stream, system.address, "slow", begun=begun.wait) for _ in range(4)]
            begun.wait()
            children = system.process.children()
            assert len(children) >= 2
            assert system.process.stop() == 0
            assert all(is_whole(each.result()) for each in last)
        assert alive(children) == []
        assert system.leftovers() == []
        assert sockets(system) == []
        log = system.process.log.read_text()
        assert "Traceback" not in log
        assert "Go." not in log

    with serving(data_dir, {"ingest.hub_endpoint": hub.url}) as system:
        for model in ("tiny", "org/large"):
            check_warm(system, model)


def test_after_kill_9_the_next_one_cleans_up(data_dir, weights, hub, tmp_path):
    large = write_random_gguf(tmp_path / "large.gguf", layers=20, width=128)
    hub.add("org/large", {"model.gguf": large})
    settings = {"ingest.hub_endpoint": hub.url, "ingest.lease_s": "2"}
    with (
        serving(data_dir, settings) as system,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        register_models(system, weights)
        assert ask_chat(system.address, "tiny", max_tokens=2).status == 200
        hub.gate.clear()
        pending: list[Future[Answer]] = [pool.submit(ask_chat, system.address, "org/large")]
        begun = Barrier(4 + 1)
        storm = [
            pool.submit(stream, system.address, "slow", tokens=ENDLESS, begun=begun.wait)
            for _ in range(4)
        ]
        begun.wait()
        eventually_blocking(lambda: system.process.children("ingest.worker"))
        children = system.process.children()
        assert len(children) >= 3
        system.process.kill()
        eventually_blocking(lambda: alive(children) == [])
        assert not any(is_whole(each.result()) for each in storm)
        assert all(each.exception() is not None for each in pending)
        hub.gate.set()
        # As if it had been killed in the middle of a copy.
        (system.dram_dir / f"{'0' * 64}.partial").write_bytes(bytes(4096))
        (system.data_dir / "nvme" / f"{'1' * 64}.partial").write_bytes(bytes(4096))
    with serving(data_dir, settings) as system:
        check_warm(system, "tiny")
        assert ask_chat(system.address, "org/large", max_tokens=1).status == 200
        assert is_whole(stream(system.address, "slow"))
        # What is loaded is copied to the disk behind that.
        eventually_blocking(lambda: system.leftovers() == [])
        children = system.process.children()
        assert system.process.stop() == 0
        assert alive(children) == []
        assert sockets(system) == []

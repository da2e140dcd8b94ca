"""`sllm serve --workers 2` as its operator has it."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from tests.e2e.served import Served, serving
from tests.e2e.system import run

from serverlessllm.testing.answers import ask, ask_chat, check_error, check_explained, figure
from serverlessllm.testing.management import register
from serverlessllm.testing.processes import alive
from serverlessllm.testing.waiting import eventually_blocking

TWO = {"orchestrator.workers": "2"}


def workers(served: Served) -> list[int]:
    """Process ids of its workers."""
    return served.process.children("orchestrator.workers")


def test_two_workers_serve_a_model_from_cold_to_warm_and_end_with_the_server(data_dir):
    with serving(data_dir, TWO) as served:
        address = served.address
        register(address, model="fake", backend="fake", aliases=["f"])
        assert len(workers(served)) == 2
        for _ in range(8):  # a connection each: both workers
            answer = ask_chat(address, "f")
            assert answer.status == 200
            assert answer.json()["model"] == "f"
            check_explained(answer)
        assert served.starts("fake") == 1
        assert figure(address, "sllm_requests_total", model="fake", status="200") == 8
        check_error(ask_chat(address, "nothing"), 404, "model_not_found")
        assert ask(address, "GET", "/api/models").json()["models"][0]["model"] == "fake"
        pids = workers(served)
        limit = Path(f"/proc/{pids[0]}/limits").read_text()
        soft, hard = next(
            line.split()[3:5] for line in limit.splitlines() if line.startswith("Max open files")
        )
        assert soft == hard or int(soft) >= 1 << 20
        assert served.process.stop() == 0
    assert alive(pids) == []
    assert not list(served.runtime_dir.glob("*.sock"))


def test_workers_die_with_a_server_that_is_killed(data_dir):
    with serving(data_dir, TWO) as served:
        pids = workers(served)
        port = int(served.address.rpartition(":")[2])
        served.process.kill()
        eventually_blocking(lambda: alive(pids) == [])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_the_terminals_interrupt_reaches_the_server_alone(data_dir):
    with serving(data_dir, TWO) as served:
        group = os.getpgid(served.process.pid)
        assert {os.getpgid(pid) for pid in workers(served)} & {group} == set()
        os.kill(served.process.pid, signal.SIGINT)
        assert served.process.wait() == 0


def test_a_second_server_does_not_share_the_port(data_dir, tmp_path):
    with serving(data_dir, TWO) as served:
        port = served.address.rpartition(":")[2]
        other = ("--data-dir", str(tmp_path / "d"))
        told = run("serve", "--port", port, "--workers", "2", *other)
        assert told.returncode == 1
        assert "in use" in told.stderr
        assert "--port 0" in told.stderr


def test_a_number_of_workers_that_makes_no_sense_is_refused(tmp_path):
    told = run("serve", "--set", "orchestrator.workers=1000", "--data-dir", str(tmp_path / "d"))
    assert told.returncode == 2
    assert "workers: from 0" in told.stderr

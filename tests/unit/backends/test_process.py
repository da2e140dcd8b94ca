"""A supervised process: ready, its end, its group, its output, its environment, its leftovers."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import uvloop

from serverlessllm.backends.base import LaunchPlan
from serverlessllm.backends.child import clean_environment
from serverlessllm.backends.orphans import RECORD, kill_orphans, record_process
from serverlessllm.backends.process import BackendProcess
from serverlessllm.backends.procfs import read_stat, session_cpu_s, session_members
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import LoadFailed
from serverlessllm.core.ids import Address
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.waiting import eventually, eventually_blocking

SETTINGS = BackendSettings(term_s=0.3, log_bytes_max=64 * 1024, log_tail_lines=5)
Start = Callable[..., BackendProcess]
SERVER = """
import http.server, os, socket, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if Handler.asked > 2 else 503)
        self.send_header("content-length", "0")
        self.end_headers()
    def address_string(self): return ""
    def log_message(self, *_): pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    pass
Server(sys.argv[1], Handler).serve_forever()
"""

PARENT = """
import asyncio, os, pathlib, signal, sys
from serverlessllm.backends.base import LaunchPlan
from serverlessllm.backends.process import BackendProcess
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.core.clock import SystemClock
from serverlessllm.testing.waiting import eventually
async def main():
    run = pathlib.Path(sys.argv[1])
    run.mkdir()
    process = BackendProcess(
        LaunchPlan(command=("sleep", "60"), address="unix:/none"), run_dir=run,
        log_path=run / "log", environ=os.environ, settings=BackendSettings(), clock=SystemClock())
    words = pathlib.Path(f"/proc/{process.pid}/cmdline")
    await eventually(lambda: words.read_text().startswith("sleep"))
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    started: list[BackendProcess] = []

    def start(script: str, *arguments: str, **plan: object) -> BackendProcess:
        run_dir = tmp_path / f"run{len(started)}"
        run_dir.mkdir()
        default = LaunchPlan(
            command=(sys.executable, "-I", "-c", script, *arguments),
            address=Address(f"unix:{tmp_path}/none.sock"),
        )
        process = BackendProcess(
            msgspec.structs.replace(default, **plan),
            run_dir=run_dir,
            log_path=tmp_path / "backend.log",
            environ=os.environ | {"AWS_SECRET_ACCESS_KEY": "s", "LC_ALL": "C.UTF-8"},
            settings=SETTINGS,
            clock=SystemClock(),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        await process.stop()


@pytest.fixture
async def client() -> AsyncIterator[Upstreams]:
    upstreams = Upstreams(UpstreamSettings(), SystemClock())
    yield upstreams
    await upstreams.close()


async def said(process: BackendProcess, word: str) -> None:
    """Return when it has printed the word."""
    await eventually(lambda: any(word in line for line in process.log_tail))


async def test_its_end_is_noticed(start: Start) -> None:
    process = start("import time; time.sleep(60)")
    os.kill(process.pid, signal.SIGKILL)
    assert await process.exited == -signal.SIGKILL


def test_it_works_on_uvloop_too(tmp_path: Path) -> None:
    async def main() -> int:
        (tmp_path / "run").mkdir()
        process = BackendProcess(
            LaunchPlan(command=("sh", "-c", "echo out; exit 3"), address=Address("unix:/none")),
            run_dir=tmp_path / "run",
            log_path=tmp_path / "backend.log",
            environ=os.environ,
            settings=SETTINGS,
            clock=SystemClock(),
        )
        status = await process.exited
        await process.stop()
        return status

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == 3
    assert (tmp_path / "backend.log").read_text() == "out\n"


async def test_a_server_that_cannot_tell_is_asked_until_it_is_ready(
    start: Start, client: Upstreams, tmp_path: Path
) -> None:
    socket = tmp_path / "s.sock"
    process = start(SERVER, str(socket), address=Address(f"unix:{socket}"))
    await process.wait_ready(client)
    assert socket.is_socket()
    assert not process.exited.done()


async def test_ending_before_ready_is_a_failed_load_with_its_status(
    start: Start, client: Upstreams
) -> None:
    process = start("import sys; print('no such model'); sys.exit(7)", tells_ready=True)
    with pytest.raises(LoadFailed, match="status 7"):
        await process.wait_ready(client)
    assert "no such model" in process.log_tail


async def test_not_ready_in_time_is_a_failed_load(start: Start, client: Upstreams) -> None:
    process = start("import time; time.sleep(60)", ready_timeout_s=0.05)
    with pytest.raises(LoadFailed, match=r"0\.05 s"):
        await process.wait_ready(client)


async def test_a_command_that_is_not_there_says_so(start: Start) -> None:
    with pytest.raises(LoadFailed, match="'my-server' cannot be started: no such program"):
        start("", command=("my-server", "--uds"))


@pytest.mark.parametrize(("call", "good_calls"), [("pidfd_open", 0), ("pipe", 0), ("pipe", 1)])
async def test_without_descriptors_nothing_is_started_or_left_open(
    start: Start, monkeypatch: pytest.MonkeyPatch, call: str, good_calls: int
) -> None:
    real, calls = getattr(os, call), itertools.count()

    def limited(*arguments: int) -> object:
        if next(calls) >= good_calls:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*arguments)

    def alive() -> list[int]:
        return [
            pid for pid in children() if "sleep(61)" in Path(f"/proc/{pid}/cmdline").read_text()
        ]

    open_before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(f"serverlessllm.backends.process.os.{call}", limited)
        with pytest.raises(LoadFailed, match="Too many open files"):
            start("import time; time.sleep(61)", tells_ready=True)
    assert alive() == []
    assert open_descriptors() <= open_before


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


async def test_stop_ends_the_whole_group_even_if_it_resists(start: Start) -> None:
    process = start(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.fork()\n"
        "print('deaf', flush=True); time.sleep(60)"
    )
    await said(process, "deaf")
    await process.stop()
    assert process.exited.result() == -signal.SIGKILL
    # Killed is not gone: the kernel ends each in its own time.
    await eventually(lambda: not list(session_members(process.pid)))
    await process.stop()


async def test_children_do_not_outlive_a_leader_that_crashes(start: Start) -> None:
    process = start("import os, time\nif os.fork(): os._exit(1)\ntime.sleep(60)")
    assert await process.exited == 1
    await eventually(lambda: not list(session_members(process.pid)))


async def test_a_flood_of_output_never_blocks_it_and_stays_capped(
    start: Start, tmp_path: Path
) -> None:
    process = start("import sys\nfor n in range(40000): print('line', n)\nprint('over')")
    async with asyncio.timeout(30):
        assert await process.exited == 0
    await process.stop()
    assert process.log_tail[-1] == "over"
    assert len(process.log_tail) <= SETTINGS.log_tail_lines
    kept = [path.stat().st_size for path in tmp_path.glob("backend.log*")]
    assert len(kept) == 2
    assert sum(kept) <= SETTINGS.log_bytes_max + 64 * 1024


async def test_output_without_line_ends_does_not_fill_the_memory(start: Start) -> None:
    process = start("import sys; sys.stdout.write('x' * 1_000_000)")
    await process.exited
    await process.stop()
    assert all(len(line) <= 500 for line in process.log_tail)


async def test_it_gets_no_credentials_and_no_descriptors(start: Start) -> None:
    with open(os.devnull) as spare:  # noqa: PTH123 - a descriptor is what this is about
        os.set_inheritable(spare.fileno(), True)
        process = start(
            "import os; print(sorted(os.environ)); print(len(os.listdir('/proc/self/fd')))"
        )
        await process.exited
    await process.stop()
    names, descriptors = process.log_tail
    assert "AWS_SECRET_ACCESS_KEY" not in names
    assert "LC_ALL" in names
    assert int(descriptors) == 4  # three, and the one that lists them


def test_only_named_variables_are_inherited() -> None:
    kept = clean_environment({"HF_TOKEN": "x", "CUDA_VISIBLE_DEVICES": "0", "LANG": "C"})
    assert kept == {"PATH": os.defpath, "CUDA_VISIBLE_DEVICES": "0", "LANG": "C"}


async def test_stopping_while_it_starts_leaves_nothing(start: Start, client: Upstreams) -> None:
    process = start("import time; time.sleep(60)", tells_ready=True)
    waiting = asyncio.ensure_future(process.wait_ready(client))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await process.stop()
    assert read_stat(process.pid) is None


def test_it_dies_with_whoever_started_it(tmp_path: Path) -> None:
    parent = subprocess.run(
        [
            sys.executable,
            "-c",
            PARENT,
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    pid = int(parent.stdout)
    assert pid > 1
    eventually_blocking(lambda: (stat := read_stat(pid)) is None or stat.state == "Z")


class TestOrphans:
    """What a killed agent leaves is found by its records."""

    def leave(self, agent_dir: Path, *command: str) -> subprocess.Popen[bytes]:
        run_dir = agent_dir / "one"
        run_dir.mkdir()
        process = subprocess.Popen(command, start_new_session=True)
        record_process(run_dir, process.pid)
        return process

    def test_a_recorded_process_is_ended_with_its_children(self, tmp_path: Path) -> None:
        process = self.leave(tmp_path, "sh", "-c", "sleep 60 & wait")
        eventually_blocking(lambda: len(list(session_members(process.pid))) == 2)
        assert process.pid in kill_orphans(tmp_path)
        assert process.wait(60) == -signal.SIGKILL
        eventually_blocking(lambda: not list(session_members(process.pid)))
        assert list(tmp_path.iterdir()) == []

    def test_somebody_elses_process_of_the_same_number_is_not(self, tmp_path: Path) -> None:
        process = self.leave(tmp_path, "sleep", "60")
        record = tmp_path / "one" / RECORD
        record.write_text(record.read_text().replace('"started_ticks":', '"started_ticks":1'))
        assert kill_orphans(tmp_path) == ()
        assert process.poll() is None
        process.kill()
        process.wait(60)

    @pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}'])
    def test_a_torn_record_is_removed(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / RECORD).write_text(text)
        assert kill_orphans(tmp_path) == ()
        assert list(tmp_path.iterdir()) == []


def test_cpu_time_of_a_session_is_counted() -> None:
    before_s = session_cpu_s(os.getsid(0))
    end_s = time.process_time() + 0.05
    while time.process_time() < end_s:
        pass
    assert session_cpu_s(os.getsid(0)) > before_s

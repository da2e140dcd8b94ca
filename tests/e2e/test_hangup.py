"""SIGHUP: the end of a terminal ends what was started on it, and nothing else."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverlessllm.config.paths import derive
from serverlessllm.config.settings import Settings
from serverlessllm.testing.processes import sllm
from serverlessllm.testing.waiting import eventually_blocking


class OnTerminal:
    """`sllm VERB` as the foreground of a terminal of its own; with `nohup` what it says lies there
    instead, and SIGHUP is ignored from the start."""

    def __init__(self, data_dir: Path, verb: str, nohup: Path | None) -> None:
        arguments = [verb, "--data-dir", str(data_dir), "--set=edge.drain_accept_s=0"]
        arguments += [] if verb == "agent" else ["--port", "0"]
        self.sockets = derive(Settings(data_dir=str(data_dir)), os.environ).runtime_dir
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            if nohup is not None:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                os.dup2(os.open(nohup, os.O_WRONLY | os.O_CREAT), 2)
            os.execv(sys.executable, [sys.executable, "-m", "serverlessllm.cli.main", *arguments])
        self._said = ""
        self._status: int | None = None

    def read_until(self, words: str) -> None:
        while words not in self._said:
            self._said += os.read(self._terminal, 1 << 16).decode(errors="replace")

    def close_terminal(self) -> None:
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def wait(self) -> int:
        """Until it ends of itself; its exit status, negative that of a signal."""
        eventually_blocking(lambda: not self.alive)
        assert self._status is not None
        return self._status

    @property
    def alive(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is None


@contextlib.contextmanager
def on_terminal(data_dir: Path, verb: str, *, nohup: Path | None = None) -> Iterator[OnTerminal]:
    running = OnTerminal(data_dir, verb, nohup)
    try:
        running.read_until("ready on ")
        yield running
    finally:
        if running.alive:
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
        running.close_terminal()


@pytest.mark.parametrize("verb", ["serve", "agent"])
def test_a_terminal_that_closes_ends_it_in_good_order(data_dir, verb):
    with on_terminal(data_dir, verb) as running:
        assert running.sockets.is_dir()
        running.close_terminal()
        assert running.wait() == 0
        assert not running.sockets.exists()


def test_a_hangup_while_the_terminal_is_there_asks_to_reload(data_dir):
    with on_terminal(data_dir, "orchestrator") as running:
        os.kill(running.pid, signal.SIGHUP)
        running.read_until("nothing to reload")
        assert running.alive


def test_under_nohup_it_outlives_its_terminal(data_dir, tmp_path):
    log = tmp_path / "nohup.out"
    with on_terminal(data_dir, "orchestrator", nohup=log) as running:
        running.close_terminal()
        eventually_blocking(lambda: "nothing to reload" in log.read_text())
        assert running.alive
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait() == 0


def test_who_cannot_say_that_it_is_ready_is_ready(data_dir):
    """The terminal may close just then."""
    arguments = ["--data-dir", str(data_dir), "--port", "0", "--set=edge.drain_accept_s=0"]
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            [sys.executable, "-m", "serverlessllm.cli.main", "orchestrator", *arguments],
            stdout=full,
        ) as running,
    ):
        stdout = Path(f"/proc/{running.pid}/fd/1")
        try:
            eventually_blocking(lambda: stdout.readlink() == Path(os.devnull))
            running.terminate()
            assert running.wait() == 0
        finally:
            running.kill()


@pytest.mark.parametrize("verb", ["serve", "agent"])
def test_without_a_certificate_a_hangup_ends_nothing(data_dir, verb):
    arguments = () if verb == "agent" else ("--port", "0")
    with sllm(verb, *arguments, data_dir=data_dir) as running:
        os.kill(running.pid, signal.SIGHUP)
        eventually_blocking(lambda: "nothing to reload" in running.log.read_text())
        assert running.stop() == 0

"""`sllm` processes, started and ended as a user would: for end-to-end tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from serverlessllm.backends.procfs import read_stat
from serverlessllm.config.paths import derive
from serverlessllm.config.settings import Settings
from serverlessllm.core.ids import Address
from serverlessllm.loader.settings import default_dram_dir

_STOP_TIMEOUT_S = 60.0


class Process:
    """One running `sllm` verb that serves, and the address it announced."""

    def __init__(self, process: subprocess.Popen[str], address: Address, log: Path) -> None:
        self._process = process
        self.address = address
        self.log = log
        """Its stderr."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def children(self, kind: str = "") -> list[int]:
        """Process ids of all that it started and that run, and whose command line says `kind`."""
        found: list[int] = []
        for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
        return [pid for pid in alive(found) if kind in _command(pid)]

    def kill(self) -> None:
        """`kill -9`, and wait for the kernel to have done it."""
        self._process.kill()
        self._process.wait(_STOP_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Until it ends of itself; its exit status."""
        return self._process.wait(_STOP_TIMEOUT_S)


@contextlib.contextmanager
def sllm(verb: str, *arguments: str, data_dir: Path, name: str | None = None) -> Iterator[Process]:
    """Run `sllm VERB` on `data_dir` until the block ends; yields when it is ready.

    `name` names its log among those of the same verb.

    Raises:
        RuntimeError: it ended before it was ready; carries its last words.
    """
    log = data_dir / f"{name or verb}.stderr"
    command = [sys.executable, "-m", "serverlessllm.cli.main", verb, *arguments]
    command += ["--data-dir", str(data_dir)]
    command += ["--set", "edge.drain_accept_s=0"]  # nobody balances traffic over a test
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLLM_")}
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
    assert process.stdout is not None
    try:
        yield Process(process, _announced(process, log), log)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextlib.contextmanager
def data_directory(parent: Path, name: str = "data") -> Iterator[Path]:
    """A data directory; its DRAM tier and its sockets' directory are removed with it."""
    directory = parent / name
    directory.mkdir()
    try:
        yield directory
    finally:
        runtime_dir = derive(Settings(data_dir=str(directory)), os.environ).runtime_dir
        for made in (default_dram_dir(directory), runtime_dir, directory):
            shutil.rmtree(made, ignore_errors=True)


def alive(pids: Iterable[int]) -> list[int]:
    """Those that run: one that only waits to be reaped does not."""
    stats = [read_stat(pid) for pid in pids]
    return [stat.pid for stat in stats if stat is not None and stat.state != "Z"]


def _command(pid: int) -> str:
    """Empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _announced(process: subprocess.Popen[str], log: Path) -> Address:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready on "):
            return Address(line.split()[2])
    process.wait()
    raise RuntimeError(f"sllm ended with status {process.returncode}: {log.read_text()[-2000:]}")

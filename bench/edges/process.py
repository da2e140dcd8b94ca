"""Processes of a benchmark: started, waited for, ended, and what they spend."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_START_S = 90.0


def need(tool: str, package: str) -> str:
    """The path of a tool that only Debian has; says how to get it when it is missing."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if path is None:
        raise SystemExit(f"{tool} is not installed: apt-get install {package}")
    return path


def compile_c(source: Path, folder: Path) -> Path:
    """The program of one C file."""
    program = folder / source.stem
    subprocess.run([need("cc", "gcc"), "-O2", "-o", program, source], check=True)
    return program


@contextmanager
def process(command: Sequence[str], log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of its own, ended with the block; with `log`, what it says goes there."""
    out = subprocess.PIPE if log is None else log.open("wb")
    errors = None if log is None else subprocess.STDOUT
    started = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True, cwd=ROOT)
    try:
        yield started
    finally:
        _end(started)
        if started.stdout is not None:
            started.stdout.close()


def _end(started: subprocess.Popen[bytes]) -> None:
    if started.poll() is not None:
        return
    os.killpg(started.pid, signal.SIGTERM)
    try:
        started.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        print(f"{started.args!r}: did not end when asked to", file=sys.stderr)


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def await_port(port: int, started: subprocess.Popen[bytes]) -> None:
    """Return when the process listens.

    Raises:
        TimeoutError: it ended, or does not listen in time.
    """
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and started.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"it does not listen (status {started.poll()})")


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, stack = [], [pid]
    while stack:
        one = stack.pop()
        found.append(one)
        stack += children.get(one, [])
    return found


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and all its descendants, exact to the nanosecond."""
    total_ns = 0
    for one in family(pid):
        try:
            tasks = list(Path(f"/proc/{one}/task").iterdir())
            total_ns += sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
        except OSError:
            continue
    return total_ns / 1e9


def busy_s() -> float:
    """Seconds that all cores together have worked since the machine started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(ticks[:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def isolated(apart: Sequence[int], together: Sequence[int]) -> Iterator[None]:
    """While in the block, processes and all their descendants run on a core of their own, and
    others, this one included, on another; all of them before whatever else runs there, where that
    is allowed (to root). A machine of one core has but that."""
    cores = os.sched_getaffinity(0)
    try:
        _place((os.getpid(), *together), {min(cores)}, os.SCHED_FIFO)
        _place(apart, {max(cores)}, os.SCHED_FIFO)
        yield
    finally:
        _place((os.getpid(), *together, *apart), cores, os.SCHED_OTHER)


def _place(pids: Sequence[int], cores: set[int], policy: int) -> None:
    priority = os.sched_param(int(policy == os.SCHED_FIFO))
    for one in (one for pid in pids for one in family(pid)):
        for task in Path(f"/proc/{one}/task").glob("*"):
            with suppress(ProcessLookupError, PermissionError):
                os.sched_setaffinity(int(task.name), cores)
                os.sched_setscheduler(int(task.name), policy, priority)


def memory_bytes(pid: int) -> int:
    """Memory that a process and all its descendants do not share with others."""
    total = 0
    for one in family(pid):
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        for line in rollup.splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1]) * 1024
    return total

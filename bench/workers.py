"""Whether N workers serve N times what one process does: `--workers`, against a straight line.

    python -m bench.workers                      1, 2 (and so on, to the cores), in turns
    python -m bench.workers --rounds 2 --seconds 1

Every front door passes requests to one mock (C) and is asked by one load program (C), which need
cores of their own: where there are none left, the rate cannot follow the line, and says nothing.
What must not change with the number of processes is the CPU a request: nothing is shared, so
nothing is waited for. `line` is the rate that the machine's cores allow at the CPU a request (mock
and load included) that one process needs, at most N times that one's rate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median

import msgspec
from bench.edges.process import await_port, compile_c, cpu_s, family, free_port, process

_HERE = Path(__file__).parent
_KEY = "sk-bench"
_CONNECTIONS_EACH = 32
_BODY = b'{"model":"mock","messages":[{"role":"user","content":"What is two and two?"}]}'
_ANSWERS_S = 30.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One front door under load, once."""

    rate: float
    cpu_us: float
    """Of all its processes, a request."""
    all_us: float
    """With the mock and the load."""
    even: float
    """What the least busy worker did, as a part of what the busiest did."""
    p99_us: float


class Door:
    """A front door of so many processes."""

    def __init__(self, workers: int, port: int, running: subprocess.Popen[bytes]) -> None:
        self.workers = workers
        self.port = port
        self.running = running
        self.samples: list[Sample] = []

    def median(self, field: str) -> float:
        values: list[float] = [getattr(sample, field) for sample in self.samples]
        return median(values)

    def processes(self) -> list[int]:
        """Those that serve clients."""
        others = [pid for pid in family(self.running.pid) if pid != self.running.pid]
        return others if self.workers > 1 else [self.running.pid]


class _Told(msgspec.Struct):
    requests: int
    seconds: float
    errors: int
    bad_status: int
    p99_us: float


class Bench:
    """The mock, the load program, the front doors."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._load = compile_c(_HERE / "edges" / "load.c", folder)
        mock = compile_c(_HERE / "mock_upstream.c", folder)
        self._mock = stack.enter_context(process([str(mock), "127.0.0.1:0", "1", "0"]))
        assert self._mock.stdout is not None
        self._mock_port = int(self._mock.stdout.readline())
        (folder / "body.json").write_bytes(_BODY)

    def open(self, workers: int) -> Door:
        """Started, and answering."""
        port = free_port()
        words = (str(port), str(self._mock_port), "--key", _KEY, "--workers", str(workers))
        command = [sys.executable, "-m", "bench.orchestrator", *words]
        log = self._folder / f"{workers}.log"
        running = self._stack.enter_context(process(command, log))
        await_port(port, running)
        door = Door(workers, port, running)
        deadline_s = time.monotonic() + _ANSWERS_S
        while self._ask(door, 1, 0.2).bad_status:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{workers} workers do not answer: {log.read_text()[-2000:]}")
        return door

    def sample(self, door: Door, seconds: float) -> Sample:
        """Keep every process of the door busy."""
        pids = door.processes()
        each = [cpu_s(pid) for pid in pids]
        mock_s, ours_s, load_s = cpu_s(self._mock.pid), cpu_s(door.running.pid), _children_s()
        told = self._ask(door, _CONNECTIONS_EACH * max(os.cpu_count() or 1, door.workers), seconds)
        if told.errors or told.bad_status:
            raise SystemExit(f"{told.errors} errors, {told.bad_status} bad answers")
        spent = [cpu_s(pid) - before for pid, before in zip(pids, each, strict=True)]
        ours_s = cpu_s(door.running.pid) - ours_s
        others_s = cpu_s(self._mock.pid) - mock_s + _children_s() - load_s
        return Sample(
            rate=told.requests / told.seconds,
            cpu_us=1e6 * ours_s / told.requests,
            all_us=1e6 * (ours_s + others_s) / told.requests,
            even=min(spent) / max(spent),
            p99_us=told.p99_us,
        )

    def _ask(self, door: Door, connections: int, seconds: float) -> _Told:
        words = (str(connections), "0", str(seconds), str(self._folder / "body.json"))
        command = [str(self._load), f"127.0.0.1:{door.port}", *words]
        command.append(f"Authorization: Bearer {_KEY}")
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return msgspec.json.decode(found.stdout, type=_Told)


def main() -> None:
    """Run and print."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    counts = [1, *range(2, cores + 1)]
    with tempfile.TemporaryDirectory(prefix="sllm-workers-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack)
        doors = [bench.open(workers) for workers in counts]
        for _, door in product(range(options.rounds), doors):
            door.samples.append(bench.sample(door, options.seconds))
    print(f"{cores} cores, median of {options.rounds} interleaved rounds")
    print("| processes | requests/s | ÷ one | ÷ line | CPU µs/request | ÷ one | even | p99 ms |")
    print("|---|---|---|---|---|---|---|---|")
    for door in doors:
        print(_row(door, doors[0], cores))


def _row(door: Door, one: Door, cores: int) -> str:
    line = min(door.workers * one.median("rate"), cores * 1e6 / one.median("all_us"))
    return (
        f"| {door.workers} | {door.median('rate'):,.0f} "
        f"| {door.median('rate') / one.median('rate'):.2f} "
        f"| {door.median('rate') / line:.2f} | {door.median('cpu_us'):.1f} "
        f"| {door.median('cpu_us') / one.median('cpu_us'):.2f} | {door.median('even'):.2f} "
        f"| {door.median('p99_us') / 1000:.1f} |"
    )


def _children_s() -> float:
    """Seconds that this process's ended children have worked."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()

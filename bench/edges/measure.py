"""Each router under each load, in interleaved rounds: samples of CPU, rate and latency."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from statistics import median

import msgspec
from bench.edges.process import (
    await_port,
    busy_s,
    compile_c,
    cpu_s,
    free_port,
    isolated,
    memory_bytes,
    process,
)
from bench.edges.targets import KEY, PEERS, Peer

CHUNKS = 256
_TRIES = 3
_HEADERS = (f"Authorization: Bearer {KEY}",)
_SLOW, _IDLE = 1000, 1000
_HELD = 2000
_SPREAD_S, _SETTLE_S = 5.0, 6.0
"""Of slow clients: until all have come, and their streams of 256 chunks have been sent."""
_PIECES, _PIECE_S = 3, 2.0
"""Of good traffic, one state at a time."""
_LATE_S = 60.0
"""After its time, a load has surely ended."""
_CALM_S = 1.5
"""After 2,000 connections have gone."""
_HERE = Path(__file__).parent


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One way of asking."""

    name: str
    connections: int
    rate: int = 0
    """Requests a second, due whatever happens; 0: each connection asks again once answered."""
    stream: bool = False
    seconds: float = 3.0
    apart: bool = False
    """The router has a core of its own: nobody else's work is in its caches."""


LOADS = (
    Load(name="1 connection", connections=1),
    Load(name="32 connections", connections=32),
    Load(name="256 connections", connections=256),
    Load(name="50/s", connections=32, rate=50),
    Load(name="1,000/s", connections=32, rate=1000),
    Load(name="5,000/s", connections=64, rate=5000),
    Load(name="5,000/s, own core", connections=64, rate=5000, apart=True),
    Load(name="64 streams, a chunk each 20 ms", connections=64, stream=True, seconds=1.0),
)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One router under one load, once."""

    cpu_us: float
    """User and system time of its processes, a request or (streams) a chunk."""
    rate: float
    p50_us: float
    p99_us: float
    errors: int
    foreign: float
    """Cores that neither it, nor the mock, nor the load used."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What connections that do nothing cost, and do to those that work: a round."""

    bytes_each: float
    """Memory of one idle connection."""
    alone_p50_us: float
    alone_p99_us: float
    """Good traffic, nobody else there."""
    beside_p50_us: float
    beside_p99_us: float
    """The same beside idle and slow connections."""
    elsewhere_p50_us: float
    elsewhere_p99_us: float
    """The same while those are another server's: what they cost the machine."""
    errors: int


class Found(msgspec.Struct, kw_only=True):
    """All about one router."""

    name: str
    why_not: str = ""
    """Why there is nothing else; empty otherwise."""
    samples: dict[str, list[Sample]] = {}
    held: list[Held] = []

    def median(self, load: str, field: str) -> float | None:
        """None: not measured."""
        values: list[float] = [getattr(sample, field) for sample in self.samples.get(load, ())]
        return median(values) if values else None


class _Answer(msgspec.Struct):
    """What the load program prints."""

    requests: int
    seconds: float
    errors: int
    bad_status: int
    unfinished: int
    first_p50_us: float
    first_p99_us: float
    p50_us: float
    p99_us: float


class Bench:
    """The mock, the load program, the routers; `measure` runs them."""

    def __init__(self, folder: Path, stack: ExitStack, foreign_max: float) -> None:
        self._folder = folder
        self._foreign_max = foreign_max
        self._stack = stack
        self._load = compile_c(_HERE / "load.c", folder)
        self._slow = compile_c(_HERE / "slow.c", folder)
        mock = compile_c(_HERE.parent / "mock_upstream.c", folder)
        command = [str(mock), "127.0.0.1:0", str(CHUNKS), "20000"]
        self._mock, self._mock_port = _started(stack, command)
        self._other, self._other_port = _started(stack, command)
        for stream in (False, True):
            body = {
                "model": "mock",
                "messages": [
                    {"role": "user", "content": "What is two and two? Answer in a sentence."}
                ],
                "max_tokens": 64,
                "temperature": 0,
            }
            if stream:
                body["stream"] = True
            (folder / f"{stream}.json").write_bytes(msgspec.json.encode(body))
        self._running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}

    def start(self, peer: Peer) -> str:
        """Start a router; why it cannot be, or nothing."""
        folder = self._folder / peer.name
        folder.mkdir()
        port = free_port()
        try:
            command = peer.command(folder, port, self._mock_port)
            started = self._stack.enter_context(process(command, folder / "log"))
            await_port(port, started)
            self._running[peer.name] = started, port
            self._warm(peer)
        except (OSError, TimeoutError) as error:
            self._running.pop(peer.name, None)
            return str(error)
        return ""

    def _warm(self, peer: Peer) -> None:
        """Return when it answers; some listen before they know their upstream."""
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            answer = self._ask(peer.name, LOADS[0], 0.2)
            if answer.requests and not answer.bad_status and not answer.errors:
                return
            time.sleep(0.5)
        raise TimeoutError("it answers no request")

    def sample(self, peer: Peer, load: Load) -> Sample | None:
        """One sample; None when the machine was never quiet enough, or the load is beyond it."""
        if peer.rate_max is not None and (load.rate > peer.rate_max or load.stream):
            return None
        started, _ = self._running[peer.name]
        with isolated([started.pid], [self._mock.pid]) if load.apart else nullcontext():
            return self._sample(peer, load, started.pid)

    def _sample(self, peer: Peer, load: Load, pid: int) -> Sample | None:
        for _ in range(_TRIES):
            ours = os.getpid()
            before_s = cpu_s(pid), cpu_s(self._mock.pid), busy_s(), cpu_s(ours)
            began_s, children = time.monotonic(), _children_s()
            answer = self._ask(peer.name, load, load.seconds)
            passed_s = time.monotonic() - began_s
            spent_s = cpu_s(pid) - before_s[0]
            known_s = spent_s + cpu_s(self._mock.pid) - before_s[1] + _children_s() - children
            known_s += max(0.0, cpu_s(ours) - before_s[3])
            foreign = max(0.0, busy_s() - before_s[2] - known_s) / passed_s
            if foreign <= self._foreign_max and answer.requests:
                break
        else:
            return None
        many = CHUNKS if load.stream else 1
        return Sample(
            cpu_us=1e6 * spent_s / answer.requests / many,
            rate=answer.requests * many / answer.seconds,
            p50_us=answer.first_p50_us if load.stream else answer.p50_us,
            p99_us=answer.first_p99_us if load.stream else answer.p99_us,
            errors=answer.errors + answer.bad_status + answer.unfinished,
            foreign=foreign,
        )

    def hold(self, peer: Peer) -> Held:
        """Its memory under idle connections, and good traffic beside slow ones, with the router on
        a core of its own. Good traffic alone is measured before, between and after."""
        started, port = self._running[peer.name]
        before = memory_bytes(started.pid)
        with self._holding(port, _HELD, 0, 1.0, 1.0):
            bytes_each = (memory_bytes(started.pid) - before) / _HELD
        alone: list[_Answer] = []
        beside: list[_Answer] = []
        elsewhere: list[_Answer] = []
        with isolated([started.pid], [self._mock.pid, self._other.pid]):
            alone += self._pieces(peer)
            with self._holding(port, _IDLE, _SLOW, _SPREAD_S, _SETTLE_S):
                beside += self._pieces(peer)
            alone += self._pieces(peer)
            with self._holding(self._other_port, _IDLE, _SLOW, _SPREAD_S, _SETTLE_S):
                elsewhere += self._pieces(peer)
            alone += self._pieces(peer)
        return Held(
            bytes_each=bytes_each,
            alone_p50_us=median(piece.p50_us for piece in alone),
            alone_p99_us=median(piece.p99_us for piece in alone),
            beside_p50_us=median(piece.p50_us for piece in beside),
            beside_p99_us=median(piece.p99_us for piece in beside),
            elsewhere_p50_us=median(piece.p50_us for piece in elsewhere),
            elsewhere_p99_us=median(piece.p99_us for piece in elsewhere),
            errors=sum(piece.errors + piece.bad_status for piece in beside),
        )

    def _pieces(self, peer: Peer) -> list[_Answer]:
        return [self._ask(peer.name, LOADS[4], _PIECE_S) for _ in range(_PIECES)]

    @contextmanager
    def _holding(
        self, port: int, idle: int, slow: int, spread_s: float, settle_s: float
    ) -> Iterator[None]:
        words = [str(word) for word in (idle, slow, spread_s, settle_s)]
        command = [str(self._slow), f"127.0.0.1:{port}", *words, *_HEADERS]
        with process(command) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            yield
        time.sleep(_CALM_S)

    def _ask(self, name: str, load: Load, seconds: float) -> _Answer:
        _, port = self._running[name]
        command = [
            *(str(self._load), f"127.0.0.1:{port}", str(load.connections), str(load.rate)),
            *(str(seconds), str(self._folder / f"{load.stream}.json"), *_HEADERS),
        ]
        try:
            found = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=seconds + _LATE_S
            )
        except subprocess.TimeoutExpired as late:
            raise TimeoutError("the load does not come to its end") from late
        if found.returncode:
            raise TimeoutError(f"it takes no connection: {found.stderr.strip()}")
        return msgspec.json.decode(found.stdout, type=_Answer)


def measure(
    folder: Path,
    names: Sequence[str],
    loads: Sequence[Load],
    *,
    rounds: int,
    held_rounds: int,
    foreign_max: float,
) -> list[Found]:
    """Run everything; a router that cannot be had says why. A sample during which others used more
    than `foreign_max` cores is taken again, and dropped in the end."""
    with ExitStack() as stack:
        bench = Bench(folder, stack, foreign_max)
        chosen = [peer for peer in PEERS if not names or peer.name in names]
        found = [Found(name=peer.name, why_not=bench.start(peer)) for peer in chosen]
        for one in found:
            _say(f"{one.name}: {one.why_not or 'runs'}")
        running = [pair for pair in zip(chosen, found, strict=True) if not pair[1].why_not]
        for load in loads:
            for _, (peer, one) in product(range(rounds), running):
                sample = bench.sample(peer, load)
                if sample is not None:
                    one.samples.setdefault(load.name, []).append(sample)
            _say(f"{load.name}: done")
        for _, (peer, one) in product(range(held_rounds), running):
            if peer.rate_max is None:
                with contextlib.suppress(TimeoutError):
                    one.held.append(bench.hold(peer))
        _say("held connections: done")
    return found


def _started(stack: ExitStack, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A server that says its port."""
    server = stack.enter_context(process(command))
    assert server.stdout is not None
    return server, int(server.stdout.readline())


def _children_s() -> float:
    """Seconds that this process's ended children have worked."""
    times = os.times()
    return times.children_user + times.children_system


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

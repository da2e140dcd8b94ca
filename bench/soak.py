"""Whether the front door's memory stays flat over a million requests.

    python -m bench.soak                         1,000,000 requests
    python -m bench.soak --requests 200000

The real orchestrator before a mock agent (C), asked by the load program (C) in turns: whole
answers and streams in the proportion of real traffic, and after each turn clients that send what
is bad, and clients that leave in the middle of an answer. After each turn, at rest, the memory that
it has written and its threads are read; its descriptors before the first turn and after the last,
when all connections kept to the agent have expired. The slope is a line through the samples of the
second half, in bytes a thousand requests: what one request leaves behind, a thousand times.

Two things grow to a bound and are in that slope: SQLite's page cache, about 1 KB a heartbeat until
it has its 2 MB, and what ended connections leave until the next full garbage collection.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import linear_regression

import msgspec
from bench.edges.process import await_port, compile_c, free_port, process

from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.testing.hostile_http import CASES, SLOW

_HERE = Path(__file__).parent
_KEY = "sk-bench"
_TURN_REQUESTS = 25_000
_TURNS_MIN = 8
_CONNECTIONS = 32
_STREAMED = 0.2
"""Part of the time that goes to streams."""
_CHUNKS = 16
_REST_S = 1.5
"""Until what has ended is gone: longer than the sweeps' interval."""
_EMPTY_S = UpstreamSettings().idle_expiry_s + 2.0
"""Until the connections to the agent are gone too."""
_LEAVE = 50
_ANSWER_S = 5.0
_WARM_S = 1.0
_SOAK_S_MAX = 1800.0
_SLOPE_BYTES_MAX = 4096
"""A thousand requests; 4 MB a million. More than the allocator's noise, less than any real leak:
one small object kept for each request is 50,000."""
_BODY = b'{"model":"mock","messages":[{"role":"user","content":"What is two and two?"}]%b}'


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The process at rest."""

    requests: int
    written_bytes: int
    descriptors: int
    threads: int


class Front:
    """The orchestrator under load."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._load = compile_c(_HERE / "edges" / "load.c", folder)
        mock = compile_c(_HERE / "mock_upstream.c", folder)
        upstream = stack.enter_context(process([str(mock), "127.0.0.1:0", str(_CHUNKS), "0"]))
        assert upstream.stdout is not None
        self._port, upstream_port = free_port(), int(upstream.stdout.readline())
        command = [sys.executable, "-m", "bench.orchestrator", str(self._port), str(upstream_port)]
        front = stack.enter_context(process([*command, "--key", _KEY], folder / "log"))
        await_port(self._port, front)
        self._pid = front.pid
        self._bodies = {"whole": folder / "whole.json", "stream": folder / "stream.json"}
        self._bodies["whole"].write_bytes(_BODY % b"")
        self._bodies["stream"].write_bytes(_BODY % b',"stream":true')

    def ask(self, name: str, seconds: float) -> int:
        """Ask for so long; how many were answered.

        Raises:
            SystemExit: not all of them were, with 200.
        """
        where = f"127.0.0.1:{self._port}"
        command = [str(self._load), where, str(_CONNECTIONS), "0", str(seconds)]
        command += [str(self._bodies[name]), f"Authorization: Bearer {_KEY}"]
        said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        if said["errors"] or said["bad_status"] or said["unfinished"]:
            raise SystemExit(f"requests failed: {said}")
        return int(said["requests"])

    def be_bad(self) -> int:
        """Send every hostile case that is soon over, once."""
        cases = [case for case in CASES if case not in SLOW and case.then in {"read", "fin"}]
        for case in cases:
            with socket.create_connection(("127.0.0.1", self._port), _ANSWER_S) as client:
                try:
                    client.sendall(b"".join(case.sends))
                    if case.then == "fin":
                        client.shutdown(socket.SHUT_WR)
                    client.recv(1)
                except ConnectionError:
                    continue
        return len(cases)

    def leave(self) -> int:
        """Clients that go when their stream has begun."""
        body = _BODY % b',"stream":true'
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        head += f"authorization: Bearer {_KEY}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        for _ in range(_LEAVE):
            with socket.create_connection(("127.0.0.1", self._port), _ANSWER_S) as client:
                client.sendall(head.encode() + body)
                client.recv(64)
        return _LEAVE

    def sample(self, requests: int, rest_s: float) -> Sample:
        """Read the process after a rest."""
        time.sleep(rest_s)
        entry = Path(f"/proc/{self._pid}")
        return Sample(
            requests=requests,
            written_bytes=_written_bytes(entry),
            descriptors=len(list((entry / "fd").iterdir())),
            threads=len(list((entry / "task").iterdir())),
        )


def main() -> int:
    """Print the samples and the verdict; 1 when it grows, 2 when there were too few requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1_000_000)
    wanted = parser.parse_args().requests
    if wanted < _TURNS_MIN * _TURN_REQUESTS:
        parser.error(f"a line needs {_TURNS_MIN} turns of {_TURN_REQUESTS:,} requests")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and the processes with it
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        samples = _soak(wanted, Front(folder, stack))
    first, last = samples[0], samples[-1]
    if last.requests < wanted:
        print(f"NO VERDICT: {last.requests:,} requests in {_SOAK_S_MAX:.0f} s")
        return 2
    middle = len(samples) // 2
    slope = _slope(samples[middle:])
    threads = sorted({sample.threads for sample in samples[middle:]})
    print(f"slope of the first half {_slope(samples[:middle]):+.0f} bytes/1,000 requests")
    print(f"of the second           {slope:+.0f} bytes/1,000 requests (at most {_SLOPE_BYTES_MAX})")
    print(f"descriptors before and after: {first.descriptors}, {last.descriptors}")
    print(f"threads in the second half: {threads}")
    flat = slope <= _SLOPE_BYTES_MAX and len(threads) == 1 and last.descriptors <= first.descriptors
    print("FLAT" if flat else "GROWS")
    return 0 if flat else 1


def _soak(wanted: int, front: Front) -> list[Sample]:
    """A sample before the first turn and after each, until there were enough requests or it took
    too long."""
    began_s = time.monotonic()
    rate = (front.ask("whole", _WARM_S) + front.ask("stream", _WARM_S)) / (2 * _WARM_S)
    front.be_bad()
    front.leave()
    samples = [front.sample(0, _EMPTY_S)]
    done = 0
    while done < wanted and time.monotonic() < began_s + _SOAK_S_MAX:
        seconds = _TURN_REQUESTS / rate
        asked_s = time.monotonic()
        asked = front.ask("whole", seconds * (1 - _STREAMED))
        asked += front.ask("stream", seconds * _STREAMED)
        rate = asked / (time.monotonic() - asked_s)
        done += asked + front.be_bad() + front.leave()
        one = front.sample(done, _REST_S if done < wanted else _EMPTY_S)
        samples.append(one)
        print(
            f"{time.monotonic() - began_s:6.0f} s  {one.requests:>9,} requests"
            f"  {one.written_bytes / 1e6:7.2f} MB  {one.threads} threads",
            flush=True,
        )
    return samples


def _slope(samples: list[Sample]) -> float:
    """Bytes a thousand requests."""
    thousands = [sample.requests / 1000 for sample in samples]
    return linear_regression(thousands, [sample.written_bytes for sample in samples]).slope


def _written_bytes(entry: Path) -> int:
    """Memory that it alone has written. Pages of files count for nobody: which of them are private
    depends on who else runs the same program."""
    total_kib = 0
    for line in (entry / "smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Dirty:", "Swap:")):
            total_kib += int(line.split()[1])
    return total_kib * 1024


if __name__ == "__main__":
    sys.exit(main())

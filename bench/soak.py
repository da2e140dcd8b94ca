"""Whether the front door's memory stays flat over a million requests.

    python -m bench.soak                         1,000,000 requests
    python -m bench.soak --requests 200000

The real orchestrator before a mock agent (C), asked by the load program (C) in turns: whole
answers and streams in the proportion of real traffic, and after each turn clients that send what
is bad, and clients that leave in the middle of an answer. Between turns, at rest, its private
memory, descriptors and threads are read. The slope is a line through the samples of the second
half, in bytes a thousand requests: what one request leaves behind, a thousand times.
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
from bench.edges.process import await_port, compile_c, free_port, memory_bytes, process

from serverlessllm.testing.hostile_http import CASES, SLOW

_HERE = Path(__file__).parent
_KEY = "sk-bench"
_TURNS = 40
_CONNECTIONS = 32
_STREAMED = 0.2
"""Part of the time that goes to streams."""
_CHUNKS = 16
_REST_S = 1.5
"""Until what has ended is gone: longer than the sweeps' interval."""
_SLOPE_BYTES_MAX = 4096
"""A thousand requests; 4 MB a million. More than the allocator's noise, less than any real leak:
one small object kept for each request is 50,000."""
_BODY = b'{"model":"mock","messages":[{"role":"user","content":"What is two and two?"}]%b}'


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The process at rest."""

    requests: int
    private_bytes: int
    descriptors: int
    threads: int


def main() -> int:
    """Print the samples and the verdict; 1 when it grows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1_000_000)
    wanted = parser.parse_args().requests
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and the processes with it
    with ExitStack() as stack:
        samples = _soak(wanted, Path(stack.enter_context(tempfile.TemporaryDirectory())), stack)
    half = samples[len(samples) // 2 :]
    slope, _ = linear_regression(
        [sample.requests / 1000 for sample in half], [sample.private_bytes for sample in half]
    )
    spread = {(sample.descriptors, sample.threads) for sample in half}
    flat = slope <= _SLOPE_BYTES_MAX and len(spread) == 1
    print(f"slope {slope:+.0f} bytes/1,000 requests (at most {_SLOPE_BYTES_MAX})")
    print(f"descriptors and threads at rest: {sorted(spread)}")
    print("flat" if flat else "GROWS")
    return 0 if flat else 1


def _soak(wanted: int, folder: Path, stack: ExitStack) -> list[Sample]:
    load = compile_c(_HERE / "edges" / "load.c", folder)
    mock = compile_c(_HERE / "mock_upstream.c", folder)
    upstream = stack.enter_context(process([str(mock), "127.0.0.1:0", str(_CHUNKS), "0"]))
    assert upstream.stdout is not None
    port, upstream_port = free_port(), int(upstream.stdout.readline())
    command = [sys.executable, "-m", "bench.orchestrator", str(port), str(upstream_port)]
    front = stack.enter_context(process([*command, "--key", _KEY], folder / "log"))
    await_port(port, front)
    for name, more in (("whole", b""), ("stream", b',"stream":true')):
        (folder / f"{name}.json").write_bytes(_BODY % more)

    def ask(name: str, seconds: float) -> int:
        where = f"127.0.0.1:{port}"
        command = [str(load), where, str(_CONNECTIONS), "0", str(seconds)]
        command += [str(folder / f"{name}.json"), f"Authorization: Bearer {_KEY}"]
        said = subprocess.run(command, capture_output=True, check=True).stdout
        return int(json.loads(said)["requests"])

    time.sleep(2.0)
    rate = ask("whole", 2.0) / 2.0
    seconds = wanted / _TURNS / rate
    samples: list[Sample] = []
    done = 0
    while done < wanted:
        done += ask("whole", seconds * (1 - _STREAMED)) + ask("stream", seconds * _STREAMED)
        done += _be_bad(port) + _leave(port)
        time.sleep(_REST_S)
        samples.append(_sample(front.pid, done))
        one = samples[-1]
        print(
            f"{one.requests:>9,} requests  {one.private_bytes / 1e6:7.2f} MB"
            f"  {one.descriptors} descriptors  {one.threads} threads",
            flush=True,
        )
    return samples


def _sample(pid: int, requests: int) -> Sample:
    return Sample(
        requests=requests,
        private_bytes=memory_bytes(pid),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
    )


def _be_bad(port: int) -> int:
    """Every hostile case that is soon over, once."""
    cases = [case for case in CASES if case not in SLOW and case.then in {"read", "fin"}]
    for case in cases:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            try:
                client.sendall(b"".join(case.sends))
                client.recv(1)
            except (ConnectionError, TimeoutError):
                continue
    return len(cases)


def _leave(port: int, times: int = 50) -> int:
    """Clients that go when their stream has begun."""
    body = _BODY % b',"stream":true'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {_KEY}"
    head += f"\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(head.encode() + body)
            client.recv(64)
    return times


if __name__ == "__main__":
    sys.exit(main())

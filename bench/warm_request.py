"""A warm request against its bound: the same request, straight to the backend's socket.

    python -m bench.warm_request [--requests 2000]

One run, alternating requests from one client over kept connections, medians. The backend is the
fake one with no token time, so that nothing but the way is measured. `serve`: client → edge of
the orchestrator → edge of the agent → backend; `direct`: client → backend.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import time

from bench.server import Server, served

from serverlessllm.testing.management import register

BODY = json.dumps(
    {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
)
WARM_UP = 50


def main() -> None:
    """Print both medians and what the system adds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    requests = parser.parse_args().requests
    with served() as server:
        register(server.process.address, model="fake", backend="fake")
        server.chat(json.loads(BODY))
        direct = direct_connection(server)
        direct_s: list[float] = []
        through_s: list[float] = []
        for number in range(requests + WARM_UP):
            pair = (ask_s(direct), ask_s(server.connection))
            if number >= WARM_UP:
                direct_s.append(pair[0])
                through_s.append(pair[1])
        direct.close()
    direct_ms, through_ms = (statistics.median(s) * 1000 for s in (direct_s, through_s))
    print(f"medians of {requests} alternating requests, one connection each")
    print(f"direct {direct_ms:.3f} ms, through serve {through_ms:.3f} ms")
    print(f"added  {through_ms - direct_ms:.3f} ms (bound: 1 ms)")


def ask_s(connection: http.client.HTTPConnection) -> float:
    """Seconds of one chat."""
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", BODY, {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise SystemExit(f"answered {answer.status}")
    return time.perf_counter() - start


def direct_connection(server: Server) -> http.client.HTTPConnection:
    """A connection to the one backend's own socket."""
    (path,) = server.run_dir.rglob("backend.sock")
    connection = http.client.HTTPConnection("backend", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    return connection


if __name__ == "__main__":
    main()

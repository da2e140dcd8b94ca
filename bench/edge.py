"""What a request and a streamed chunk cost at our edge, against nginx, on one fast mock upstream.

    python -m bench.edge
    python -m bench.edge --target "NAME=COMMAND {port} {upstream_port}"

Each target is a command that listens on 127.0.0.1:{port} and passes requests to the mock at
127.0.0.1:{upstream_port}; its CPU is that of its whole process tree (user + system). By default
they are the real orchestrator, and the edge alone with the least policy that a proxy can have.
Load is wrk. Rounds are interleaved and the medians are printed; only the ratios mean anything
elsewhere. Needs `wrk`, `nginx` and a C compiler: `apt-get install wrk nginx-light gcc`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import Address
from serverlessllm.edge.relay import relay
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.request import check_content_type, parse_chat
from serverlessllm.openai.settings import RequestLimits

CHUNKS = 256
GAP_US = 5000
MODES = ("request", "chunk")
OURS = {
    "edge": f"{sys.executable} -m bench.edge --proxy {{port}} {{upstream_port}}",
    "orchestrator": f"{sys.executable} -m bench.orchestrator {{port}} {{upstream_port}}",
}
RATIO_MAX = {"request": 4.0, "chunk": 2.0}
"""What a request and a chunk may cost, in nginx's."""

NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  upstream mock {{ server 127.0.0.1:{upstream_port}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

WRK_SCRIPT = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-0123456789abcdef"
wrk.body = '{body}'
done = function(summary, latency, requests)
  io.write(string.format(
    '{{"requests": %d, "us": %d, "p50_us": %d, "p99_us": %d, "errors": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout))
end
"""


@dataclass
class Target:
    """A running proxy (or, for `direct`, the mock itself)."""

    name: str
    port: dict[str, int]
    pid: dict[str, int]
    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=dict)


@dataclass
class Sample:
    """One round of one target."""

    cpu_us: float
    """Of the process tree, per request or per chunk."""
    rate: float
    """Requests or chunks a second."""
    p50_us: float
    errors: int


def main() -> None:
    """Run, print the table and the two ratios; fails when a ratio is over its bound."""
    options = _options()
    if options.proxy:
        _run_proxy(*options.proxy)
        return
    model = options.model
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sllm-edge-")))
        mock = _compile(folder)
        ports: dict[str, int] = {}
        pids: dict[str, int] = {}
        for mode, arguments in (("request", ("1", "0")), ("chunk", (str(CHUNKS), str(GAP_US)))):
            process = stack.enter_context(_process([str(mock), "127.0.0.1:0", *arguments]))
            assert process.stdout is not None
            ports[mode], pids[mode] = int(process.stdout.readline()), process.pid
        targets = [Target("direct", ports, pids)]
        given = options.target or [f"{name}={command}" for name, command in OURS.items()]
        commands = dict(target.split("=", 1) for target in given)
        for name, command in [("nginx", ""), *commands.items()]:
            targets.append(_start(stack, folder, name, command, ports))
        _measure(folder, targets, options, model)
        _print(targets, options.connections)
        if not _holds(targets):
            raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--model", default="mock", help="the model that the requests name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round of one target")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--proxy", nargs=2, type=int, metavar=("PORT", "UPSTREAM"), help="internal")
    return parser.parse_args()


# The parts.


def need(tool: str, package: str) -> str:
    """The path of a tool that only Debian has; says how to get it when it is missing."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if path is None:
        raise SystemExit(f"{tool} is not installed: apt-get install {package}")
    return path


def _compile(folder: Path) -> Path:
    mock = folder / "mock_upstream"
    source = Path(__file__).with_name("mock_upstream.c")
    subprocess.run([need("cc", "gcc"), "-O2", "-o", mock, source], check=True)
    return mock


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    home = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, cwd=home)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"{command}: did not end when asked to", file=sys.stderr)
        if process.stdout is not None:
            process.stdout.close()


def _start(
    stack: ExitStack, folder: Path, name: str, command: str, upstream_ports: dict[str, int]
) -> Target:
    """One process of a target per mode, each with its own mock behind it."""
    target = Target(name, {}, {})
    for mode in MODES:
        port = _free_port()
        values = {"port": port, "upstream_port": upstream_ports[mode]}
        if name == "nginx":
            home = folder / f"nginx-{mode}"
            home.mkdir()
            config = home / "nginx.conf"
            config.write_text(NGINX.format(folder=home, **values))
            words = [need("nginx", "nginx-light"), "-c", str(config), "-e", str(home / "error.log")]
        else:
            words = command.format(**values).split()
        process = stack.enter_context(_process(words))
        target.port[mode], target.pid[mode] = port, process.pid
        _await_port(port, process)
    return target


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"{process.args!r} does not listen on {port}")


# The measurement.


def _measure(folder: Path, targets: list[Target], options: argparse.Namespace, model: str) -> None:
    for mode in MODES:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "What is two and two? Answer in a sentence."}],
            "max_tokens": 64,
            "temperature": 0,
        }
        if mode == "chunk":
            body["stream"] = True
        script = folder / f"{mode}.lua"
        script.write_text(WRK_SCRIPT.format(body=json.dumps(body, separators=(",", ":"))))
        for connections in options.connections:
            for target in targets:
                _load(script, target, mode, connections, 0.3)
            for _ in range(options.rounds):
                for target in targets:
                    sample = _load(script, target, mode, connections, options.seconds)
                    target.samples.setdefault((mode, connections), []).append(sample)


def _load(script: Path, target: Target, mode: str, connections: int, seconds: float) -> Sample:
    """One run of wrk. Chunks are counted by the mock's pace: a run cuts the streams under way."""
    command = [need("wrk", "wrk"), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}"]
    command += ["-s", str(script), f"http://127.0.0.1:{target.port[mode]}"]
    before_s = cpu_s(target.pid[mode])
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spent_s = cpu_s(target.pid[mode]) - before_s
    result = json.loads(found.strip().splitlines()[-1])
    seconds = result["us"] / 1e6
    done = result["requests"] if mode == "request" else connections * seconds * 1e6 / GAP_US
    if not done:
        raise SystemExit(f"{target.name} answered nothing in {seconds:.1f} s: {result}")
    return Sample(
        cpu_us=1e6 * spent_s / done,
        rate=done / seconds,
        p50_us=result["p50_us"],
        errors=result["errors"],
    )


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    total_ns, stack = 0.0, [pid]
    while stack:
        one = stack.pop()
        stack += children.get(one, [])
        for task in Path(f"/proc/{one}/task").iterdir():
            total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def _print(targets: list[Target], connections: list[int]) -> None:
    for mode in MODES:
        print(
            f"\n{mode + 's':<10}"
            + "".join(f"{f'{count} connections':>34}" for count in connections)
        )
        print(f"{'':<10}" + f"{'CPU us':>12}{'rate/s':>11}{'p50 us':>11}" * len(connections))
        for target in targets:
            row = f"{target.name:<14}"
            for count in connections:
                samples = target.samples[mode, count]
                errors = sum(sample.errors for sample in samples)
                row += f"{_median(samples, 'cpu_us'):>12.1f}{_median(samples, 'rate'):>11.0f}"
                row += f"{_median(samples, 'p50_us'):>11.0f}" + (
                    f" ({errors} errors)" if errors else ""
                )
            print(row)


def _median(samples: list[Sample], name: str) -> float:
    values: list[float] = [getattr(sample, name) for sample in samples]
    return statistics.median(values)


def _holds(targets: list[Target]) -> bool:
    """Print each target's cost in nginx's at the most connections measured."""
    nginx = next(target for target in targets if target.name == "nginx")
    holds = True
    print()
    for target in targets:
        if target.name in {"direct", "nginx"}:
            continue
        for mode in MODES:
            load = max(key for key in nginx.samples if key[0] == mode)
            ratio = _median(target.samples[load], "cpu_us") / _median(nginx.samples[load], "cpu_us")
            good = ratio <= RATIO_MAX[mode]
            holds = holds and good
            print(
                f"{target.name}: a {mode} at {load[1]} connections costs {ratio:.2f} x nginx "
                f"(at most {RATIO_MAX[mode]:.0f} x: {'holds' if good else 'DOES NOT HOLD'})"
            )
    return holds


# Our proxy alone: the edge with the policy of a router that has one upstream.


def _run_proxy(port: int, upstream_port: int) -> None:
    import gc

    import uvloop

    async def serve() -> None:
        server = await _start_proxy(port, upstream_port)
        gc.collect()
        gc.freeze()
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        await server.close()

    uvloop.run(serve())


async def _start_proxy(port: int, upstream_port: int) -> EdgeServer:
    clock = SystemClock()
    upstreams = Upstreams(UpstreamSettings(), clock)
    upstream = Address(f"http://127.0.0.1:{upstream_port}")
    limits = RequestLimits()

    def timing(request: Request) -> bytes:
        spent_ms = (clock.now_s() - request.arrived_s) * 1000
        return b"openai-processing-ms: %d\r\nserver-timing: total;dur=%.1f\r\n" % (
            spent_ms,
            spent_ms,
        )

    async def route(request: Request) -> None:
        check_content_type(request.headers.get("content-type"))
        body = await request.body()
        parse_chat(body, limits)
        headers = f"content-type: application/json\r\nx-request-id: {request.id}\r\n".encode()
        async with upstreams.send(upstream, "POST", request.path, headers, body) as response:
            await relay(request, response, error_event=b"data: {}\n\n")

    server = EdgeServer(route, EdgeSettings(), render_error, clock, timing)
    await server.start(Address(f"http://127.0.0.1:{port}"))
    return server


if __name__ == "__main__":
    main()

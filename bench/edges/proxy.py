"""The edge alone, with the policy of a router that has one upstream.

python -m bench.edges.proxy PORT UPSTREAM_PORT
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys

import uvloop

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import Address
from serverlessllm.edge.relay import relay
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.request import check_content_type, parse_chat
from serverlessllm.openai.settings import RequestLimits


def main(port: int, upstream_port: int) -> None:
    """Serve until SIGTERM."""

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
    main(int(sys.argv[1]), int(sys.argv[2]))

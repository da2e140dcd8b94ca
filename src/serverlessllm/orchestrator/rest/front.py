"""This process's own front door, asked from inside: one code path serves whatever translates to it.

Routes that speak another dialect (`/v1/responses`, `/v1/messages`) and gRPC turn a request into one
of `/v1/chat/completions`, send it here over a unix socket, and translate the answer back. Key,
limits, cold start and errors are then the same for all of them.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from serverlessllm.core.ids import Address
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import Exchange, Upstreams

_numbers = itertools.count(1)
_PASSED_ON = (
    "authorization",
    "x-api-key",
    "x-sllm-progress",
    "x-sllm-wait",
)
"""Header fields that mean the same in every dialect."""


class Front:
    """`address` is where the edge listens beside the public address."""

    def __init__(self, upstreams: Upstreams, run_dir: Path) -> None:
        self._upstreams = upstreams
        self.address = Address(f"unix:{run_dir}/front-{os.getpid()}-{next(_numbers)}.sock")

    def ask(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b""
    ) -> Exchange:
        """Send a request; leaving the block before the answer's end cancels it.

        Raises:
            UpstreamError: it is not answered.
        """
        return self._upstreams.send(self.address, method, path, headers, body)

    def ask_for(self, client: Request, path: str, body: bytes) -> Exchange:
        """`POST` on behalf of a client: with its key, its id and its wishes.

        Raises:
            UpstreamError: it is not answered.
        """
        given = client.headers.get
        headers = [(name, value) for name in _PASSED_ON if (value := given(name)) is not None]
        headers += [("content-type", "application/json"), ("x-request-id", client.id)]
        return self.ask("POST", path, headers, body)

"""The agent's HTTP API: routes, the cluster token, and how its own errors look.

An answer of the agent's own that another agent could better carries `x-sllm-refused`; what a
backend answers, even an error, does not.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from serverlessllm.agent.chunks import Chunks
from serverlessllm.agent.inference import Inference
from serverlessllm.agent.orders import Orders
from serverlessllm.core.agentapi import (
    REFUSED_HEADER,
    TOKEN_HEADER,
    LoadRequest,
    UnloadRequest,
)
from serverlessllm.core.cluster import AgentRecord, CacheLevel
from serverlessllm.core.errors import (
    ClientError,
    InvalidJSON,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    SLLMError,
    TooManyRequests,
    Unauthorized,
)
from serverlessllm.core.ids import parse_model_id
from serverlessllm.edge.server import Request
from serverlessllm.openai.errors import render_error
from serverlessllm.telemetry import render_metrics

_JSON = (("content-type", "application/json"),)
_TEXT = (("content-type", "text/plain; version=0.0.4; charset=utf-8"),)
_BYTES = (("content-type", "application/octet-stream"),)
_CHUNKS = "/chunks/"
_Order = TypeVar("_Order", LoadRequest, UnloadRequest)
_encoder = msgspec.json.Encoder()


class AgentApi:
    """Dispatches by path; `refusal` says why nothing is served now (None: it is)."""

    def __init__(
        self,
        *,
        inference: Inference,
        orders: Orders,
        chunks: Chunks,
        token: str,
        chunks_max: int,
        status: Callable[[], AgentRecord],
    ) -> None:
        self._inference = inference
        self._orders = orders
        self._chunks = chunks
        self._token = token.encode()
        self._chunk_turns = asyncio.Semaphore(chunks_max)
        self._chunk_waiters_max = 16 * chunks_max
        self._chunk_waiters = 0
        self._status = status
        self.ready = False
        """Whether `/readyz` says so."""
        self.refusal: SLLMError | None = None
        self._routes: dict[str, tuple[str, Callable[[Request], Awaitable[None]]]] = {
            "/load": ("POST", self._load),
            "/prefetch": ("POST", self._prefetch),
            "/unload": ("POST", self._unload),
            "/status": ("GET", self._tell_status),
            "/metrics": ("GET", self._metrics),
        }

    async def handle(self, request: Request) -> None:
        """One request."""
        path = request.path
        if path in {"/livez", "/readyz"}:
            self._probe(request)
            return
        given = request.headers.get(TOKEN_HEADER)
        if given is None or not hmac.compare_digest(given.encode(), self._token):
            raise Unauthorized(f"header {TOKEN_HEADER}: the cluster's token is asked for")
        if path.startswith("/v1/"):
            self._check_serving()
            await self._inference.answer(request)
        elif path in self._routes:
            method, serve = self._routes[path]
            _check_method(request, method)
            await serve(request)
        elif path.startswith(_CHUNKS):
            _check_method(request, "GET")
            await self._chunk(request)
        else:
            raise RouteNotFound(f"no route {path[:200]}")

    def _probe(self, request: Request) -> None:
        _check_method(request, "GET")
        well = request.path == "/livez" or (self.ready and self.refusal is None)
        request.respond(200 if well else 503, _JSON, b'{"ok":true}' if well else b'{"ok":false}')

    def _check_serving(self) -> None:
        if self.refusal is not None:
            raise self.refusal.with_traceback(None)

    async def _load(self, request: Request) -> None:
        self._check_serving()
        order = await _read(request, LoadRequest)
        parse_model_id(order.spec.model)
        await self._orders.load(request, order)

    async def _prefetch(self, request: Request) -> None:
        self._check_serving()
        order = await _read(request, LoadRequest)
        parse_model_id(order.spec.model)
        if order.cache_level is CacheLevel.DEVICE:
            order = msgspec.structs.replace(order, cache_level=CacheLevel.DRAM)
        await self._orders.load(request, order)

    async def _unload(self, request: Request) -> None:
        order = await _read(request, UnloadRequest)
        parse_model_id(order.model)
        freed_bytes = await self._orders.unload(order)
        request.respond(200, _JSON, b'{"freed_bytes":%d}' % freed_bytes)

    async def _tell_status(self, request: Request) -> None:
        request.respond(200, _JSON, _encoder.encode(self._status()))

    async def _metrics(self, request: Request) -> None:
        request.respond(200, _TEXT, await asyncio.to_thread(render_metrics))

    async def _chunk(self, request: Request) -> None:
        if self._chunk_waiters >= self._chunk_waiters_max:
            raise TooManyRequests("too many peers fetch chunks from this agent", retry_after_s=1.0)
        self._chunk_waiters += 1
        try:
            async with self._chunk_turns:
                body = await self._chunks.get(request.path.removeprefix(_CHUNKS))
                request.start(200, _BYTES)
                await request.write(body)
                request.finish()
        finally:
            self._chunk_waiters -= 1


def render_refusal(error: SLLMError) -> tuple[int, list[tuple[str, str]], bytes]:
    """An error of the agent's own, marked as such where another agent may do better."""
    status, headers, body = render_error(error)
    if not isinstance(error, ClientError):
        headers.append((REFUSED_HEADER, error.code))
    return status, headers, body


def _check_method(request: Request, method: str) -> None:
    if request.method != method:
        raise MethodNotAllowed(f"{request.path[:200]} takes {method}", allow=(method,))


async def _read(request: Request, type_: type[_Order]) -> _Order:
    try:
        return msgspec.json.decode(await request.body(), type=type_)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the order is not valid: {error}") from None
    except (msgspec.DecodeError, RecursionError):
        raise InvalidJSON("the body is not JSON") from None

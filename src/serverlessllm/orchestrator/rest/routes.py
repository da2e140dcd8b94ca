"""The front door: guard, route, error contract, metrics; each request ends here exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from serverlessllm.core.apikeys import Scope
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import (
    BackendProtocolError,
    Draining,
    MethodNotAllowed,
    RouteNotFound,
    SLLMError,
    Unavailable,
)
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.edge.quick import Work
from serverlessllm.edge.relay import relay
from serverlessllm.edge.server import Request
from serverlessllm.edge.steps import in_task
from serverlessllm.edge.upstream import UpstreamError, Upstreams
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.request import parse_chat, parse_completion, parse_embeddings
from serverlessllm.openai.rerank import parse_rerank
from serverlessllm.openai.sse import error_event
from serverlessllm.openai.tokenize import parse_detokenize, parse_tokenize
from serverlessllm.orchestrator.rest.call import Call
from serverlessllm.orchestrator.rest.guard import ANY, Caller, Guard, PasswordWanted
from serverlessllm.orchestrator.rest.idempotency import IDEMPOTENCY_HEADER, Replays
from serverlessllm.orchestrator.rest.inference import Inference, Parse
from serverlessllm.orchestrator.rest.loading import StillLoading, loading_body
from serverlessllm.orchestrator.rest.route import GET, POST, Route, RouteTable
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.tallies import Tallies
from serverlessllm.orchestrator.timing import Timing, timing_lines
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.telemetry.logs import LOGGED, log
from serverlessllm.telemetry.metrics import CONTENT_TYPE
from serverlessllm.telemetry.table import CLIENTS_GONE

_log: Final = log("orchestrator")

_OK: Final = 200
_NO_KEY: Final = 401
_ASK_USER: Final = (
    'Basic realm="ServerlessLLM: any name, and an API key as the password", charset="UTF-8"'
)
_GONE: Final = 499
_BUG: Final = 500
_DRAINING: Final = Draining("this server is shutting down; send the request again")
_PLAIN: Final = "text/plain; charset=utf-8"
_OPENAI: Final = "/v1/"
_ANY: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_PARSERS: Final[dict[str, Parse]] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
    "/v1/embeddings": parse_embeddings,
    "/v1/tokenize": parse_tokenize,
    "/v1/detokenize": parse_detokenize,
    "/v1/rerank": parse_rerank,
}
HOT_PATHS: Final = frozenset(_PARSERS)
_HOP_BY_HOP: Final = frozenset(
    {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}
)


class Routes:
    """The handler of the edge."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        guard: Guard,
        inference: Inference,
        view: ClusterView,
        upstreams: Upstreams,
        management: Address,
        not_ready: Callable[[], str],
        metrics: Callable[[], Awaitable[bytes]],
        clock: Clock,
        routes: Sequence[Route] = (),
    ) -> None:
        self._guard = guard
        self._inference = inference
        self._view = view
        self._upstreams = upstreams
        self._management = management
        self._not_ready = not_ready
        self._render_metrics = metrics
        self._clock = clock
        self._replays = Replays(settings, clock)
        counted = [route.path for route in routes if _is_counted(route)]
        self._running = dict.fromkeys((*_PARSERS, *counted), 0)
        self._tallies = Tallies()
        self._table = RouteTable(
            (
                Route(path="/livez", methods=GET, serve=_alive, scope=None),
                Route(path="/readyz", methods=GET, serve=self._readyz, scope=None),
                Route(path="/metrics", methods=GET, serve=self._metrics, scope=Scope.METRICS),
                Route(path="/api/", methods=_ANY, serve=self._manage, scope=Scope.ADMIN),
                *routes,
            )
        )

    async def handle(self, request: Request) -> None:
        """Answer one request, whatever happens."""
        path = request.path
        parse = _PARSERS.get(path)
        if parse is None:
            await self._other(request)
            return
        self._running[path] += 1
        await self.counted(request, self._answer(request, parse))

    def quick(self, request: Request) -> Work | None:
        """Answer a warm request without a coroutine; None: `handle` is to be asked."""
        parse = _PARSERS.get(request.path)
        if (
            parse is None
            or request.method != "POST"
            or request.headers.get(IDEMPOTENCY_HEADER) is not None
        ):
            return None
        try:
            self._guard.check(request, Scope.INFERENCE)
            call = self._inference.ask(request, parse)
        except SLLMError:
            return None
        if call is None:
            return None
        self._running[request.path] += 1
        return _Quick(self, self._inference, call)

    async def _answer(self, request: Request, parse: Parse) -> int:
        self._guard.check(request, Scope.INFERENCE)
        if request.method != "POST":
            raise MethodNotAllowed(f"{request.path} takes POST", allow=POST)
        key = request.headers.get(IDEMPOTENCY_HEADER)
        if key is None:
            return await self._inference.answer(request, parse)
        return await self._replays.answer(
            request, key, lambda request: self._inference.answer(request, parse)
        )

    async def counted(self, request: Request, answer: Awaitable[int]) -> None:
        """The boundary of a hot request."""
        status = _BUG
        try:
            status = await answer
        except SLLMError as error:
            status = error.status
            if not request.started:
                raise
            request.end(error_event(error))
        except asyncio.CancelledError:
            status = _cancelled(request)
            # A drain's grace is over: the edge tells whoever has heard nothing yet.
            if request.connected and request.started:
                request.end(error_event(_DRAINING))
            raise
        finally:
            self.note(request.path, request, status)

    def answer_headers(self, request: Request) -> bytes:
        """The header lines of every answer: where its time went, what its key has left."""
        now_s = self._clock.now_s()
        lines = timing_lines(request.state, request.arrived_s, now_s)
        caller = request.caller
        if isinstance(caller, Caller) and caller.usage is not None:
            lines += caller.usage.lines(now_s)
        return lines

    def running(self) -> dict[str, int]:
        """Requests being answered, by route."""
        return dict(self._running)

    def note(self, path: str, request: Request, status: int) -> None:
        """The one place that counts a request, however it ended; by its route's path."""
        timing = request.state
        known = timing if isinstance(timing, Timing) else None
        model = ModelId("") if known is None else known.model
        if model not in self._view.models:
            model = ModelId("")  # a label is not for whoever asks to invent
        seconds = self._clock.now_s() - request.arrived_s
        self._running[path] -= 1
        if status == _GONE:
            CLIENTS_GONE.inc(path)
        self._tallies.of(path, model).count(status, seconds, request.arrived_s, known)
        if LOGGED.level <= logging.DEBUG:
            _log.debug("request", request=request.id, model=model, status=status, seconds=seconds)

    async def _other(self, request: Request) -> None:
        """Everything that is not hot."""
        await in_task()
        route = self._table.find(request.path)
        if route is None or not _is_counted(route):
            await self._explained(request, route)
            return
        status = _BUG
        self._running[route.path] += 1
        try:
            await self._explained(request, route)
            status = request.status
        except SLLMError as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = _cancelled(request)
            raise
        finally:
            self.note(route.path, request, status)

    async def _explained(self, request: Request, route: Route | None) -> None:
        """Serve; an error is told in the words of the route's own API."""
        try:
            await self._serve(request, route)
        except SLLMError as error:
            if route is None or route.explain is None or request.started:
                raise
            route.explain(request, error)

    async def _serve(self, request: Request, route: Route | None) -> None:
        if route is None:
            self._guard.check(request, ANY)
            raise RouteNotFound(f"there is no {request.path[:200]}")
        self._guard.check(request, route.scope, page=route.page)
        if request.method not in route.methods:
            takes = f"{request.path[:200]} takes {route.methods[0]}"
            raise MethodNotAllowed(takes, allow=route.methods)
        key = request.headers.get(IDEMPOTENCY_HEADER)
        if key is not None and request.method == "POST" and request.path.startswith(_OPENAI):
            await self._replays.answer(request, key, route.serve)
        else:
            await route.serve(request)

    async def _readyz(self, request: Request) -> None:
        reason = self._not_ready()
        if reason:
            raise Unavailable(reason, retry_after_s=1.0)
        _text(request, b"ok\n")

    async def _metrics(self, request: Request) -> None:
        _text(request, await self._render_metrics(), CONTENT_TYPE)

    async def _manage(self, request: Request) -> None:
        """Pass a management request on to the ordinary application behind us."""
        body = await request.body()
        path = f"{request.path}?{request.query}" if request.query else request.path
        headers = [(n, v) for n, v in request.headers.items() if n not in _HOP_BY_HOP]
        try:
            async with self._upstreams.send(
                self._management, request.method, path, headers, body
            ) as response:
                await relay(request, response)
        except UpstreamError as error:
            raise BackendProtocolError("the management application does not answer") from error


class _Quick:
    """A request that is being answered without a coroutine (`edge.quick.Work`)."""

    __slots__ = ("_call", "_inference", "_routes", "link")

    def __init__(self, routes: Routes, inference: Inference, call: Call) -> None:
        self._routes = routes
        self._inference = inference
        self._call = call
        self.link = call.link

    def go_on(self) -> Awaitable[None] | None:
        call = self._call
        if self._inference.finish(call):
            self._routes.note(call.request.path, call.request, call.status)
            return None
        return self._routes.counted(call.request, self._inference.go_on(call))

    def give_up(self) -> None:
        request = self._call.request
        self._inference.give_up(self._call)
        self._routes.note(request.path, request, request.status or _cancelled(request))


def _cancelled(request: Request) -> int:
    """The status of a request that is served no longer."""
    return _DRAINING.status if request.connected else _GONE


def render(error: SLLMError) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body of an error; `loading` beside it when the model is on its way."""
    status, headers, body = render_error(error)
    if error.status == _NO_KEY:
        scheme = _ASK_USER if isinstance(error, PasswordWanted) else "Bearer"
        headers.append(("www-authenticate", scheme))
    if isinstance(error, StillLoading):
        body = loading_body(error, body)
    return status, headers, body


def _is_counted(route: Route) -> bool:
    """Whether it is of an API that is counted by route; a translated request counts twice, as
    what was asked and as the chat that it became."""
    return route.path.startswith(_OPENAI)


async def _alive(request: Request) -> None:
    _text(request, b"ok\n")


def _text(request: Request, body: bytes, content_type: str = _PLAIN) -> None:
    request.respond(_OK, (("content-type", content_type),), body)

"""`/api/*`: an ordinary Starlette application; `wire` has its bodies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Match, Route

from serverlessllm import __version__
from serverlessllm.core.apikeys import NewApiKey
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import (
    Forbidden,
    MethodNotAllowed,
    ModelNotFound,
    RouteNotFound,
    SLLMError,
)
from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.core.models import ModelRecord
from serverlessllm.openai.errors import error_body, render_error
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.operations import Operations, failed_event
from serverlessllm.orchestrator.rest import wire
from serverlessllm.orchestrator.rest.bodies import (
    check_source,
    model_of,
    read_body,
    read_keep_alive_s,
    read_limit,
    read_spec,
)
from serverlessllm.orchestrator.rest.guard import is_local
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import AgentSeen, ClusterView
from serverlessllm.scheduler.choose import Row
from serverlessllm.telemetry.logs import log

_log = log("orchestrator")
_METHOD_NOT_ALLOWED = 405


class Management:
    """The handlers; `app` is the application."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        operations: Operations,
        view: ClusterView,
        router: Router,
        room: WaitingRoom,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._accepts_commands = (
            is_local(settings.listen)
            if settings.accept_commands is None
            else settings.accept_commands
        )
        self._operations = operations
        self._view = view
        self._router = router
        self._room = room
        self._clock = clock
        self.app = Starlette(
            routes=[
                Route("/api/version", self._version),
                Route("/api/models", self._list_models, methods=["GET"]),
                Route("/api/models", self._create, methods=["POST"]),
                Route("/api/models/{model:path}", self._show, methods=["GET"]),
                Route("/api/models/{model:path}", self._delete, methods=["DELETE"]),
                Route("/api/load", self._load, methods=["POST"]),
                Route("/api/unload", self._unload, methods=["POST"]),
                Route("/api/pull", self._pull, methods=["POST"]),
                Route("/api/explain/{model:path}", self._explain),
                Route("/api/agents", self._list_agents),
                Route("/api/agents/{agent}", self._show_agent),
                Route("/api/jobs", self._list_jobs),
                Route("/api/jobs/{model:path}", self._show_job),
                Route("/api/keys", self._list_keys, methods=["GET"]),
                Route("/api/keys", self._create_key, methods=["POST"]),
                Route("/api/keys/{name}", self._revoke_key, methods=["DELETE"]),
            ],
            exception_handlers={
                SLLMError: _on_error,
                HTTPException: _on_http_error,
                Exception: _on_bug,
            },
        )

    async def _version(self, _: Request) -> Response:
        return _json(wire.Version(version=__version__))

    async def _list_models(self, request: Request) -> Response:
        limit = read_limit(request.query_params.get("limit"), self._settings.models_list_max)
        after = request.query_params.get("after", "")
        names = sorted(name for name in self._view.models if name > after)
        page = tuple(self._model(self._view.models[name]) for name in names[:limit])
        more = page[-1].model if len(names) > limit else None
        return _json(wire.ModelList(models=page, next_after=more))

    async def _create(self, request: Request) -> Response:
        spec = read_spec(await request.body())
        if spec.command and not self._accepts_commands:
            raise Forbidden(
                "command: agents would run it, and other machines reach this server; "
                "orchestrator.accept_commands allows it",
                param="command",
            )
        record = await self._operations.create(spec)
        return _json(self._model(record), status=201)

    async def _show(self, request: Request) -> Response:
        return _json(self._model(self._operations.record(self._named(request))))

    async def _delete(self, request: Request) -> Response:
        model = self._named(request)
        return _json(wire.Deleted(model=model, bytes_freed=await self._operations.delete(model)))

    async def _load(self, request: Request) -> Response:
        body = read_body(await request.body(), wire.LoadModel)
        keep_alive_s = read_keep_alive_s(body.keep_alive)
        events = self._operations.load(model_of(body.model, self._view.names), keep_alive_s)
        return await _lines(events, lambda error: msgspec.json.encode(failed_event(error)))

    async def _unload(self, request: Request) -> Response:
        body = read_body(await request.body(), wire.UnloadModel)
        model = model_of(body.model, self._view.names)
        self._operations.record(model)
        agents = await self._operations.unload(model, body.cache_level, force=body.force)
        return _json(wire.Unloaded(model=model, agents=agents))

    async def _pull(self, request: Request) -> Response:
        body = read_body(await request.body(), wire.PullModel)
        if body.source is not None:
            check_source(body.source)
        model = model_of(body.model, self._view.names)
        return await _lines(self._operations.pull(model, body.source, body.backend), error_body)

    async def _explain(self, request: Request) -> Response:
        model = self._named(request)
        decision = self._router.explain(self._operations.record(model))
        rows = tuple(_score_row(row) for row in decision.rows)
        return _json(wire.Explained(model=model, chosen=decision.winner, rows=rows))

    async def _list_agents(self, _: Request) -> Response:
        agents = sorted(self._view.agents.items())[: self._settings.models_list_max]
        return _json(wire.AgentList(agents=tuple(self._agent(seen) for _, seen in agents)))

    async def _show_agent(self, request: Request) -> Response:
        seen = self._view.agents.get(AgentId(request.path_params["agent"]))
        if seen is None:
            raise RouteNotFound("there is no such agent; GET /api/agents lists them")
        return _json(self._agent(seen))

    async def _list_jobs(self, _: Request) -> Response:
        jobs = sorted(self._view.jobs.items())[: self._settings.models_list_max]
        return _json(wire.JobList(jobs=tuple(job for _, job in jobs)))

    async def _show_job(self, request: Request) -> Response:
        model = self._named(request)
        job = self._view.jobs.get(model)
        if job is None:
            raise ModelNotFound(f"{model} has no ingest job; GET /api/jobs lists them")
        return _json(job)

    async def _list_keys(self, _: Request) -> Response:
        keys = sorted(self._view.api_keys.values(), key=lambda key: (key.created_s, key.id))
        shown = keys[-self._settings.models_list_max :]
        return _json(wire.KeyList(keys=tuple(map(wire.key_view, shown))))

    async def _create_key(self, request: Request) -> Response:
        wanted = read_body(await request.body(), NewApiKey)
        return _json(wire.created_key(*await self._operations.create_key(wanted)), status=201)

    async def _revoke_key(self, request: Request) -> Response:
        key = await self._operations.revoke_key(request.path_params["name"])
        return _json(wire.key_view(key))

    def _named(self, request: Request) -> ModelId:
        """The model that the path names, by its name or an alias."""
        return model_of(request.path_params["model"], self._view.names)

    def _model(self, record: ModelRecord) -> wire.ModelView:
        model, now_s = record.spec.model, self._clock.now_s()
        placements = tuple(
            wire.PlacedModel(
                agent=seen.agent,
                suspect=seen.suspect(now_s, self._settings.agent_silent_s),
                on_agent=on,
            )
            for _, seen in sorted(self._view.agents.items())
            if (on := seen.models.get(model)) is not None
        )
        return wire.ModelView(
            model=model,
            spec=record.spec,
            checkpoint=record.checkpoint,
            created_s=record.created_s,
            placements=placements,
            job=self._view.jobs.get(model),
            last_load=_last_load(self._room, model),
        )

    def _agent(self, seen: AgentSeen) -> wire.AgentView:
        now_s = self._clock.now_s()
        return wire.AgentView(
            agent=seen.agent,
            heartbeat_age_s=max(0.0, now_s - seen.seen_s),
            suspect=seen.suspect(now_s, self._settings.agent_silent_s),
            record=seen.record,
        )


def _last_load(room: WaitingRoom, model: ModelId) -> wire.LastLoad | None:
    loaded = room.last_load(model)
    if loaded is None:
        return None
    return wire.LastLoad(
        agent=loaded.agent,
        total_s=loaded.ingest_s + loaded.place_s + loaded.load_s,
        predicted_s=loaded.predicted_s,
        hops=loaded.hops,
    )


def _score_row(row: Row) -> wire.ScoreRow:
    reason = "" if row.excluded is None else ": ".join(filter(None, (row.excluded, row.reason)))
    return wire.ScoreRow(
        agent=row.agent,
        chosen=row.chosen,
        eligible=row.excluded is None,
        reason=reason,
        cache_level=CacheLevel(row.cache_level),
        queue_len=row.queue_len,
        cache_term_s=row.terms.cache_s,
        kv_term_s=row.terms.kv_s,
        queue_term_s=row.terms.queue_s,
        move_term_s=row.terms.move_s,
        score_s=row.score_s,
    )


async def _lines(
    values: AsyncIterator[msgspec.Struct], last_line: Callable[[SLLMError], bytes]
) -> Response:
    """One JSON a line. What fails before the first line has a status of its own."""
    first = await anext(values)

    async def lines() -> AsyncIterator[bytes]:
        yield msgspec.json.encode(first) + b"\n"
        try:
            async for value in values:
                yield msgspec.json.encode(value) + b"\n"
        except SLLMError as error:
            yield last_line(error) + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _json(value: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _rendered(error: SLLMError) -> Response:
    status, headers, body = render_error(error)
    return Response(body, status, headers=dict(headers))


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, SLLMError)
    return _rendered(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == _METHOD_NOT_ALLOWED:
        found = {
            method
            for route in request.app.routes
            if route.matches(request.scope)[0] is not Match.NONE
            for method in route.methods
        }
        allow = tuple(sorted(found))
        return _rendered(MethodNotAllowed(f"this route takes {', '.join(allow)}", allow=allow))
    return _rendered(RouteNotFound("there is no such route"))


async def _on_bug(_: Request, error: Exception) -> Response:
    _log.error("management request failed by a bug", exc_info=error)
    return _rendered(SLLMError())

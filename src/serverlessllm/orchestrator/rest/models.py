"""`/v1/models` and `/v1/models/{id}`: which models there are, and how ready they are."""

from __future__ import annotations

from typing import Literal
from urllib.parse import unquote

from msgspec import UNSET

from serverlessllm.core.errors import ModelNotFound
from serverlessllm.edge.server import Request
from serverlessllm.openai.errors import error_fields
from serverlessllm.openai.models import ModelStatus, list_body, model_body, model_object
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.loads import unknown_model
from serverlessllm.orchestrator.rest.guard import caller_of
from serverlessllm.orchestrator.rest.route import GET, Route
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.status import (
    COLD,
    INGESTING,
    READY,
    Status,
    placements_of,
    status_of,
)
from serverlessllm.orchestrator.view import ClusterView

_OK = 200
_JSON = (("content-type", "application/json"),)
_ONE = "/v1/models/"


class Models:
    """Looking wakes no model."""

    def __init__(
        self, settings: OrchestratorSettings, *, view: ClusterView, room: WaitingRoom
    ) -> None:
        self._settings = settings
        self._view = view
        self._room = room
        self.routes = (
            Route(path="/v1/models", methods=GET, serve=self._list),
            Route(path=_ONE, methods=GET, serve=self._show),
        )

    async def _list(self, request: Request) -> None:
        view, caller = self._view, caller_of(request)
        models = sorted(
            (model, record.created_s)
            for model, record in view.models.items()
            if caller is None or caller.may_use(model, view.names)
        )
        placements = placements_of(view)
        objects = [
            model_object(model, created_s, _told(status_of(model, view, self._room, placements)))
            for model, created_s in models[: self._settings.models_list_max]
        ]
        request.respond(_OK, _JSON, list_body(objects))

    async def _show(self, request: Request) -> None:
        name = unquote(request.path.removeprefix(_ONE))
        caller, names = caller_of(request), self._view.names
        model = names.get(name)
        if caller is not None:
            caller.check_model(model or name, names)
            names = caller.usable(names)
        if model is None:
            message = unknown_model(name, self._settings, self._view, names)
            raise ModelNotFound(message, param="model")
        status = _told(status_of(model, self._view, self._room))
        one = model_object(model, self._view.models[model].created_s, status, name=name)
        request.respond(_OK, _JSON, model_body(one))


def _told(status: Status) -> ModelStatus:
    """In the five words that a client has to know; the `stage` says more."""
    state: Literal["ready", "loading", "ingesting", "cold", "failed"] = "loading"
    stage = status.stage or status.state
    if status.state == READY:
        state, stage = "ready", ""
    elif status.state == INGESTING:
        state, stage = "ingesting", status.stage
    elif status.error is not None:
        state, stage = "failed", ""
    elif status.state == COLD:
        state, stage = "cold", ""
    return ModelStatus(
        state=state,
        stage=stage,
        bytes=status.bytes_done,
        total=status.bytes_total,
        eta_s=UNSET if status.eta_s is None else status.eta_s,
        agents_ready=status.agents_ready,
        cache_level=status.cache_level,
        error=UNSET if status.error is None else error_fields(status.error),
    )

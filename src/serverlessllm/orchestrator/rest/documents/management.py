"""`/api/*` as the document tells it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.apikeys import LIMIT_MAX, MODELS_MAX, NAME_CHARS_MAX, NewApiKey, Scope
from serverlessllm.core.cluster import JobRecord
from serverlessllm.openai.document import Answer, Operation, Parameter
from serverlessllm.openai.document.operation import LINES
from serverlessllm.orchestrator.rest import wire
from serverlessllm.orchestrator.rest.bodies import NewModel
from serverlessllm.orchestrator.rest.documents.inference import MODEL

_Limit: TypeAlias = Annotated[int, Meta(ge=1, le=LIMIT_MAX)]
_MODELS = r"^(?=[^*]*(?:\*[^*]*){0,3}$)[A-Za-z0-9._@/*-]{1,256}$"
_READ = (401, 403, 405)
_NAMED = (400, 401, 403, 404, 405)
_CHANGED = (400, 401, 403, 404, 405, 409, 413, 429, 502, 503, 504, 507)


class NewKey(NewApiKey, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a key shall be."""

    name: Annotated[
        str,
        Meta(max_length=NAME_CHARS_MAX, pattern="^[A-Za-z0-9](?:[A-Za-z0-9._@ -]*[A-Za-z0-9])?$"),
    ]
    """What people call it."""
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] = (Scope.INFERENCE,)
    """The groups of routes that it opens."""
    models: Annotated[
        tuple[Annotated[str, Meta(pattern=_MODELS)], ...],
        Meta(max_length=MODELS_MAX),
    ] = ()
    """Names of models that it may use, with up to three `*` in one; empty: all."""
    expires_s: int | None = None
    """Unix time, to come."""
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    requests_at_once: _Limit | None = None


def _operation(
    method: Literal["get", "post", "delete"],
    path: str,
    summary: str,
    answer: Any,
    *,
    body: Any = None,
    status: int = 200,
    lines: bool = False,
    parameters: tuple[Parameter, ...] = (),
    errors: tuple[int, ...] = _READ,
) -> Operation:
    """One of them; `lines`: its answer is a stream of `answer`."""
    told = Answer(status=status, description="Done.", type=answer)
    if lines:
        told = Answer(description="How far it is.", type=answer, content_type=LINES)
    return Operation(
        path=path,
        method=method,
        tag="Management",
        summary=summary,
        body=body,
        answers=(told,),
        parameters=parameters,
        errors=errors,
    )


def _of_model(summary: str, path: str, answer: Any) -> Operation:
    return _operation("get", path, summary, answer, parameters=(MODEL,), errors=_NAMED)


_PAGE = (
    Parameter(
        name="after",
        where="query",
        type=str,
        description="`next_after` of the page before.",
    ),
    Parameter(
        name="limit",
        where="query",
        type=Annotated[int, Meta(ge=1, le=1000)],
        description="The most models of one page.",
    ),
)

MANAGEMENT = (
    _operation("get", "/api/version", "Tell the version", wire.Version),
    _operation(
        "get",
        "/api/models",
        "List models and where they are",
        wire.ModelList,
        parameters=_PAGE,
        errors=(400, *_READ),
    ),
    _operation(
        "post",
        "/api/models",
        "Register a model",
        wire.ModelView,
        body=NewModel,
        status=201,
        errors=_CHANGED,
    ),
    _of_model("Show a model and where it is", "/api/models/{model}", wire.ModelView),
    _operation(
        "delete",
        "/api/models/{model}",
        "Delete a model and its bytes",
        wire.Deleted,
        parameters=(MODEL,),
        errors=_CHANGED,
    ),
    _operation(
        "post",
        "/api/load",
        "Make a model ready",
        LoadEvent,
        body=wire.LoadModel,
        lines=True,
        errors=_CHANGED,
    ),
    _operation(
        "post",
        "/api/unload",
        "Stop a model",
        wire.Unloaded,
        body=wire.UnloadModel,
        errors=_CHANGED,
    ),
    _operation(
        "post",
        "/api/pull",
        "Bring a model's checkpoint into the store",
        JobRecord,
        body=wire.PullModel,
        lines=True,
        errors=_CHANGED,
    ),
    _of_model("Explain where a model would go", "/api/explain/{model}", wire.Explained),
    _operation("get", "/api/agents", "List agents", wire.AgentList),
    _operation(
        "get",
        "/api/agents/{agent}",
        "Show an agent",
        wire.AgentView,
        parameters=(Parameter(name="agent", where="path", type=str, description="Its name."),),
        errors=_NAMED,
    ),
    _operation("get", "/api/jobs", "List ingest jobs", wire.JobList),
    _of_model("Show a model's ingest job", "/api/jobs/{model}", JobRecord),
    _operation("get", "/api/keys", "List API keys", wire.KeyList),
    _operation(
        "post",
        "/api/keys",
        "Make an API key",
        wire.CreatedKey,
        body=NewKey,
        status=201,
        errors=_CHANGED,
    ),
    _operation(
        "delete",
        "/api/keys/{name}",
        "Revoke an API key",
        wire.KeyView,
        parameters=(Parameter(name="name", where="path", type=str, description="Its name or id."),),
        errors=_CHANGED,
    ),
)

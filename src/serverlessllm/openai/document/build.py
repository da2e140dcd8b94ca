"""The document itself, as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any, TypeAlias

import msgspec

from serverlessllm.openai.document.components import Components
from serverlessllm.openai.document.operation import EVENTS, JSON, Answer, Operation, Parameter
from serverlessllm.openai.errors import ErrorBody
from serverlessllm.openai.settings import RequestLimits

_Json: TypeAlias = dict[str, Any]
_KEY = "key"
_HEADER_KEY = "header_key"
_RETRY = frozenset({429, 503})
_MEANINGS = {
    400: "The request is not what it must be; `param` names the field.",
    401: "The API key is missing, or is none of this server's.",
    403: "The API key may not do this.",
    404: "There is no such model, or no such thing.",
    405: "The path does not take this method.",
    408: "The request did not come in time.",
    409: "It contradicts what exists.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    429: "The queue is full, or the key's limit is reached.",
    431: "The header is too long.",
    502: "The backend failed.",
    503: "Not now: the model still loads (`model_loading`), or nothing has room for it.",
    504: "The answer did not come in time.",
    507: "A store or a cache is full.",
}
_HEADERS: _Json = {
    "x-request-id": {
        "description": "Names this request in the server's log; a valid one that you sent is kept.",
        "schema": {"type": "string"},
    },
    "openai-processing-ms": {
        "description": "Milliseconds from the request's arrival to the answer's head.",
        "schema": {"type": "integer"},
    },
    "server-timing": {
        "description": "Where they went: queue, place, fetch, read, start, ttft.",
        "schema": {"type": "string"},
    },
    **{
        f"x-ratelimit-{what}-{unit}": {
            "description": f"{meaning} of the key's {unit} a minute, where they are limited.",
            "schema": {"type": "string"},
        }
        for unit in ("requests", "tokens")
        for what, meaning in (
            ("limit", "All"),
            ("remaining", "What is left"),
            ("reset", "When all is there again,"),
        )
    },
    "retry-after": {
        "description": "Seconds to wait before the request is sent again.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 120},
    },
}
_INFO = """\
Models behind the OpenAI API: a model that nobody asks for costs nothing, and the first request
wakes it. Client libraries for OpenAI work unchanged with this server as their `base_url`.

A stream for a cold model is answered at once: comments tell how far the load is, then the answer
follows. Any other request is held until the model is ready, or for as long as `X-SLLM-Wait` says.

Fields that this document does not name are passed on to the model's backend.
"""


def build_document(
    operations: Sequence[Operation],
    *,
    tags: dict[str, str],
    limits: RequestLimits,
    version: str,
    error: type[msgspec.Struct] = ErrorBody,
) -> bytes:
    """An OpenAPI 3.1 document. `tags`: each tag's description; `error`: the body of all errors."""
    components = Components(
        asked=[o.body for o in operations if o.body is not None]
        + [parameter.type for o in operations for parameter in o.parameters],
        answered=[error]
        + [o.error for o in operations if o.error is not None]
        + [answer.type for o in operations for answer in o.answers if answer.type is not None],
        limits=limits,
    )
    paths: dict[str, _Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(
            operation, components, error
        )
    statuses = sorted({status for o in operations for status in o.errors})
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "ServerlessLLM",
                "version": version,
                "description": _INFO,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "security": [{_KEY: []}, {_HEADER_KEY: []}],
            "tags": [{"name": name, "description": text} for name, text in tags.items()],
            "paths": paths,
            "components": {
                "schemas": components.schemas,
                "headers": _HEADERS,
                "responses": {str(s): _error(s, components.schema(error)) for s in statuses},
                "securitySchemes": {
                    _KEY: {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "An API key of `sllm key create`, if this server has any.",
                    },
                    _HEADER_KEY: {
                        "type": "apiKey",
                        "in": "header",
                        "name": "x-api-key",
                        "description": "The same where clients of other APIs send it.",
                    },
                },
            },
        }
    )


def _operation(operation: Operation, components: Components, error: type) -> _Json:
    said: _Json = {
        "operationId": _name(operation),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _answers(operation.answers, components, error)
        | _errors(operation, components),
    }
    if operation.description:
        said["description"] = operation.description
    if operation.parameters:
        said["parameters"] = [_parameter(one, components) for one in operation.parameters]
    if operation.body is not None:
        content: _Json = {"schema": components.schema(operation.body)}
        if operation.example:
            content["example"] = msgspec.json.decode(operation.example)
        said["requestBody"] = {"required": True, "content": {JSON: content}}
    if operation.open:
        said["security"] = []
    return said


def _name(operation: Operation) -> str:
    """An identifier: `post_v1_chat_completions`."""
    words = operation.path.replace("{", "").replace("}", "").replace(".", "_").split("/")
    return "_".join([operation.method, *filter(None, words)])


def _answers(answers: Iterable[Answer], components: Components, error: type) -> _Json:
    told: dict[str, _Json] = {}
    for answer in answers:
        one = told.setdefault(
            str(answer.status),
            {"description": answer.description, "headers": _headers(answer.status), "content": {}},
        )
        one["content"][answer.content_type] = _content(answer, components, error)
    return told


def _content(answer: Answer, components: Components, error: type) -> _Json:
    if answer.content_type == JSON:
        return {"schema": components.schema(answer.type)}
    if answer.content_type == EVENTS:
        return {"schema": _event(answer, components, error)}
    schema: _Json = {"type": "string"}
    if answer.type is not None:
        name = components.schema(answer.type)["$ref"].rpartition("/")[2]
        schema["description"] = f"Each line is a `{name}`."
    return {"schema": schema}


def _event(answer: Answer, components: Components, error: type) -> _Json:
    """One server-sent event; in OpenAPI 3.1 it stands where the body's schema does."""
    data: _Json = {"type": "string"}
    if answer.type is not None:
        whole = {"anyOf": [components.schema(answer.type), components.schema(error)]}
        text = {"type": "string", "contentMediaType": JSON, "contentSchema": whole}
        data = {"anyOf": [text, {"const": "[DONE]"}]}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": data},
    }


def _headers(status: int) -> _Json:
    names = [name for name in _HEADERS if name != "retry-after" or status in _RETRY]
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _errors(operation: Operation, components: Components) -> _Json:
    if operation.error is None:
        return {str(s): {"$ref": f"#/components/responses/{s}"} for s in operation.errors}
    body = components.schema(operation.error)
    return {str(s): _error(s, body) for s in operation.errors}


def _error(status: int, body: _Json) -> _Json:
    return {
        "description": f"{HTTPStatus(status).phrase}. {_MEANINGS[status]}",
        "headers": _headers(status),
        "content": {JSON: {"schema": body}},
    }


def _parameter(parameter: Parameter, components: Components) -> _Json:
    said: _Json = {
        "name": parameter.name,
        "in": parameter.where,
        "description": parameter.description,
        "schema": components.schema(parameter.type),
    }
    if parameter.where == "path":
        said["required"] = True
    if parameter.example is not None:
        said["example"] = parameter.example
    return said

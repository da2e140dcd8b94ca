"""How this process is, and its own description, as the document tells them."""

from __future__ import annotations

from typing import Any

from serverlessllm.openai.document import Answer, Operation
from serverlessllm.openai.document.operation import TEXT

_SERVER = "Server"


def _text(
    path: str,
    summary: str,
    description: str,
    *,
    errors: tuple[int, ...],
    content_type: str = TEXT,
    needs_key: bool = True,
) -> Operation:
    return Operation(
        path=path,
        method="get",
        tag=_SERVER,
        summary=summary,
        answers=(Answer(description=description, content_type=content_type),),
        errors=errors,
        open=not needs_key,
    )


SERVER = (
    _text("/livez", "Ask whether this process lives", "It does.", errors=(405,), needs_key=False),
    _text(
        "/readyz", "Ask whether requests may come", "They may.", errors=(405, 503), needs_key=False
    ),
    _text("/metrics", "Read the metrics", "Prometheus' text.", errors=(401, 403, 405)),
    Operation(
        path="/openapi.json",
        method="get",
        tag=_SERVER,
        summary="Read this document",
        answers=(Answer(description="OpenAPI 3.1.", type=dict[str, Any]),),
        errors=(401, 403, 405),
    ),
    _text(
        "/docs",
        "See this document",
        "A page.",
        errors=(401, 403, 405),
        content_type="text/html",
    ),
)

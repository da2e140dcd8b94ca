"""The management API in one call each, for tests and benchmarks."""

from __future__ import annotations

import http.client
import json
from typing import Any

from serverlessllm.core.ids import Address

_TIMEOUT_S = 120.0


def register(address: Address, **spec: Any) -> None:
    """Create a model of these `ModelSpec` fields."""
    call(address, "POST", "/api/models", spec)


def call(address: Address, method: str, path: str, body: object = None) -> Any:
    """One request; the decoded answer (None when it has no body).

    Raises:
        RuntimeError: the server refused; carries its answer.
    """
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=_TIMEOUT_S)
    try:
        connection.request(
            method,
            path,
            None if body is None else json.dumps(body),
            {"content-type": "application/json"},
        )
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {data[:1000]!r}")
    lines = data.splitlines()
    return json.loads(lines[-1]) if lines else None

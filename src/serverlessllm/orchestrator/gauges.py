"""What a front door shows of the requests that it has now."""

from __future__ import annotations

from collections.abc import Mapping

from serverlessllm.core.ids import ModelId
from serverlessllm.telemetry.table import REQUESTS_RUNNING, REQUESTS_WAITING


class RequestGauges:
    """Set when somebody looks; a model that nobody waits for is not shown."""

    def __init__(self) -> None:
        self._shown: set[ModelId] = set()

    def set(self, running: Mapping[str, int], waiting: Mapping[ModelId, int]) -> None:
        """Requests being answered, by route, and waiting for a model."""
        for route, requests in running.items():
            REQUESTS_RUNNING.set(requests, route)
        for model in self._shown - waiting.keys():
            REQUESTS_WAITING.forget(model)
        for model, requests in waiting.items():
            REQUESTS_WAITING.set(requests, model)
        self._shown = set(waiting)

"""What every request counts, by route and model: its series are found once, and change at once.

They belong to the event loop's thread.
"""

from __future__ import annotations

from typing import Final

from serverlessllm.core.ids import ModelId
from serverlessllm.orchestrator.timing import Timing
from serverlessllm.telemetry.table import REQUEST_SECONDS, REQUESTS, TOKENS, TTFT_SECONDS

_TALLIES_MAX: Final = 1024


class Tally:
    """The series of one model on one route."""

    __slots__ = ("_model", "_path", "_seconds", "_statuses", "_ttft", "_used")

    def __init__(self, path: str, model: ModelId) -> None:
        self._path = path
        self._model = model
        self._seconds = REQUEST_SECONDS.cell(path, model)
        self._statuses = {200: REQUESTS.cell(path, model, "200")}
        self._ttft = {
            start == "cold": TTFT_SECONDS.cell(model, start) for start in ("cold", "warm")
        }
        self._used = TOKENS.cell(model, "prompt"), TOKENS.cell(model, "completion")

    def count(self, status: int, seconds: float, arrived_s: float, timing: Timing | None) -> None:
        """One request has ended."""
        cell = self._statuses.get(status)
        if cell is None:
            cell = REQUESTS.cell(self._path, self._model, str(status))
            self._statuses[status] = cell
        cell.value += 1.0
        self._seconds.add(seconds)
        if timing is None:
            return
        if timing.first_byte_s:
            self._ttft[timing.loaded is not None].add(timing.first_byte_s - arrived_s)
        if timing.used is not None:
            prompt, completion = self._used
            prompt.value += timing.used[0]
            completion.value += timing.used[1]


class Tallies:
    """Of all models and routes."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ModelId], Tally] = {}

    def of(self, path: str, model: ModelId) -> Tally:
        """The one of a model that is registered, or of no model."""
        known = self._known.get((path, model))
        if known is None:
            if len(self._known) >= _TALLIES_MAX:
                self._known.clear()
            known = self._known[path, model] = Tally(path, model)
        return known

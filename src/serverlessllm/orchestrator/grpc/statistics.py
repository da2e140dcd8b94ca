"""What was asked of each model through the Open Inference Protocol since this process began."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import ModelId
from serverlessllm.orchestrator.view import ClusterView


class Figures:
    """Of one model."""

    __slots__ = ("fail", "fail_s", "last_ms", "success", "success_s")

    def __init__(self) -> None:
        self.success = 0
        self.success_s = 0.0
        self.fail = 0
        self.fail_s = 0.0
        self.last_ms = 0
        """Unix time in milliseconds; 0: never."""


class Statistics:
    """Counts requests by registered model; those that their client gave up are not counted."""

    def __init__(
        self, view: ClusterView, clock: Clock, wall_s: Callable[[], float] = time.time
    ) -> None:
        self._view = view
        self._clock = clock
        self._wall_s = wall_s
        self._figures: dict[ModelId, Figures] = {}

    def of(self, model: ModelId) -> Figures:
        """All zero for a model that nobody asked for."""
        return self._figures.get(model) or Figures()

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """One request for the model of that name, from now until the block's end."""
        began_s = self._clock.now_s()
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException:
            if (figures := self._known(name)) is not None:
                figures.fail += 1
                figures.fail_s += self._clock.now_s() - began_s
            raise
        if (figures := self._known(name)) is not None:
            figures.success += 1
            figures.success_s += self._clock.now_s() - began_s
            figures.last_ms = int(self._wall_s() * 1000)

    def _known(self, name: str) -> Figures | None:
        model = self._view.names.get(name)
        if model is None:
            return None
        for gone in self._figures.keys() - self._view.models.keys():
            del self._figures[gone]
        return self._figures.setdefault(model, Figures())

"""Finds the installed backends; a plugin that does not import is reported, not fatal."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from serverlessllm.backends.base import Backend, Node, Offer, Refusal
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.models import ModelSpec

GROUP = "serverlessllm.backends"
"""Entry points of this group name a factory without arguments that returns a `Backend`."""


class Backends:
    """The backends of this environment, each loaded when it is first asked for."""

    def __init__(self, found: Iterable[EntryPoint] | None = None) -> None:
        points = entry_points(group=GROUP) if found is None else found
        self._points = {point.name: point for point in points}
        self._loaded: dict[str, Backend | Refusal] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every registered backend, broken ones too, sorted."""
        return tuple(sorted(self._points))

    @property
    def usable(self) -> tuple[str, ...]:
        """Those whose plugin loads and whose engine is installed."""
        return tuple(name for name in self.names if self.problem(name) is None)

    def get(self, name: str) -> Backend | Refusal:
        """The backend of this name, or why there is none."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def problem(self, name: str) -> Refusal | None:
        """Why this backend cannot be used here, and the way out; None when it can."""
        backend = self.get(name)
        return backend if isinstance(backend, Refusal) else backend.installed()

    def choose(
        self, spec: ModelSpec, index: Index | None, node: Node
    ) -> tuple[Backend, Offer] | Refusal:
        """The backend that the spec names, or else the first that can serve the model."""
        names = self.names if spec.backend is None else (spec.backend,)
        reasons: list[str] = []
        for name in names:
            backend = self.get(name)
            if isinstance(backend, Refusal):
                reasons.append(f"{name}: {backend.reason}")
                continue
            answer = backend.installed() or backend.can_serve(spec, index, node)
            if isinstance(answer, Offer):
                return backend, answer
            reasons.append(f"{name}: {answer.reason}")
        return Refusal(reason="; ".join(reasons) or "no backend is installed")

    def _load(self, name: str) -> Backend | Refusal:
        point = self._points.get(name)
        if point is None:
            return Refusal(reason=f"no such backend; there are: {', '.join(self.names) or 'none'}")
        try:
            backend: Backend = point.load()()
        except Exception as error:  # noqa: BLE001 - boundary of a plugin: foreign code may raise all
            return Refusal(
                reason=f"its plugin {point.value} fails: {type(error).__name__}: {error}"
            )
        return backend

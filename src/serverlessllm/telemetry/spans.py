"""`span`: one call around a stage gives a log line, a histogram sample and a trace span."""

from __future__ import annotations

import asyncio
import logging
from time import perf_counter
from typing import TYPE_CHECKING, Any

from serverlessllm.telemetry.logs import LOGGED, log
from serverlessllm.telemetry.table import SPAN_SECONDS

if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.trace import Tracer

_log = log("span")
Field = str | int | float | bool | None


class _Tracing:
    """The tracer of the process; None while nobody listens."""

    __slots__ = ("tracer",)

    def __init__(self) -> None:
        self.tracer: Tracer | None = None


_tracing = _Tracing()


def start_tracing(tracer: Tracer | None = None) -> None:
    """Make an OpenTelemetry span of every span, by `tracer` or the process's own provider.

    Raises:
        RuntimeError: OpenTelemetry is not installed.
    """
    if tracer is None:
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise RuntimeError(
                "tracing needs OpenTelemetry: pip install 'serverlessllm[tracing]'"
            ) from error
        tracer = trace.get_tracer("serverlessllm")
    _tracing.tracer = tracer


def stop_tracing() -> None:
    """Back to logs and metrics only."""
    _tracing.tracer = None


class Span:
    """A stage that runs. Only `span` makes one."""

    __slots__ = ("_level", "_otel", "_started_s", "fields", "name", "seconds")

    def __init__(self, name: str, level: int, fields: dict[str, Field]) -> None:
        self.name = name
        self.fields = fields
        self.seconds = 0.0
        """How long it took; known after the `with`."""
        self._level = level
        self._otel: Any = None

    def note(self, **fields: Field) -> None:
        """Add what only the stage itself knows: `s.note(bytes_moved=n)`."""
        self.fields.update(fields)

    def __enter__(self) -> Span:
        if _tracing.tracer is not None:
            self._otel = _tracing.tracer.start_as_current_span(
                self.name, record_exception=False, set_status_on_exception=False
            )
            self._otel.__enter__()
        # A span measures and decides nothing, so it needs no injected clock.
        self._started_s = perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = perf_counter() - self._started_s
        if kind is None:
            outcome = "ok"
        elif issubclass(kind, asyncio.CancelledError | GeneratorExit):
            outcome = "cancelled"
        else:
            outcome = "error"
        SPAN_SECONDS.observe(self.seconds, self.name, outcome)
        if self._otel is not None:
            self._end_trace(outcome, kind, error, trace)
        if self._level >= LOGGED.level or outcome == "error":
            self._write(outcome, error)

    def _write(self, outcome: str, error: BaseException | None) -> None:
        fields: dict[str, object] = {
            **self.fields,
            "ms": round(self.seconds * 1000, 3),
            "outcome": outcome,
        }
        if error is not None:
            # The code, never the text: a message may quote what a client sent.
            fields["error"] = getattr(error, "code", None) or type(error).__name__
        if outcome == "error" or self._level >= logging.INFO:
            _log.info(self.name, **fields)
        else:
            _log.debug(self.name, **fields)

    def _end_trace(
        self,
        outcome: str,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from opentelemetry.trace import StatusCode, get_current_span

        from serverlessllm.telemetry.logs import is_forbidden

        current = get_current_span()
        for name, value in self.fields.items():
            if value is not None and not is_forbidden(name):
                current.set_attribute(f"sllm.{name}", value)
        current.set_attribute("sllm.outcome", outcome)
        if outcome == "error":
            current.set_status(StatusCode.ERROR, getattr(error, "code", None))
        self._otel.__exit__(kind, error, trace)


def span(name: str, /, *, loud: bool = False, **fields: Field) -> Span:
    """Measure a stage: `with span("loader.read", model=model) as s: …; s.note(bytes_moved=n)`.

    `name` is `component.verb` and from a fixed set (it is a label); `fields` are ids and figures.
    Logged at debug, at info when `loud`; a failure is logged at info with its code.
    """
    return Span(name, logging.INFO if loud else logging.DEBUG, fields)

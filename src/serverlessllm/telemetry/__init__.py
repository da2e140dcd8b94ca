"""Logs, metrics and spans: `with span("loader.read", model=m):` emits all three.

`configure(TelemetrySettings())` once a process, before the first request; until then warnings
go to stderr and metrics count. What a process is doing is known in one place, so this is the
one package with module state.
"""

from serverlessllm.telemetry.logs import configure_logging, log
from serverlessllm.telemetry.metrics import render_metrics
from serverlessllm.telemetry.settings import LogFormat, LogLevel, TelemetrySettings
from serverlessllm.telemetry.setup import configure
from serverlessllm.telemetry.spans import Span, span

__all__ = [
    "LogFormat",
    "LogLevel",
    "Span",
    "TelemetrySettings",
    "configure",
    "configure_logging",
    "log",
    "render_metrics",
    "span",
]

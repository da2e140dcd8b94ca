"""One call at the start of a process: logs, metrics and traces as the settings say."""

from __future__ import annotations

from serverlessllm.telemetry import logs, metrics, spans
from serverlessllm.telemetry.settings import TelemetrySettings


def configure(settings: TelemetrySettings) -> None:
    """Configure the process; may be called again.

    Raises:
        RuntimeError: `tracing` is on, and OpenTelemetry is not installed.
    """
    logs.configure_logging(settings)
    metrics.load()
    if settings.tracing:
        spans.start_tracing()
    else:
        spans.stop_tracing()

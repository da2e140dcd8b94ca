"""What an operator may choose about logs, metrics and traces."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class LogLevel(StrEnum):
    """The least severe event that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def number(self) -> int:
        """The number that `logging` knows it by."""
        return {"debug": 10, "info": 20, "warning": 30, "error": 40}[self.value]


class LogFormat(StrEnum):
    """How a line looks."""

    AUTO = "auto"
    """Console on a terminal, JSON elsewhere."""
    JSON = "json"
    CONSOLE = "console"


class TelemetrySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The `[telemetry]` section."""

    log_level: LogLevel = LogLevel.INFO
    """Least severe event that is written."""
    log_format: LogFormat = LogFormat.AUTO
    """`json`, `console`, or `auto`: console on a terminal."""
    tracing: bool = False
    """Make OpenTelemetry spans, through the process's tracer provider (extra `tracing`)."""

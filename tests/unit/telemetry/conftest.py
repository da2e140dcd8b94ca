from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from serverlessllm.telemetry import TelemetrySettings, logs
from serverlessllm.telemetry.settings import LogLevel


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """What a test configures ends with it: the process's own logging comes back."""
    root = logging.getLogger()
    level, handlers = root.level, [*root.handlers]
    yield
    logs.configure_logging(TelemetrySettings(log_level=LogLevel.WARNING))
    root.setLevel(level)
    root.handlers[:] = handlers

"""A span gives a log line, a histogram sample and, when somebody traces, a trace span."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serverlessllm.core.errors import LoadFailed
from serverlessllm.telemetry import (
    LogFormat,
    LogLevel,
    TelemetrySettings,
    configure,
    render_metrics,
    span,
)
from serverlessllm.telemetry.spans import start_tracing, stop_tracing

Capture = pytest.CaptureFixture[str]


def count(name: str, outcome: str) -> float:
    for family in text_string_to_metric_families(render_metrics().decode()):
        for s in family.samples:
            if s.name == "sllm_span_seconds_count" and s.labels == {
                "span": name,
                "outcome": outcome,
            }:
                return s.value
    return 0.0


def write(level: LogLevel) -> None:
    configure(TelemetrySettings(log_level=level, log_format=LogFormat.JSON))


def lines(capsys: Capture) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines()]


def test_one_call_logs_and_measures(capsys: Capture) -> None:
    write(LogLevel.DEBUG)
    with span("test.read", model="m") as s:
        s.note(bytes_moved=7)
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["model"]) == ("test.read", "debug", "m")
    assert (line["bytes_moved"], line["outcome"]) == (7, "ok")
    assert line["ms"] == pytest.approx(s.seconds * 1000, abs=0.001)
    assert count("test.read", "ok") == 1


def test_a_loud_span_is_seen_at_info_a_quiet_one_is_not(capsys: Capture) -> None:
    write(LogLevel.INFO)
    with span("test.quiet"), span("test.loud", loud=True):
        pass
    assert [line["event"] for line in lines(capsys)] == ["test.loud"]
    assert count("test.quiet", "ok") == 1


def test_a_failure_is_named_by_its_code_and_goes_on(capsys: Capture) -> None:
    write(LogLevel.INFO)
    with pytest.raises(LoadFailed), span("test.load"):
        raise LoadFailed("the client said SECRET")
    with pytest.raises(KeyError), span("test.load"):
        raise KeyError("SECRET")
    first, second = lines(capsys)
    assert (first["outcome"], first["error"]) == ("error", "load_failed")
    assert second["error"] == "KeyError"
    assert "SECRET" not in str([first, second])
    assert count("test.load", "error") == 2


async def test_cancellation_is_not_a_failure(capsys: Capture) -> None:
    write(LogLevel.INFO)

    async def work() -> None:
        with span("test.cancelled"):
            await asyncio.Event().wait()

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lines(capsys) == []
    assert count("test.cancelled", "cancelled") == 1


def test_unconfigured_it_only_counts(capsys: Capture) -> None:
    write(LogLevel.WARNING)
    with span("test.silent", loud=True):
        pass
    assert capsys.readouterr().err == ""
    assert count("test.silent", "ok") == 1


class Recorder:
    """A tracer that keeps what it is told: the API is installed, no exporter is needed."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []

    @contextmanager
    def start_as_current_span(self, name: str, **_: object) -> Iterator[Any]:
        from opentelemetry import context, trace

        record: dict[str, Any] = {"name": name, "attributes": {}, "ended": False}
        self.spans.append(record)

        class Kept(trace.NonRecordingSpan):
            def set_attribute(self, key: str, value: Any) -> None:
                record["attributes"][key] = value

            def set_status(self, status: Any, description: Any = None) -> None:
                record["status"] = description

        token = context.attach(trace.set_span_in_context(Kept(trace.INVALID_SPAN_CONTEXT)))
        try:
            yield
        finally:
            context.detach(token)
            record["ended"] = True


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    start_tracing(recorder)  # type: ignore[arg-type] # the one method of a Tracer that is used
    yield recorder
    stop_tracing()


def test_a_trace_span_has_the_fields_but_no_forbidden_ones(recorder: Recorder) -> None:
    with span("test.outer", model="m", prompt="SECRET", nothing=None) as outer:
        with span("test.inner"):
            pass
        outer.note(bytes_moved=3)
    names = [s["name"] for s in recorder.spans]
    assert names == ["test.outer", "test.inner"]
    assert recorder.spans[0]["attributes"] == {
        "sllm.model": "m",
        "sllm.bytes_moved": 3,
        "sllm.outcome": "ok",
    }
    assert all(s["ended"] for s in recorder.spans)


def test_a_failed_trace_span_carries_the_code(recorder: Recorder) -> None:
    with pytest.raises(LoadFailed), span("test.load"):
        raise LoadFailed("SECRET")
    assert recorder.spans[0]["status"] == "load_failed"
    assert recorder.spans[0]["attributes"] == {"sllm.outcome": "error"}


def test_tracing_by_the_processes_own_provider() -> None:
    configure(TelemetrySettings(tracing=True, log_level=LogLevel.WARNING))
    with span("test.traced"):
        pass
    configure(TelemetrySettings(log_level=LogLevel.WARNING))
    assert count("test.traced", "ok") == 1

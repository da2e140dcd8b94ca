"""Log lines: ids and figures, one JSON object each, nothing that a client said."""

from __future__ import annotations

import logging
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.telemetry import LogFormat, LogLevel, TelemetrySettings, configure_logging, log
from serverlessllm.telemetry.logs import FORBIDDEN, VALUE_CHARS_MAX, drop_forbidden, is_forbidden

Capture = pytest.CaptureFixture[str]


def lines(capsys: Capture) -> list[dict[str, object]]:
    return [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines()]


def configure(level: LogLevel = LogLevel.INFO, form: LogFormat = LogFormat.JSON) -> None:
    configure_logging(TelemetrySettings(log_level=level, log_format=form))


def test_a_line_is_one_json_object(capsys: Capture) -> None:
    configure()
    log("loader").info("loaded", model="org/m", bytes_moved=5, seconds=0.25, warm=True, code=None)
    (line,) = lines(capsys)
    assert line.pop("timestamp")
    assert line == {
        "component": "loader",
        "event": "loaded",
        "level": "info",
        "model": "org/m",
        "bytes_moved": 5,
        "seconds": 0.25,
        "warm": True,
        "code": None,
    }


def test_less_severe_events_are_not_written(capsys: Capture) -> None:
    out = log("x")
    configure(LogLevel.WARNING)
    out.debug("a")
    out.info("b")
    out.warning("c")
    out.error("d")
    configure(LogLevel.DEBUG)
    out.debug("e")
    assert [line["event"] for line in lines(capsys)] == ["c", "d", "e"]


@pytest.mark.parametrize(
    "name", [*sorted(FORBIDDEN), "user_prompt", "hf_token", "client_secret", "Authorization"]
)
def test_what_clients_say_and_what_opens_doors_is_never_written(name: str, capsys: Capture) -> None:
    configure()
    log("edge").info("request", **{name: "SECRET-WORDS", "request": "r1"})
    written = capsys.readouterr().err
    assert "SECRET" not in written
    assert '"request":"r1"' in written


@given(st.dictionaries(st.text(max_size=12), st.binary() | st.text() | st.lists(st.text())))
def test_no_container_and_no_long_text_gets_through(fields) -> None:
    for own in ("exc_info", "stack_info", "_record", "_from_structlog"):
        fields.pop(own, None)
    written = drop_forbidden(None, "info", {**fields})
    for name, value in written.items():
        assert not is_forbidden(name)
        assert isinstance(value, str)
        assert len(value) <= VALUE_CHARS_MAX + 1
        if isinstance(fields.get(name), bytes | list):
            assert value in {"<bytes>", "<list>"}


def test_a_traceback_is_part_of_its_line(capsys: Capture) -> None:
    configure()
    try:
        raise ValueError("broken")
    except ValueError:
        log("agent").error("task failed", exc_info=True)
    (line,) = lines(capsys)
    assert "ValueError: broken" in str(line["exception"])


def test_libraries_write_the_same_lines(capsys: Capture) -> None:
    configure()
    logging.getLogger("some.library").warning("disk %s", "slow")
    logging.getLogger("some.library").debug("chatter")
    (line,) = lines(capsys)
    assert (line["event"], line["level"]) == ("disk slow", "warning")


def test_configuring_twice_writes_once(capsys: Capture) -> None:
    configure()
    configure()
    log("x").info("once")
    assert len(lines(capsys)) == 1


def test_the_console_is_for_people(capsys: Capture) -> None:
    configure(form=LogFormat.CONSOLE)
    log("x").info("loaded", model="m", prompt="SECRET")
    written = capsys.readouterr().err
    assert "loaded" in written
    assert "model=m" in written
    assert "SECRET" not in written


def test_importing_costs_neither_structlog_nor_prometheus() -> None:
    code = (
        "import sys; import serverlessllm.telemetry.table; "
        "from serverlessllm.telemetry import log, span; log('x').debug('quiet'); "
        "print([m for m in ('structlog', 'prometheus_client', 'opentelemetry', 'rich') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

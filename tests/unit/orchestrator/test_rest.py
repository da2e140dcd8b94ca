"""The pure parts of the routes: bodies, wait budget, times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.agentapi import HopTiming, LoadEvent
from serverlessllm.core.errors import (
    ClientError,
    InvalidJSON,
    InvalidRequest,
    SLLMError,
)
from serverlessllm.core.ids import Address, AgentId, ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.edge.server import RequestHeaders
from serverlessllm.orchestrator.coldstart import Loaded
from serverlessllm.orchestrator.rest.bodies import (
    BODY_BYTES_MAX,
    model_of,
    read_body,
    read_keep_alive_s,
    read_limit,
    read_spec,
)
from serverlessllm.orchestrator.rest.guard import is_local
from serverlessllm.orchestrator.rest.loading import (
    NO_WISHES,
    StillLoading,
    read_wishes,
    wait_budget_s,
)
from serverlessllm.orchestrator.rest.routes import render
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.timing import Timing, timing_lines


def test_loopback_is_known_in_every_spelling():
    for listen in (
        "http://127.0.0.1:0",
        "http://localhost:1",
        "http://[::1]:1",
        "http://127.1.2.3:1",
    ):
        assert is_local(Address(listen))
    for listen in ("http://0.0.0.0:1", "http://10.0.0.1:1", "http://host:1", "http://[::]:1"):
        assert not is_local(Address(listen))


@given(st.binary(max_size=200))
def test_any_body_is_a_spec_or_a_clear_error(data):
    try:
        spec = read_spec(data)
    except ClientError:
        return
    assert type(spec) is ModelSpec


def test_bodies_are_bounded_and_their_errors_name_the_field():
    with pytest.raises(SLLMError, match="longer"):
        read_body(b" " * (BODY_BYTES_MAX + 1), ModelSpec)
    with pytest.raises(InvalidJSON):
        read_body(b'{"x":' + b"[" * 100_000, ModelSpec)
    with pytest.raises(InvalidRequest, match="keepalive"):
        read_spec(b'{"model":"m","keepalive":1}')
    with pytest.raises(InvalidRequest) as error:
        read_body(b'{"model":"m","options":{"a":1}}', ModelSpec)
    assert (error.value.param or "").startswith("options")


def test_keep_alive_and_limits():
    assert [read_keep_alive_s(v) for v in (None, 5, "5m", -1, "0")] == [None, 5.0, 300.0, -1.0, 0.0]
    for bad in ("soon", -2, float("nan")):
        with pytest.raises(InvalidRequest):
            read_keep_alive_s(bad)
    assert (read_limit(None, 10), read_limit("3", 10)) == (10, 3)
    for text in ("0", "11", "-1", "x", "1" * 50, "0000000019", "000000001" + "0" * 5000, "²"):
        with pytest.raises(InvalidRequest):
            read_limit(text, 10)
    assert model_of("short", {"short": ModelId("org/m")}) == "org/m"
    with pytest.raises(SLLMError):
        model_of("../x", {})


def wishes(**headers):
    fields = {f"x-sllm-{name}".encode(): value.encode() for name, value in headers.items()}
    return read_wishes(RequestHeaders(fields))


def test_the_wait_budget_is_the_clients_within_the_limit():
    settings = OrchestratorSettings(wait_budget_s=60.0, wait_budget_s_max=600.0)
    assert wait_budget_s(NO_WISHES, settings, stream=False) == 60.0
    assert wait_budget_s(NO_WISHES, settings, stream=True) == 600.0
    assert wait_budget_s(wishes(wait="0"), settings, stream=True) == 0.0
    assert wait_budget_s(wishes(wait="2.5"), settings, stream=False) == 2.5
    assert wait_budget_s(wishes(wait="1e9"), settings, stream=False) == 600.0


def test_wishes_about_waiting_that_cannot_be_understood_are_named():
    assert wishes() is NO_WISHES
    assert wishes(progress="Chunk ").chunks
    assert not wishes(progress="comment").chunks
    for name, bad in (
        *(("wait", text) for text in ("", "soon", "-1", "nan")),
        *(("progress", text) for text in ("", "chunks", "0", "comment, chunk")),
    ):
        with pytest.raises(InvalidRequest) as error:
            wishes(**{name: bad})
        header = f"X-SLLM-{name.title()}"
        assert error.value.param == header
        assert header in error.value.message


def test_still_loading_carries_the_progress_beside_the_error():
    event = LoadEvent(state="loading", stage="nvme→dram", bytes_done=1, bytes_total=4, eta_s=500.0)
    status, headers, body = render(StillLoading(ModelId("m"), event))
    assert (status, dict(headers)["retry-after"]) == (503, "120")
    assert b'"loading":{"state":"loading"' in body
    assert b'"code":"model_loading"' in body


def read_lines(lines):
    fields = dict(line.split(": ") for line in lines.decode().strip().split("\r\n"))
    return {
        name: float(value)
        for name, value in (t.split(";dur=") for t in fields["server-timing"].split(", "))
    }


def test_times_of_a_request_that_nothing_happened_to():
    assert set(read_lines(timing_lines(None, 1.0, 1.5)).values()) == {0.0}


def test_times_of_a_cold_request_are_those_of_its_load():
    timing = Timing(ModelId("m"))
    timing.sent_s, timing.waited_s = 9.0, 8.0
    timing.loaded = Loaded(
        agent=AgentId("a"),
        predicted_s=1.0,
        place_s=0.5,
        ingest_s=1.0,
        load_s=5.5,
        hops=(
            HopTiming(hop="queue", seconds=0.25),
            HopTiming(hop="store→nvme", seconds=2.0),
            HopTiming(hop="store→dram", seconds=2.5),
            HopTiming(hop="dram→device", seconds=0.5),
            HopTiming(hop="start", seconds=2.0),
        ),
    )
    assert read_lines(timing_lines(timing, 0.0, 10.0)) == {
        "queue": 1250.0, "place": 500.0, "fetch": 3500.0, "read": 500.0, "start": 2000.0,
        "ttft": 1000.0,
    }  # fmt: skip

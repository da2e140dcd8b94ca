"""Metrics: one table, units in the names, label sets that cannot grow without bound."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serverlessllm.telemetry import metrics, render_metrics, table
from serverlessllm.telemetry.metrics import DECLARED, LABEL_SETS_MAX, Counter, Gauge, Histogram

UNITS = ("_total", "_seconds", "_bytes", "_bytes_per_second", "_requests")
COUNTS = {"sllm_agents", "sllm_instances", "sllm_requests_running", "sllm_requests_waiting",
          "sllm_workers"}  # fmt: skip
"""Gauges that count things: the noun is the unit."""


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test declares is forgotten after it."""
    from prometheus_client import CollectorRegistry

    own = CollectorRegistry()
    monkeypatch.setattr(metrics, "registry", lambda: own)
    monkeypatch.setattr(metrics, "DECLARED", [])


def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(render_metrics().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_every_name_is_ours_unique_and_carries_its_unit() -> None:
    names = [m.name for m in DECLARED]
    assert len(names) == len(set(names))
    for metric in DECLARED:
        assert re.fullmatch(r"sllm_[a-z_]+", metric.name)
        assert metric.name.endswith(UNITS) or metric.name in COUNTS, metric.name
        assert metric.name.endswith("_total") == isinstance(metric, Counter)
        assert metric.help


def test_everything_declared_is_rendered_before_it_is_used() -> None:
    text = render_metrics().decode()
    for metric in DECLARED:
        assert f"# TYPE {metric.name} " in text
    assert "process_resident_memory_bytes" in text


@pytest.mark.usefixtures("declared")
def test_counting_setting_observing() -> None:
    requests = Counter("sllm_t_total", "T", ("model",))
    requests.inc("a")
    requests.inc("a", by=2)
    requests.inc("b")
    depth = Gauge("sllm_t_requests", "T")
    depth.set(5)
    depth.inc(by=-2)
    took = Histogram("sllm_t_seconds", "T", ("hop",), buckets=(1.0, 2.0))
    took.observe(1.5, "nvme→dram")
    seen = samples()
    assert seen["sllm_t_total", (("model", "a"),)] == 3
    assert seen["sllm_t_total", (("model", "b"),)] == 1
    assert seen["sllm_t_requests", ()] == 3
    assert seen["sllm_t_seconds_bucket", (("hop", "nvme→dram"), ("le", "1.0"))] == 0
    assert seen["sllm_t_seconds_bucket", (("hop", "nvme→dram"), ("le", "2.0"))] == 1
    assert seen["sllm_t_seconds_sum", (("hop", "nvme→dram"),)] == 1.5


@pytest.mark.usefixtures("declared")
def test_invented_labels_end_up_as_other() -> None:
    requests = Counter("sllm_t_total", "T", ("model", "status"))
    for i in range(LABEL_SETS_MAX + 500):
        requests.inc(f"m{i}", "200")
    requests.inc("m0", "200")
    seen = samples()
    assert seen["sllm_t_total", (("model", "m0"), ("status", "200"))] == 2
    assert seen["sllm_t_total", (("model", "other"), ("status", "other"))] == 500
    assert len([name for name, _ in seen if name == "sllm_t_total"]) == LABEL_SETS_MAX + 1


@pytest.mark.usefixtures("declared")
def test_a_series_whose_subject_is_gone_makes_room() -> None:
    state = Gauge("sllm_t_bytes", "T", ("tier",))
    state.set(1, "dram")
    state.forget("dram")
    state.forget("never")
    assert samples() == {}
    state.set(2, "dram")
    assert samples() == {("sllm_t_bytes", (("tier", "dram"),)): 2}


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("values", [(), ("a", "b")])
def test_a_wrong_number_of_labels_is_a_bug(values: tuple[str, ...]) -> None:
    with pytest.raises(TypeError, match="labels"):
        Counter("sllm_t_total", "T", ("model",)).inc(*values)


def test_the_table_is_the_only_place_that_declares() -> None:
    here: list[Any] = [v for v in vars(table).values() if isinstance(v, metrics.Metric)]
    assert {m.name for m in here} == {m.name for m in DECLARED}

"""Several processes' metrics as one service's: sums that never go back."""

from __future__ import annotations

from serverlessllm.telemetry import figures, metrics
from serverlessllm.telemetry.figures import Family, Series, counted, total
from serverlessllm.telemetry.table import REQUEST_SECONDS, REQUESTS, REQUESTS_RUNNING


def family(name: str, kind: str, *series: Series) -> Family:
    return Family(name=name, kind=kind, text="a text", series=series)


def values(share: figures.Figures) -> dict[tuple[str, figures.Labels], float]:
    return {(each.name, each.labels): each.value for one in share for each in one.series}


LEFT, RIGHT = (("route", "/l"),), (("route", "/r"),)


def test_counts_and_gauges_of_all_processes_are_summed_label_by_label():
    one = (
        family("asked", "counter", Series("asked_total", LEFT, 2.0)),
        family("running", "gauge", Series("running", LEFT, 1.0)),
    )
    other = (
        family(
            "asked", "counter", Series("asked_total", LEFT, 3.0), Series("asked_total", RIGHT, 5.0)
        ),
        family("running", "gauge", Series("running", LEFT, 4.0)),
    )
    assert values(total([one, other])) == {
        ("asked_total", LEFT): 5.0,
        ("asked_total", RIGHT): 5.0,
        ("running", LEFT): 5.0,
    }


def test_the_first_process_speaks_for_what_makes_no_sum():
    shares = [
        (
            family(
                "process_start_time_seconds", "gauge", Series("process_start_time_seconds", (), t)
            ),
            family("asked", "counter", Series("asked_created", (), t)),
        )
        for t in (20.0, 10.0)
    ]
    assert values(total(shares)) == {
        ("process_start_time_seconds", ()): 20.0,
        ("asked_created", ()): 10.0,  # the earliest of those that were summed
    }


def test_who_has_ended_leaves_its_counts_and_nothing_else():
    share = (
        family("asked", "counter", Series("asked_total", LEFT, 2.0)),
        family("took", "histogram", Series("took_bucket", (("le", "1"),), 2.0)),
        family("running", "gauge", Series("running", LEFT, 1.0)),
    )
    assert [each.name for each in counted(share)] == ["asked", "took"]


def test_what_is_rendered_is_what_the_library_renders_of_one_process():
    REQUESTS.inc("/figures", "m", "200")
    REQUEST_SECONDS.observe(0.2, "/figures", "m")
    REQUESTS_RUNNING.set(3, "/figures")
    ours = figures.render(figures.collect()).decode().splitlines()
    theirs = metrics.render_metrics().decode().splitlines()
    assert [line for line in ours if "/figures" in line] == [
        line for line in theirs if "/figures" in line
    ]
    assert {line for line in ours if line.startswith("# ")} == {
        line for line in theirs if line.startswith("# ")
    }


def test_twice_the_same_process_is_twice_its_counts():
    REQUESTS.inc("/twice", "m", "200")
    once = values(figures.collect())
    twice = values(total([figures.collect(), figures.collect()]))
    key = ("sllm_requests_total", (("route", "/twice"), ("model", "m"), ("status", "200")))
    assert twice[key] == 2 * once[key]

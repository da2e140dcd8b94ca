"""Metrics of several processes that are one service: their sum, and what stays of those that ended.

What was counted is summed, and never goes back: a process that has ended leaves its counts. What
is measured now (a gauge) is summed over those that live, but for what makes no sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from serverlessllm.telemetry import metrics

if TYPE_CHECKING:
    from prometheus_client import Metric

_COUNTED = frozenset({"counter", "histogram", "summary"})
_CREATED = "_created"
_NO_SUM = frozenset({"process_start_time_seconds", "process_max_fds", "python_info"})
"""Shown as the first process has them."""

Labels = tuple[tuple[str, str], ...]


class Series(msgspec.Struct, frozen=True, array_like=True):
    """One line of the text format."""

    name: str
    labels: Labels
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """One metric, as one process has it."""

    name: str
    kind: str
    text: str
    series: tuple[Series, ...]


Figures = tuple[Family, ...]
"""All metrics of one process, or of several together."""


def collect() -> Figures:
    """This process's own."""
    metrics.load()
    return tuple(
        Family(
            name=metric.name,
            kind=metric.type,
            text=metric.documentation,
            series=tuple(
                Series(sample.name, tuple(sample.labels.items()), sample.value)
                for sample in metric.samples
            ),
        )
        for metric in metrics.registry().collect()
    )


def total(shares: Iterable[Figures]) -> Figures:
    """The sum over processes, the first of which speaks for what makes no sum."""
    heads: dict[str, Family] = {}
    sums: dict[str, dict[tuple[str, Labels], float]] = {}
    for share in shares:
        for family in share:
            first = family.name not in heads
            if first:
                heads[family.name] = family
                sums[family.name] = {}
            if first or family.name not in _NO_SUM:
                _add(sums[family.name], family.series)
    return tuple(
        msgspec.structs.replace(
            head, series=tuple(Series(*key, value) for key, value in sums[name].items())
        )
        for name, head in heads.items()
    )


def _add(sums: dict[tuple[str, Labels], float], series: Sequence[Series]) -> None:
    for each in series:
        key = (each.name, each.labels)
        known = sums.get(key)
        if known is None:
            sums[key] = each.value
        elif each.name.endswith(_CREATED):
            sums[key] = min(known, each.value)
        else:
            sums[key] = known + each.value


def counted(figures: Figures) -> Figures:
    """What stays of a process when it has ended."""
    return tuple(family for family in figures if family.kind in _COUNTED)


def render(figures: Figures) -> bytes:
    """In Prometheus' text format (`metrics.CONTENT_TYPE`)."""
    from prometheus_client import Metric, generate_latest
    from prometheus_client.registry import Collector

    class Told(Collector):
        """Figures as the library collects them."""

        def collect(self) -> Iterator[Metric]:
            for family in figures:
                metric = Metric(family.name, family.text, family.kind)
                for series in family.series:
                    metric.add_sample(series.name, dict(series.labels), series.value)
                yield metric

    return generate_latest(Told())

"""Counters, gauges and histograms on one registry of our own.

A metric is declared in `serverlessllm.telemetry.table` and used as `LOADS.inc(model, "ok")`.
Label sets are bounded: past `LABEL_SETS_MAX` of one metric, new ones are counted as `other`, so
that a client that invents names cannot fill the memory. prometheus_client takes 80 ms to import
and is loaded by the first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import prometheus_client
    from prometheus_client import CollectorRegistry

LABEL_SETS_MAX = 1000
OTHER = "other"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
           120, 300)  # fmt: skip
"""Bucket bounds of durations, from a warm relay to the fetch of a large model."""

Child = TypeVar("Child")
DECLARED: list[Metric[prometheus_client.Counter] | Metric[prometheus_client.Gauge]
               | Metric[prometheus_client.Histogram]] = []  # fmt: skip


@cache
def registry() -> CollectorRegistry:
    """The registry that `render_metrics` prints; the default one of the library stays empty."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.gc_collector import GCCollector
    from prometheus_client.platform_collector import PlatformCollector
    from prometheus_client.process_collector import ProcessCollector

    own = CollectorRegistry()
    ProcessCollector(registry=own)
    PlatformCollector(registry=own)
    GCCollector(registry=own)
    return own


class Metric(Generic[Child]):
    """One named metric and its children by label values."""

    __slots__ = ("_children", "_make", "_root", "help", "labels", "name")

    def __init__(
        self, make: Callable[[Metric[Child]], Child], name: str, text: str, labels: tuple[str, ...]
    ) -> None:
        self.name = name
        self.help = text
        self.labels = labels
        self._make = make
        self._root: Child | None = None
        self._children: dict[tuple[str, ...], Child] = {}

    def load(self) -> Child:
        """The library's metric, made and registered on first use."""
        if self._root is None:
            self._root = self._make(self)
        return self._root

    def child(self, values: tuple[str, ...]) -> Child:
        """The series of these label values, in the order of `labels`."""
        found = self._children.get(values)
        return self._new_child(values) if found is None else found

    def _new_child(self, values: tuple[str, ...]) -> Child:
        if len(values) != len(self.labels):
            raise TypeError(f"{self.name}: labels {self.labels}, given {len(values)} values")
        root = self.load()
        if not self.labels:
            return self._children.setdefault(values, root)
        if len(self._children) >= LABEL_SETS_MAX:
            values = (OTHER,) * len(self.labels)
        made: Child = root.labels(*values)  # type: ignore[attr-defined] # every kind has it
        return self._children.setdefault(values, made)

    def forget(self, *values: str) -> None:
        """Drop a series whose subject is gone: an agent that left, a model that was deleted."""
        if self._children.pop(values, None) is not None and self.labels:
            self.load().remove(*values)  # type: ignore[attr-defined] # every kind has it


class Counter(Metric["prometheus_client.Counter"]):
    """Only goes up; the name ends in `_total`."""

    __slots__ = ()

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__(_make_counter, name, text, labels)
        DECLARED.append(self)

    def inc(self, *labels: str, by: float = 1.0) -> None:
        self.child(labels).inc(by)


class Gauge(Metric["prometheus_client.Gauge"]):
    """Goes up and down."""

    __slots__ = ()

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__(_make_gauge, name, text, labels)
        DECLARED.append(self)

    def set(self, value: float, *labels: str) -> None:
        self.child(labels).set(value)

    def inc(self, *labels: str, by: float = 1.0) -> None:
        """`by` may be negative."""
        self.child(labels).inc(by)


class Histogram(Metric["prometheus_client.Histogram"]):
    """Counts observations by bucket."""

    __slots__ = ("buckets",)

    def __init__(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...] = (),
        buckets: tuple[float, ...] = SECONDS,
    ) -> None:
        super().__init__(_make_histogram, name, text, labels)
        self.buckets = buckets
        DECLARED.append(self)

    def observe(self, value: float, *labels: str) -> None:
        self.child(labels).observe(value)


def _make_counter(metric: Metric[prometheus_client.Counter]) -> prometheus_client.Counter:
    from prometheus_client import Counter as Made

    return Made(metric.name, metric.help, metric.labels, registry=registry())


def _make_gauge(metric: Metric[prometheus_client.Gauge]) -> prometheus_client.Gauge:
    from prometheus_client import Gauge as Made

    return Made(metric.name, metric.help, metric.labels, registry=registry())


def _make_histogram(metric: Metric[prometheus_client.Histogram]) -> prometheus_client.Histogram:
    from prometheus_client import Histogram as Made

    buckets = metric.buckets if isinstance(metric, Histogram) else SECONDS
    return Made(metric.name, metric.help, metric.labels, registry=registry(), buckets=buckets)


def load() -> None:
    """Import the library and register every declared metric: at start, not on a request."""
    from serverlessllm.telemetry import table  # noqa: F401 - declares them

    for metric in DECLARED:
        metric.load()


def render_metrics() -> bytes:
    """All metrics in Prometheus' text format, for `GET /metrics` (CONTENT_TYPE)."""
    from prometheus_client import generate_latest

    load()
    return generate_latest(registry())


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `render_metrics` returns."""

"""Counters, gauges and histograms on one registry of our own.

A metric is declared in `serverlessllm.telemetry.table` and used as `LOADS.inc(model, "ok")`.
Label sets are bounded: past `LABEL_SETS_MAX` of one metric, new ones are counted as `other`, so
that a client that invents names cannot fill the memory. Counting is ours, for every request counts
five times and prometheus_client's way costs more than to route it; the library gives the registry
and the text. It takes 80 ms to import and is loaded by the first use.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client import Metric as Family

LABEL_SETS_MAX = 1000
OTHER = "other"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
           120, 300)  # fmt: skip
"""Bucket bounds of durations, from a warm relay to the fetch of a large model."""

Cell = TypeVar("Cell")
DECLARED: list[Metric[Value] | Metric[Spread]] = []


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


class Value:
    """One number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Spread:
    """Observations by bucket; the last one is of those above every bound."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


Cells = Mapping[tuple[str, ...], Cell]


class Metric(Generic[Cell]):
    """One named metric and its series by label values. May be used by any thread."""

    __slots__ = ("_cells", "_lock", "_new", "_registered", "_show", "help", "labels", "name")

    def __init__(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        new: Callable[[], Cell],
        show: Callable[[Cells[Cell]], Family],
    ) -> None:
        self.name = name
        self.help = text
        self.labels = labels
        self._new = new
        self._show = show
        self._lock = Lock()
        self._registered = False
        self._cells: dict[tuple[str, ...], Cell] = {}

    def load(self) -> None:
        """Register it, once. What has no labels has its one series from then on."""
        if not self._registered:
            self._registered = True
            registry().register(self)
            if not self.labels:
                self._add(())

    def cell(self, *labels: str) -> Cell:
        """One series itself, for a metric that only one thread changes: it needs no lock then."""
        return self._cells.get(labels) or self._add(labels)

    def forget(self, *values: str) -> None:
        """Drop a series whose subject is gone: an agent that left, a model that was deleted."""
        with self._lock:
            self._cells.pop(values, None)

    def collect(self) -> Iterator[Family]:
        """As the library's registry asks for it."""
        with self._lock:
            yield self._show(self._cells)

    def _add(self, values: tuple[str, ...]) -> Cell:
        """The cell of label values that are new, in the order of `labels`."""
        if len(values) != len(self.labels):
            raise TypeError(f"{self.name}: labels {self.labels}, given {len(values)} values")
        self.load()
        with self._lock:
            if self.labels and len(self._cells) >= LABEL_SETS_MAX:
                values = (OTHER,) * len(self.labels)
            return self._cells.setdefault(values, self._new())


class Counter(Metric[Value]):
    """Only goes up; the name ends in `_total`."""

    __slots__ = ()

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__(name, text, labels, Value, self._as_family)
        DECLARED.append(self)

    def inc(self, *labels: str, by: float = 1.0) -> None:
        cell = self._cells.get(labels) or self._add(labels)
        with self._lock:
            cell.value += by

    def _as_family(self, cells: Cells[Value]) -> Family:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(self.name, self.help, labels=self.labels)
        for values, cell in cells.items():
            family.add_metric(values, cell.value)
        return family


class Gauge(Metric[Value]):
    """Goes up and down."""

    __slots__ = ()

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__(name, text, labels, Value, self._as_family)
        DECLARED.append(self)

    def set(self, value: float, *labels: str) -> None:
        cell = self._cells.get(labels) or self._add(labels)
        cell.value = value

    def inc(self, *labels: str, by: float = 1.0) -> None:
        """`by` may be negative."""
        cell = self._cells.get(labels) or self._add(labels)
        with self._lock:
            cell.value += by

    def _as_family(self, cells: Cells[Value]) -> Family:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(self.name, self.help, labels=self.labels)
        for values, cell in cells.items():
            family.add_metric(values, cell.value)
        return family


class Histogram(Metric[Spread]):
    """Counts observations by bucket."""

    __slots__ = ("buckets",)

    def __init__(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...] = (),
        buckets: tuple[float, ...] = SECONDS,
    ) -> None:
        super().__init__(name, text, labels, lambda: Spread(buckets), self._as_family)
        self.buckets = buckets
        DECLARED.append(self)

    def observe(self, value: float, *labels: str) -> None:
        cell = self._cells.get(labels) or self._add(labels)
        with self._lock:
            cell.add(value)

    def _as_family(self, cells: Cells[Spread]) -> Family:
        from prometheus_client.core import HistogramMetricFamily

        bounds = [str(float(bound)) for bound in self.buckets]
        bounds.append("+Inf")
        family = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        for values, cell in cells.items():
            counts = accumulate(cell.counts)
            family.add_metric(values, list(zip(bounds, counts, strict=True)), cell.total)
        return family


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

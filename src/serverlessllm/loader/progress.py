"""What a load says about itself while it runs."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from serverlessllm.core.clock import Clock

QUEUE = "queue"
"""The hop of a load that waits for another process."""


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One report of a running load."""

    hop: str
    """The hop that moves now, such as `nvme→dram`; `queue` while another process loads it."""
    bytes_done: int
    bytes_total: int
    eta_s: float | None = None
    """Seconds until this hop is done; None rather than a guess."""
    elapsed_s: float = 0.0
    """Since the hop began."""


Report = Callable[[LoadProgress], None]


class Meter:
    """Counts the bytes of a load's hops, and reports at most every `interval_s`."""

    def __init__(self, clock: Clock, interval_s: float, report: Report) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._report = report
        self.begin("", 0)

    def begin(self, hop: str, bytes_total: int) -> None:
        """A hop starts."""
        self._hop = hop
        self._total = bytes_total
        self._done = 0
        self.first_s = 0.0
        """From the hop's beginning to its first bytes."""
        self._begun_s = self._told_s = self._clock.now_s()
        if hop:
            self._tell(None)

    def add(self, count: int) -> None:
        """So many bytes more have arrived."""
        now_s = self._clock.now_s()
        if not self._done:
            self.first_s = now_s - self._begun_s
        self._done += count
        if now_s - self._told_s < self._interval_s and self._done < self._total:
            return
        self._told_s = now_s
        left = self._total - self._done
        self._tell(left * (now_s - self._begun_s) / self._done if self._done else None)

    @property
    def elapsed_s(self) -> float:
        """Since the hop began."""
        return self._clock.now_s() - self._begun_s

    def _tell(self, eta_s: float | None) -> None:
        self._report(
            LoadProgress(
                hop=self._hop,
                bytes_done=self._done,
                bytes_total=self._total,
                eta_s=eta_s,
                elapsed_s=self.elapsed_s,
            )
        )

"""The seam for time: whoever waits or measures is given a `Clock`."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock. Leases, timeouts and caches never see the wall clock."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Return after `delay_s` seconds of this clock."""
        ...


class SystemClock:
    """The machine's monotonic clock (one for all processes of a boot, on Linux)."""

    now_s = staticmethod(time.monotonic)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


def wall_s() -> int:
    """Unix time in whole seconds: only to be shown to people (`created`), never to decide."""
    return int(time.time())

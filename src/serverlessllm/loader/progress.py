"""What a load says about itself while it runs."""

from __future__ import annotations

import msgspec


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One report of a running load."""

    hop: str
    """The hop that moves now, such as `nvme→dram`; `queue` while another process loads it."""
    bytes_done: int
    bytes_total: int
    eta_s: float | None = None
    """Seconds until this hop is done; None rather than a guess."""

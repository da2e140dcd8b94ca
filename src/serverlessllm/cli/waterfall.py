"""Where the time of an answer went: the stages of `Server-Timing`, the hops of a load."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serverlessllm.core.agentapi import HopTiming

STAGES = {
    "queue": "queue",
    "place": "place",
    "fetch": "fetch",
    "read": "read",
    "start": "start",
    "ttft": "first token",
}
"""`Server-Timing` names, in the order of a request's life → what people read."""

_METRIC = re.compile(r"([A-Za-z0-9_-]+)\s*;[^,]*?dur=([0-9.]+)")


def parse_server_timing(header: str) -> dict[str, float]:
    """`queue;dur=0.1, place;dur=2` → milliseconds by name."""
    return {name: float(value) for name, value in _METRIC.findall(header)}


def hop_rows(hops: Iterable[HopTiming]) -> list[tuple[str, str, str, str, str]]:
    """(hop, ms, bytes, rate, share of the hop's measured limit) for a table."""
    return [_hop_row(hop) for hop in hops]


def stage_of(hop: str) -> str:
    """The stage of `Server-Timing` that a hop belongs to."""
    if hop in {"queue", "start"}:
        return hop
    return "fetch" if hop.startswith(("store", "peer")) else "read"


def _hop_row(hop: HopTiming) -> tuple[str, str, str, str, str]:
    from serverlessllm.core.units import format_size

    if not hop.bytes_moved:
        return hop.hop, f"{hop.seconds * 1000:.1f}", "-", "-", "-"
    rate = hop.bytes_moved / hop.seconds if hop.seconds > 0 else 0.0
    share = f"{rate / hop.limit_bytes_s:.0%}" if hop.limit_bytes_s and rate else "-"
    return (
        hop.hop,
        f"{hop.seconds * 1000:.1f}",
        format_size(hop.bytes_moved),
        f"{format_size(rate)}/s" if rate else "-",
        share,
    )

"""Where a request's time went, as headers of its answer."""

from __future__ import annotations

from typing import Final

from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.ids import ModelId
from serverlessllm.orchestrator.coldstart import Loaded

_LINES: Final = (
    b"openai-processing-ms: %d\r\nserver-timing: queue;dur=%.2f, place;dur=%.3f, "
    b"fetch;dur=%.2f, read;dur=%.2f, start;dur=%.2f, ttft;dur=%.2f\r\n"
)


class Timing:
    """What is known of one request's time so far."""

    # Defaults live on the class: one is made for every request, and most keep them.
    place_s = 0.0
    sent_s = 0.0
    """When it was sent to the agent that answers it; 0: not yet."""
    first_byte_s = 0.0
    """When the first byte of the agent's answer went out."""
    waited_s = 0.0
    """In the waiting room."""
    loaded: Loaded | None = None
    used: tuple[int, int] | None = None
    """Prompt and completion tokens, as the agent says."""
    inner = b""
    """The lines of the process that answered, when that is another one of this front door."""

    def __init__(self, model: ModelId) -> None:
        self.model = model


def timing_lines(timing: object, arrived_s: float, now_s: float) -> bytes:
    """Header lines for the answer whose head goes out now; `timing` may be None.

    A load's figures are its own: whoever came while it ran waited for less of it. `queue` is the
    load's, and what the request waited beside ingest, choice and load.
    """
    total_ms = (now_s - arrived_s) * 1e3
    if not isinstance(timing, Timing):
        return _warm_lines(total_ms, 0.0, 0.0)
    if timing.inner:
        return timing.inner
    ttft_ms = (now_s - timing.sent_s) * 1e3 if timing.sent_s else 0.0
    loaded = timing.loaded
    if loaded is None:
        return _warm_lines(total_ms, timing.place_s * 1e3, ttft_ms)
    hops = loaded.hops
    outside_s = timing.waited_s - loaded.ingest_s - loaded.place_s - loaded.load_s
    return _LINES % (
        total_ms,
        (_seconds(hops, "queue") + max(0.0, outside_s)) * 1e3,
        loaded.place_s * 1e3,
        (loaded.ingest_s + _fetch_s(hops)) * 1e3,
        (_seconds(hops, "nvme→dram") + _seconds(hops, "dram→device")) * 1e3,
        _seconds(hops, "start") * 1e3,
        ttft_ms,
    )


def _warm_lines(total_ms: float, place_ms: float, ttft_ms: float) -> bytes:
    """Of a request that met a ready model: most do, and whole numbers are cheaper to write."""
    return (
        f"openai-processing-ms: {int(total_ms)}\r\n"
        f"server-timing: queue;dur=0, place;dur={_decimal(place_ms)}, "
        f"fetch;dur=0, read;dur=0, start;dur=0, ttft;dur={_decimal(ttft_ms)}\r\n"
    ).encode()


def _decimal(ms: float) -> str:
    """With three digits after the point."""
    us = int(ms * 1e3)
    return f"{us // 1000}.{str(us % 1000 + 1000)[1:]}"


def _seconds(hops: tuple[HopTiming, ...], name: str) -> float:
    return sum(hop.seconds for hop in hops if hop.hop == name)


def _fetch_s(hops: tuple[HopTiming, ...]) -> float:
    """Of the hops that crossed the wire, which run at once, the slowest is their time."""
    return max(
        (hop.seconds for hop in hops if hop.hop.startswith(("store→", "peer→"))), default=0.0
    )

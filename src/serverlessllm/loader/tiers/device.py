"""The device: on a CPU, DRAM itself. An engine maps the `.bin` where it lies, so nothing moves."""

from __future__ import annotations

from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.loader.plan import hop_name
from serverlessllm.loader.speeds import Speeds


def attach(speeds: Speeds) -> HopTiming:
    """The last hop of a load for a CPU: no copy, so no bytes and no time."""
    hop = hop_name(CacheLevel.DRAM, CacheLevel.DEVICE)
    return HopTiming(hop=hop, limit_bytes_s=speeds.limit(hop))

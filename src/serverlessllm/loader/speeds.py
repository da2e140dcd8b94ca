"""How fast each hop of this node is: what it could do, and what loads made of it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.units import MIB
from serverlessllm.loader.plan import hop_name
from serverlessllm.telemetry.table import HOP_BANDWIDTH, HOP_SECONDS, LOAD_BYTES

_BYTES_MIN = MIB
"""Less than this tells of latency, not of bandwidth."""
_NEWEST_WEIGHT = 0.5
_READ_HOP = hop_name(CacheLevel.NVME, CacheLevel.DRAM)
_WRITE_HOP = hop_name(CacheLevel.DRAM, CacheLevel.NVME)
_DEVICE_HOP = hop_name(CacheLevel.DRAM, CacheLevel.DEVICE)
_STORE_HOPS = (
    hop_name(CacheLevel.STORE, CacheLevel.NVME),
    hop_name(CacheLevel.STORE, CacheLevel.DRAM),
)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine can do, in bytes/s."""

    disk_bytes_s: float
    """Sequential direct reads in the nvme tier's directory."""
    memcpy_bytes_s: float
    """One thread."""


class Speeds:
    """Written by loads, read by whoever estimates or explains one."""

    def __init__(self, *, store_is_local: bool) -> None:
        self._store_is_local = store_is_local
        self._measured: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self.limits: Limits | None = None
        """None until the machine has been measured."""
        self.device_bytes_s: float | None = None
        """Copies from locked memory to a device; None on a CPU."""

    def record(self, hop: str, bytes_moved: int, seconds: float) -> HopTiming:
        """A hop of a load is over."""
        limit = self.limit(hop)
        LOAD_BYTES.inc(hop, by=bytes_moved)
        HOP_SECONDS.observe(seconds, hop)
        if bytes_moved >= _BYTES_MIN and seconds > 0:
            rate = bytes_moved / seconds
            last = self._measured.get(hop, rate)
            self._measured[hop] = last + _NEWEST_WEIGHT * (rate - last)
            self._best[hop] = max(rate, self._best.get(hop, 0.0))
            HOP_BANDWIDTH.set(self._measured[hop], hop)
        return HopTiming(hop=hop, bytes_moved=bytes_moved, seconds=seconds, limit_bytes_s=limit)

    def limit(self, hop: str) -> float | None:
        """The hop's limit: the disk's for a disk or a store in a folder, locked memory's (on a
        CPU: memcpy's) for the device; of a store behind a network the best that was ever seen."""
        if self.limits is None:
            return None
        if hop == _DEVICE_HOP:
            return self.device_bytes_s or self.limits.memcpy_bytes_s
        if hop in _STORE_HOPS and not self._store_is_local:
            return self._best.get(hop)
        return self.limits.disk_bytes_s

    def bandwidth(self) -> Mapping[str, float]:
        """Bytes/s by hop: measured by loads, or the limit where none has run yet."""
        hops = (*_STORE_HOPS, _READ_HOP, _WRITE_HOP, _DEVICE_HOP)
        known = {hop: limit for hop in hops if (limit := self.limit(hop)) is not None}
        return {**known, **self._measured}

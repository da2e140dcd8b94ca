"""The weights of the score, where the operator wants them fixed, and what is assumed at first."""

from __future__ import annotations

import msgspec

from serverlessllm.core.units import GIB, MIB


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The `[scheduler]` section. A weight that is left out is learned, in seconds."""

    alpha_s: float | None = None
    """Cost of one cache level. Learned: the backend's start-up time."""
    beta_s: float | None = None
    """Worth of a full KV hit. Learned: the prefill's share of a request's service time."""
    gamma_s: float | None = None
    """Cost of one request ahead. Learned: mean service time over the instance's slots."""
    delta: float = 1.0
    """Cost of one second of moving bytes."""
    start_s: float = 2.0
    """Start-up time of a backend that was never started here."""
    service_s: float = 2.0
    """Service time of a model that was never asked here."""
    prefill_share: float = 0.25
    """Part of a request's service time that a full KV hit saves."""
    learning_gain: float = 0.3
    """Weight of the newest sample in each learned figure, 0..1."""
    store_bytes_s: float = 100.0 * MIB
    """Bandwidth of `store→nvme` until it is measured."""
    nvme_bytes_s: float = 500.0 * MIB
    """Bandwidth of `nvme→dram` until it is measured."""
    device_bytes_s: float = 8.0 * GIB
    """Bandwidth of `dram→device` until it is measured."""

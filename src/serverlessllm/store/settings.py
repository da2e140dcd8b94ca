"""What a checkpoint store is opened with."""

from __future__ import annotations

import msgspec

from serverlessllm.core.units import MIB


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the store is reached, and the bounds of each wait and retry."""

    endpoint: str | None = None
    """URL of an S3, Azure or GCS service other than the cloud's own."""
    region: str | None = None
    """S3 region; None: from the environment, or the service's default."""
    allow_http: bool = False
    """Allow an endpoint without TLS."""
    options: dict[str, str] = {}
    """Further keys of the object store (`access_key_id`, `account_key`, …), over the
    environment's usual variables."""
    connect_timeout_s: float = 5.0
    """To open a connection."""
    request_timeout_s: float = 120.0
    """For one whole HTTP request, body included."""
    tries: int = 6
    """Attempts of one call before it fails."""
    retry_min_s: float = 0.1
    """Bound of the first back-off; each next one doubles. The wait is random below its bound."""
    retry_max_s: float = 5.0
    """Bound of the last back-off."""
    slow_bytes_s: float = 1.0 * MIB
    """A range slower than this (bytes/s) is given up and asked for again…"""
    slow_window_s: float = 10.0
    """…but not before it ran for so long."""
    part_bytes: int = 16 * MIB
    """Part of a multipart upload."""
    upload_concurrency: int = 4
    """Parts in flight: `part_bytes` of memory each."""
    index_bytes_max: int = 64 * MIB
    """A larger `.idx` is refused before it is read."""
    list_max: int = 100_000
    """Checkpoints that one listing may name."""
    pinned_etags_max: int = 4096
    """Checkpoints whose ETag is remembered; the oldest is forgotten (and pinned anew)."""

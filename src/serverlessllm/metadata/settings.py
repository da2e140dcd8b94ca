"""Bounds of the metadata store and of its typed registry."""

from __future__ import annotations

import msgspec


class MetadataSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The `[metadata]` section."""

    call_timeout_s: float = 2.0
    """No call waits longer; then it fails with `metadata_unavailable`."""
    calls_waiting_max: int = 1024
    """Calls that wait for the database; the next one fails at once."""
    changes_kept_max: int = 4096
    """Changes that the log keeps; a watch that fell further behind lists again."""
    changes_batch_max: int = 256
    """Changes that a watch reads at once."""
    reap_retry_s: float = 1.0
    """Wait after a failed look for expired leases."""
    conflict_retries_max: int = 16
    """Tries of one compare-and-swap loop of the registry."""
    jobs_kept_max: int = 256
    """Finished ingest jobs that stay readable, one a model, the newest."""
    api_keys_max: int = 10_000
    """API keys that may be in use."""
    revoked_keys_kept_max: int = 256
    """Revoked API keys that stay readable, the newest; never fewer than one."""

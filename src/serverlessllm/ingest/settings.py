"""The bounds of an ingestion."""

from __future__ import annotations

import msgspec

from serverlessllm.core.units import GIB, MIB
from serverlessllm.store.settings import StoreSettings


class IngestSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where raw weights come from, and what an ingestion may cost."""

    hub_endpoint: str | None = None
    """URL of the Hugging Face hub or a mirror; None: HF_ENDPOINT, or the hub itself."""
    hub_timeout_s: float = 10.0
    """For one answer of the hub's API."""
    sources: StoreSettings = StoreSettings()
    """How `s3://`, `az://` and `gs://` sources are reached, and every source's retries."""
    block_bytes: int = 8 * MIB
    """One ranged read of a remote source."""
    read_ahead_blocks: int = 8
    """Ranged reads in flight ahead of the converter."""
    cached_blocks: int = 16
    """Blocks of remote files in memory; at least `read_ahead_blocks`."""
    source_bytes_max: int = 4096 * GIB
    """A larger source is refused before it is fetched."""
    space_margin_bytes: int = 256 * MIB
    """Free room that must be left on the work directory's disk."""
    jobs_max: int = 2
    """Conversions at once in this process; further ones wait."""
    jobs_waiting_max: int = 64
    """Ingestions this process takes on at once, running and waiting."""
    lease_s: float = 15.0
    """A job whose owner was silent for so long is taken over."""
    claims_max: int = 8
    """Owners that may be lost one after another before a job fails."""
    progress_interval_s: float = 0.5
    """Between two writes of a job's progress."""
    failure_cache_s: float = 5.0
    """How long a failure answers for the next callers."""
    worker_crashes_max: int = 3
    """Crashes of the converter without any progress before the job fails."""
    worker_retry_min_s: float = 0.5
    """Pause before the converter is started again; doubles."""
    worker_retry_max_s: float = 30.0
    """Longest such pause."""
    worker_silence_s_max: float = 600.0
    """A converter that reports nothing for so long is killed."""

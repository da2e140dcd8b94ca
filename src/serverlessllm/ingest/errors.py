"""Errors that only ingestion knows."""

from __future__ import annotations

from serverlessllm.core.errors import SourceUnavailable


class SourceDenied(SourceUnavailable):
    """The source wants a credential that we do not have."""

    code = "source_access_denied"
    permanent = True


class WorkerCrashed(SourceUnavailable):
    """The converter died too often without progress."""

    code = "ingest_worker_crashed"

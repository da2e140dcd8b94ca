"""Errors that only ingestion knows."""

from __future__ import annotations

from serverlessllm.core.errors import SourceUnavailable


class SourceDenied(SourceUnavailable):
    """The source wants a credential that we do not have."""

    code = "source_access_denied"
    permanent = True


class SourceChanged(SourceUnavailable):
    """The source is no longer what it was when it was opened: what was made of it is worthless."""

    code = "source_changed"


class WorkerCrashed(SourceUnavailable):
    """The converter died too often without progress."""

    code = "ingest_worker_crashed"

"""What the service and its converter process say to each other: one JSON a line.

The service writes `WorkRequest` to the worker's stdin; the worker answers `Resolved` and waits
for `Proceed` (the checkpoint may be published already: then it is killed instead); then come
`Progress`, many times, and `Done`; or, at any time, `Failed`.
"""

from __future__ import annotations

import msgspec

from serverlessllm.core.cluster import JobError
from serverlessllm.core.ids import ModelId
from serverlessllm.ingest.settings import IngestSettings


class WorkRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to make a checkpoint of."""

    model: ModelId
    source: str
    settings: IngestSettings
    parent: int
    """Process id of the service: if it is not our parent any more, there is nothing to do."""


class Proceed(msgspec.Struct, frozen=True, kw_only=True):
    """Convert, into this folder."""

    folder: str


class Resolved(msgspec.Struct, frozen=True, kw_only=True, tag="resolved"):
    """What the source is, exactly."""

    revision: str
    source_bytes: int


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """The first `bytes_done` bytes of the file at `path` are final."""

    path: str
    bytes_done: int
    bytes_total: int


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The folder holds a verified `.bin` and `.idx`."""

    bin_path: str
    idx_path: str
    size_bytes: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """It cannot be done; the worker ends."""

    error: JobError
    param: str | None = None
    retry_after_s: float | None = None


Report = Resolved | Progress | Done | Failed

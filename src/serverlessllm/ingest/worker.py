"""The converter's own process: `python -m serverlessllm.ingest.worker`, spoken to by lines.

Apart, because converting is hours of reading what strangers wrote: if it is killed, hangs or
eats its memory, the service goes on, and starts it again where the journal of the work folder
ends. It dies with its parent.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from serverlessllm.checkpoint.convert import ChunkDone, convert
from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME, decode_index
from serverlessllm.checkpoint.reader import verify
from serverlessllm.checkpoint.sources.base import RawCheckpoint
from serverlessllm.core.errors import (
    CheckpointError,
    InvalidRequest,
    ModelNotFound,
    OutOfSpace,
    SLLMError,
)
from serverlessllm.core.failures import record_of
from serverlessllm.core.parent import die_with
from serverlessllm.core.units import format_size
from serverlessllm.ingest.messages import (
    Done,
    Failed,
    Proceed,
    Progress,
    Report,
    Resolved,
    WorkRequest,
)
from serverlessllm.ingest.remote import Fetcher
from serverlessllm.ingest.sources import open_source
from serverlessllm.store.errors import is_disk_full

LOCK_NAME = ".lock"
"""In the work folder: held by the one worker that writes there."""


def main() -> None:
    """Do what the first line of stdin asks; report on stdout."""
    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not look like a report
    lines = iter(sys.stdin.buffer.readline, b"")
    request = msgspec.json.decode(next(lines, b"null"), type=WorkRequest)
    die_with(request.parent)
    try:
        _work(request, lines, reports)
    except SLLMError as error:
        _fail(reports, error)
    except OSError as error:
        if not is_disk_full(str(error)):
            raise
        _fail(reports, OutOfSpace("the work disk is full: free space in the data directory"))


def _work(request: WorkRequest, lines: Iterator[bytes], reports: BinaryIO) -> None:
    with Fetcher(request.settings) as fetcher:
        raw = open_source(request.source, request.model, request.settings, fetcher)
        source_bytes = _checked_size(raw, request)
        _say(reports, Resolved(revision=raw.revision, source_bytes=source_bytes))
        line = next(lines, b"")
        if not line:
            return  # the service has what it wanted, or is gone
        folder = Path(msgspec.json.decode(line, type=Proceed).folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)  # a predecessor that is just being killed

        finished = _finished(folder, raw)
        if finished is not None:
            _say(reports, finished)
            return

        def report(chunk: ChunkDone) -> None:
            _say(
                reports,
                Progress(
                    path=str(chunk.path),
                    bytes_done=chunk.offset + chunk.size_bytes,
                    bytes_total=chunk.total_bytes,
                ),
            )

        done = convert(raw, folder, on_chunk=report)
        _say(
            reports,
            Done(
                bin_path=str(done.bin_path),
                idx_path=str(done.idx_path),
                size_bytes=done.size_bytes,
            ),
        )


def _finished(folder: Path, raw: RawCheckpoint) -> Done | None:
    """What a run before us made of the same revision and could not publish, if it verifies."""
    bin_path, idx_path = folder / BIN_NAME, folder / IDX_NAME
    try:
        index = decode_index(idx_path.read_bytes())
        if (index.source, index.revision) != (raw.source, raw.revision):
            return None
        verify(bin_path, index)
    except (OSError, CheckpointError):
        return None
    return Done(bin_path=str(bin_path), idx_path=str(idx_path), size_bytes=index.size_bytes)


def _checked_size(raw: RawCheckpoint, request: WorkRequest) -> int:
    size_bytes = sum(file.size_bytes for file in raw.files.values())
    limit = request.settings.source_bytes_max
    if size_bytes > limit:
        raise InvalidRequest(
            f"model {request.model}: its source has {format_size(size_bytes)}, over the limit "
            f"of {format_size(limit)} (ingest.source_bytes_max)",
            param="model",
        )
    if size_bytes == 0:
        raise ModelNotFound(f"model {request.model}: its source is empty", param="model")
    return size_bytes


def _fail(reports: BinaryIO, error: SLLMError) -> None:
    _say(
        reports,
        Failed(error=record_of(error), param=error.param, retry_after_s=error.retry_after_s),
    )


def _say(reports: BinaryIO, report: Report) -> None:
    """One write a line: a report is whole or absent, whenever we are killed."""
    reports.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()

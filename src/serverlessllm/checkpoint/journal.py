"""What a conversion has written: a line a chunk, appended as it goes, and the id at its end.

The first line identifies the work. A line that was cut off by a crash ends the journal, and the
bytes on the disk are checked against the rest before they are kept, so the journal never has to
be flushed in step with the data. The journal stays beside a finished checkpoint: it tells the same
conversion that nothing is left to do, and `sllm verify` which id the `.idx` must have.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from serverlessllm.checkpoint.bounds import INDEX_BYTES_MAX
from serverlessllm.checkpoint.index import Chunk
from serverlessllm.core.ids import CheckpointId

JOURNAL_NAME = "model.journal"


class _Work(msgspec.Struct, frozen=True):
    fingerprint: str


class _Finished(msgspec.Struct, frozen=True):
    checkpoint: CheckpointId


class Journal:
    """The journal at `path` of the work with this fingerprint; another work's is emptied."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.chunks: list[Chunk] = []
        """Of chunk 0, 1, 2, …"""
        self._ends = [0]
        """Where the first line ends, then the line of each chunk."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._read(_line(_Work(fingerprint)))
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def _read(self, first: bytes) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            lines = file.read().splitlines(keepends=True)
        if not lines or lines[0] != first:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, first, 0)
            lines = [first]
        self._ends = [len(first)]
        for line in lines[1:]:
            chunk = _chunk(line)
            if chunk is None:
                break
            self._add(chunk, line)

    def _add(self, chunk: Chunk, line: bytes) -> None:
        self.chunks.append(chunk)
        self._ends.append(self._ends[-1] + len(line))

    def keep(self, count: int) -> None:
        """Forget all but the first `count` chunks."""
        del self.chunks[count:]
        del self._ends[count + 1 :]
        os.ftruncate(self._fd, self._ends[-1])

    def append(self, chunk: Chunk) -> None:
        """Note that the next chunk is written, and was read back from the disk."""
        line = _line(chunk)
        os.pwrite(self._fd, line, self._ends[-1])
        self._add(chunk, line)

    def finish(self, checkpoint: CheckpointId) -> None:
        """Note which checkpoint came of it."""
        os.ftruncate(self._fd, self._ends[-1])
        os.pwrite(self._fd, _line(_Finished(checkpoint)), self._ends[-1])


def is_of(path: Path, fingerprint: str) -> bool:
    """Whether the journal at `path` is of the work with this fingerprint."""
    first = _line(_Work(fingerprint))
    try:
        with path.open("rb") as file:
            return file.read(len(first)) == first
    except OSError:
        return False


def finished_id(path: Path) -> CheckpointId | None:
    """The id that the journal at `path` ends with; None when there is none, or it is unfinished."""
    try:
        with path.open("rb") as file:
            last = file.read(INDEX_BYTES_MAX).splitlines(keepends=True)[-1:]
    except OSError:
        return None
    try:
        return msgspec.json.decode(last[0], type=_Finished).checkpoint if last else None
    except ValueError:
        return None


def _chunk(line: bytes) -> Chunk | None:
    """The chunk of a whole line; None for one that a crash cut off, and for the last one."""
    try:
        return msgspec.json.decode(line, type=Chunk) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _line(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value) + b"\n"

"""What an interrupted conversion has already written: a line a chunk, appended as it goes.

The first line identifies the work. A line that was cut off by a crash ends the journal, and the
bytes on the disk are checked against the rest before they are kept, so the journal never has to
be flushed in step with the data.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from serverlessllm.checkpoint.index import Chunk


class _Work(msgspec.Struct, frozen=True):
    fingerprint: str


class Journal:
    """The journal at `path` of the work with this fingerprint; another work's is emptied."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.chunks: list[Chunk] = []
        """Of chunk 0, 1, 2, …"""
        self._first = _line(_Work(fingerprint))
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._read()
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

    def _read(self) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            lines = file.read().splitlines(keepends=True)
        if lines and lines[0] == self._first:
            for line in lines[1:]:
                try:
                    self.chunks.append(msgspec.json.decode(line, type=Chunk))
                except ValueError:
                    break
        self.keep(len(self.chunks))

    def keep(self, count: int) -> None:
        """Forget all but the first `count` chunks."""
        del self.chunks[count:]
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, self._first + b"".join(map(_line, self.chunks)), 0)
        os.lseek(self._fd, 0, os.SEEK_END)

    def append(self, chunk: Chunk) -> None:
        """Note that the next chunk is written."""
        self.chunks.append(chunk)
        os.write(self._fd, _line(chunk))


def _line(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value) + b"\n"

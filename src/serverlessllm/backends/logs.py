"""What a backend prints: drained at once, capped, rotated, its last lines at hand."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from pathlib import Path

_READ_BYTES = 64 * 1024
"""A pipe's whole capacity: one read empties it."""
_LINE_BYTES_MAX = 500


class OutputLog:
    """Reads a pipe into `path` until its other end closes.

    The writer never waits for longer than one turn of the event loop, however much it prints;
    the disk never holds more than `bytes_max` (`path` and `path.1`, half each).
    """

    def __init__(self, path: Path, *, bytes_max: int, tail_lines: int) -> None:
        self._path = path
        self._half_bytes = bytes_max // 2
        self._tail: deque[bytes] = deque(maxlen=tail_lines)
        self._partial = b""
        self._file = path.open("ab", buffering=0)
        self._size_bytes = self._file.tell()
        self._pipe = -1

    def drain(self, pipe: int) -> None:
        """Take over the reading end of the pipe."""
        os.set_blocking(pipe, False)
        self._pipe = pipe
        asyncio.get_running_loop().add_reader(pipe, self._readable)

    def tail(self) -> tuple[str, ...]:
        """The last lines, oldest first."""
        lines = [*self._tail, self._partial] if self._partial else list(self._tail)
        return tuple(line.decode(errors="replace") for line in lines)

    def close(self) -> None:
        """Take what is left in the pipe, and stop. Idempotent."""
        if self._pipe >= 0:
            self._readable()
        self._end()
        self._file.close()

    def _readable(self) -> None:
        try:
            data = os.read(self._pipe, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._end()
            return
        *lines, rest = (self._partial + data).rsplit(b"\n", self._tail.maxlen or 1)
        self._tail.extend(line[:_LINE_BYTES_MAX] for line in lines)
        self._partial = rest[:_LINE_BYTES_MAX]
        self._append(data)

    def _append(self, data: bytes) -> None:
        try:
            if self._size_bytes + len(data) > self._half_bytes:
                self._rotate()
            self._file.write(data)
        except OSError:  # a full disk loses log lines, never a backend
            return
        self._size_bytes += len(data)

    def _rotate(self) -> None:
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        fresh = self._path.open("wb", buffering=0)
        self._file.close()
        self._file = fresh
        self._size_bytes = 0

    def _end(self) -> None:
        if self._pipe >= 0:
            asyncio.get_running_loop().remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = -1


def prune_logs(log_dir: Path, files_max: int) -> None:
    """Remove the oldest logs, so that fewer than `files_max` are left."""
    logs = sorted(log_dir.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for old in logs[: max(0, len(logs) - files_max + 1)]:
        old.unlink(missing_ok=True)
        old.with_name(old.name + ".1").unlink(missing_ok=True)

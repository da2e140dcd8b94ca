"""Room on the work disk: promised before a conversion starts, given back when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serverlessllm.core.errors import OutOfSpace
from serverlessllm.core.units import format_size


class WorkSpace:
    """The disk that conversions of this process write to."""

    def __init__(self, path: Path, margin_bytes: int) -> None:
        self._path = path
        self._margin_bytes = margin_bytes
        self._promised_bytes = 0

    @contextmanager
    def reserve(self, size_bytes: int, folder: Path) -> Iterator[None]:
        """Promise `size_bytes` to the conversion in `folder`; what lies there already counts.

        Raises:
            OutOfSpace: they are not there; says how many are missing.
        """
        needed = max(0, size_bytes - _allocated_bytes(folder))
        disk = os.statvfs(self._path)
        free = disk.f_bavail * disk.f_frsize - self._promised_bytes - self._margin_bytes
        if needed > free:
            raise OutOfSpace(
                f"the conversion needs {format_size(needed)} in the data directory, and "
                f"{format_size(max(0, free))} are free: free {format_size(needed - free)} or "
                "use another disk"
            )
        self._promised_bytes += needed
        try:
            yield
        finally:
            self._promised_bytes -= needed


def _allocated_bytes(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir() if entry.is_file())

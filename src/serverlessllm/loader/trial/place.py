"""Private directories of a trial. Each is locked while it is in use, so that what a killed trial
left (in /dev/shm it would be memory) is found and removed by the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serverlessllm.core.errors import OutOfSpace
from serverlessllm.core.units import MIB, format_size
from serverlessllm.loader.locks import lock_exclusive, try_exclusive

_PREFIX = "sllm-trial-"
_SLACK_BYTES = 64 * MIB
"""Beside the checkpoint itself."""
_MEMINFO = Path("/proc/meminfo")


@contextlib.contextmanager
def private_directory(parent: Path) -> Iterator[Path]:
    """A new directory in `parent`, removed at the end, with what killed trials left there.

    Raises:
        OSError: `parent` is missing, or cannot be written.
    """
    _sweep(parent)
    path, lock = _make(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getuid()}-", dir=parent))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        lock_exclusive(lock)
        if path.exists():
            return path, lock
        os.close(lock)  # another trial swept it before it was locked


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}{os.getuid()}-*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid() and try_exclusive(lock):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def check_room(directory: Path, size_bytes: int, what: str) -> None:
    """Return if `size_bytes` fit into the file system of `directory`, with a little to spare.

    Raises:
        OutOfSpace: they do not.
    """
    free = shutil.disk_usage(directory).free
    if free < size_bytes + _SLACK_BYTES:
        raise OutOfSpace(
            f"{what} takes {format_size(size_bytes)}, but {directory} has only "
            f"{format_size(free)} free"
        )


def check_memory(size_bytes: int) -> None:
    """Return if the machine has so much memory to give, with a little to spare.

    Raises:
        OutOfSpace: it has not; a tmpfs promises more than there is.
    """
    lines = (line.split() for line in _MEMINFO.read_text().splitlines())
    available = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    if available < size_bytes + _SLACK_BYTES:
        raise OutOfSpace(
            f"the copy in DRAM takes {format_size(size_bytes)}, but only "
            f"{format_size(available)} of memory are available"
        )

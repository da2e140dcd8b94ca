"""flock: the references and the mutual exclusion of all processes that share the tiers.

A lock ends with the last descriptor of its open file, so a killed process leaves none. Each
`os.open` is its own lock owner, within one process too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def try_exclusive(fd: int) -> bool:
    """Take the exclusive lock if nobody holds any."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_exclusive(fd: int) -> None:
    """Wait for the exclusive lock."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def lock_shared(fd: int) -> None:
    """Wait for a shared lock; turns an exclusive one into a shared one."""
    fcntl.flock(fd, fcntl.LOCK_SH)


@contextlib.contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Hold what every decision about the files of a tier is made under."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock_exclusive(fd)
        yield
    finally:
        os.close(fd)


def is_being_written(path: Path) -> bool:
    """Whether somebody holds the file exclusively, at this instant; nobody does if it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False

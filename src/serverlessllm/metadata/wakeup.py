"""Tell the other processes of this machine that something was committed: inotify on one file.

A commit touches the file; every listener's loop is woken by the kernel. Nobody polls.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_IN_ATTRIB = 0x4
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_READ_BYTES = 4096
"""Far more than one event; several that wait are read at once."""


def touch(path: Path) -> None:
    """Wake all who listen on `path`."""
    try:
        os.utime(path)
    except FileNotFoundError:
        os.close(_create(path))


class Listener:
    """Calls `on_wake` on the running loop after each touch, by whichever process."""

    def __init__(self, path: Path, on_wake: Callable[[], None]) -> None:
        """Raises OSError: no inotify to be had (`EMFILE`: the user's limit of instances)."""
        self._on_wake = on_wake
        self._loop = asyncio.get_running_loop()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = _checked(libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC))
        try:
            os.close(_create(path))
            _checked(libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_ATTRIB))
            self._loop.add_reader(self._fd, self._readable)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _readable(self) -> None:
        try:
            os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        self._on_wake()


def _create(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result

"""Publishing into a `file://` store from the same filesystem: a hard link instead of a copy.

Measured: 192 MiB through the object store's writer took 0.5 s and the room of a second copy; a
link takes neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME

STAGED = "*#*"
"""How the object store, and we, name a file that is not published yet."""


class HeldFolder:
    """The folder of one prefix, with a shared flock on it while somebody publishes into it.

    The lock tells leftovers of killed publishers from the work of living ones: who can have it
    alone may sweep. It dies with its process.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        self._root = root
        self._path = root / prefix
        self._fd = self._open()
        if self._alone():
            for staged in self._path.glob(STAGED):
                staged.unlink(missing_ok=True)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def can_link(self, source: Path) -> bool:
        """Whether files of `source`'s folder are on our filesystem."""
        return source.parent.stat().st_dev == os.fstat(self._fd).st_dev

    def link(self, source: Path, name: str) -> None:
        """Make `source` appear as `name`, durably, in place of what a crash may have left."""
        with source.open("rb") as file:
            os.fsync(file.fileno())
        staged = self._path / f"{name}#{os.getpid()}-{id(self)}"
        try:
            staged.hardlink_to(source)
            staged.replace(self._path / name)
        finally:
            staged.unlink(missing_ok=True)  # also when `name` was the same file already
        os.fsync(self._fd)

    def sync(self, name: str) -> None:
        """Make `name`, which somebody else wrote, durable."""
        with (self._path / name).open("rb") as file:
            os.fsync(file.fileno())
        os.fsync(self._fd)

    def release(self) -> None:
        """Drop the lock; where nothing was published, leave nothing either."""
        try:
            if self._alone():
                if not (self._path / IDX_NAME).exists():
                    (self._path / BIN_NAME).unlink(missing_ok=True)
                for folder in (self._path, *self._path.parents):
                    if folder == self._root:
                        break
                    folder.rmdir()
        except OSError:
            pass  # not empty: that is the usual case
        finally:
            os.close(self._fd)

    def _open(self) -> int:
        while True:
            self._path.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            fcntl.flock(fd, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)  # another publisher just gave up and removed the folder

    def _alone(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

"""A tier's directory: which checkpoints are in it, and who holds them.

The disk is the state. `<id>.bin` beside `<id>.idx` is a whole checkpoint; `<id>.partial` is one
being filled, by the process that holds it exclusively. A shared lock on a `.bin` is a reference
to it: only who gets the exclusive one may evict it, and does so under the directory's lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import LoadFailed
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.locks import directory_lock, lock_shared, try_exclusive

_NAME = re.compile(r"([0-9a-f]{64})\.(bin|partial|idx)")


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A `.bin` or `.partial` as a scan saw it."""

    checkpoint: CheckpointId
    path: Path
    whole: bool
    size_bytes: int
    unwritten_bytes: int
    """Of `size_bytes`: promised, but not yet taken from the file system."""
    last_used: int


class Held:
    """An open `.bin` with a shared lock on it. Sharing it is one reference more."""

    __slots__ = ("checkpoint", "fd", "path", "size_bytes")

    def __init__(self, checkpoint: CheckpointId, path: Path, fd: int, size_bytes: int) -> None:
        self.checkpoint = checkpoint
        self.path = path
        self.fd = fd
        self.size_bytes = size_bytes

    def share(self) -> Held:
        """Another reference, released by itself: the lock lasts as long as any of them."""
        return Held(self.checkpoint, self.path, os.dup(self.fd), self.size_bytes)

    def release(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class TierDirectory:
    """The files of one tier."""

    def __init__(self, level: CacheLevel, path: Path) -> None:
        self.level = level
        self.path = path

    def bin_path(self, checkpoint: CheckpointId) -> Path:
        return self.path / f"{checkpoint}.bin"

    def index_path(self, checkpoint: CheckpointId) -> Path:
        return self.path / f"{checkpoint}.idx"

    def partial_path(self, checkpoint: CheckpointId) -> Path:
        return self.path / f"{checkpoint}.partial"

    def prepare(self) -> None:
        """Make the directory ours alone.

        Raises:
            LoadFailed: it cannot be made, or is somebody else's: anybody may make names in
                /dev/shm.
        """
        where = f"the directory of the {self.level.tier} tier"
        cure = f"set loader.{self.level.tier}_dir to another place"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise LoadFailed(f"{where} belongs to another user or is a link: {cure}")
            if stat.S_IMODE(status.st_mode) != 0o700:
                self.path.chmod(0o700)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise LoadFailed(f"{where} cannot be made ({reason}): {cure}") from error

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """What every decision is made under; held for milliseconds."""
        return directory_lock(self.path)

    def scan(self) -> tuple[File, ...]:
        """All `.bin` and `.partial` files now; none when the directory itself was removed."""
        return tuple(self._files())

    def free_bytes(self) -> int:
        """What the file system could take, less what has been promised to partial files."""
        promised = sum(file.unwritten_bytes for file in self._files() if not file.whole)
        return max(0, shutil.disk_usage(self.path).free - promised)

    def hold(self, checkpoint: CheckpointId) -> Held | None:
        """A reference to a checkpoint that is here."""
        path = self.bin_path(checkpoint)
        while True:
            try:
                fd = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                lock_shared(fd)  # an evictor holds the exclusive one for an instant only
                if _is_named(path, fd):
                    return Held(checkpoint, path, fd, os.fstat(fd).st_size)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # evicted between the two calls: look again

    def touch(self, held: Held) -> None:
        """Make it the last one used. The kernel's time orders; where it does not (its coarse
        tick, a clock that was set back), the next number does."""
        latest = max((file.last_used for file in self._files() if file.whole), default=0)
        os.utime(held.fd)
        if os.fstat(held.fd).st_mtime_ns <= latest:
            os.utime(held.fd, ns=(latest + 1, latest + 1))

    def read_index(self, checkpoint: CheckpointId) -> bytes | None:
        """The `.idx` beside the `.bin`, unchecked."""
        try:
            return self.index_path(checkpoint).read_bytes()
        except FileNotFoundError:
            return None

    def discard(self, checkpoint: CheckpointId) -> None:
        """Remove a copy that is wrong, whoever holds it: it must not be found again."""
        with self.lock():
            self.remove(checkpoint)

    def remove(self, checkpoint: CheckpointId) -> None:
        """Unlink a `.bin` and its `.idx`. Call it under the lock."""
        self.bin_path(checkpoint).unlink(missing_ok=True)
        self.index_path(checkpoint).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed processes left: partial files that nobody fills, `.idx` files
        alone. Call it under the lock. Names that are not ours are left alone."""
        whole = set()
        for file in self._files():
            if file.whole:
                whole.add(file.checkpoint)
            elif _is_free(file.path):
                file.path.unlink(missing_ok=True)
        for entry in os.scandir(self.path):
            match = _NAME.fullmatch(entry.name)
            if match and match[2] == "idx" and match[1] not in whole:
                Path(entry.path).unlink(missing_ok=True)

    def _files(self) -> Iterator[File]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match is None or match[2] == "idx":
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # evicted or finished during the scan
                    continue
                if not stat.S_ISREG(status.st_mode):
                    continue
                yield File(
                    checkpoint=CheckpointId(match[1]),
                    path=Path(entry.path),
                    whole=match[2] == "bin",
                    size_bytes=status.st_size,
                    unwritten_bytes=max(0, status.st_size - status.st_blocks * 512),
                    last_used=status.st_mtime_ns,
                )


def _is_named(path: Path, fd: int) -> bool:
    """Whether `path` is still this file: what was evicted may live on under another name, to
    become another checkpoint."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(fd))
    return False


def _is_free(path: Path) -> bool:
    """Whether nobody holds the file, at this instant."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return try_exclusive(fd)
    finally:
        os.close(fd)

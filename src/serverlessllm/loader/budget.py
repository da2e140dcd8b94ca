"""Room in a tier: reserved before the first byte moves, made by evicting, given back on failure.

Everything here blocks (on the directory's lock, on the file system): call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import OutOfSpace
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.locks import lock_exclusive, lock_shared, try_exclusive
from serverlessllm.loader.plan import Entry, TierState, evictions
from serverlessllm.loader.residency import File, Held, TierDirectory
from serverlessllm.telemetry import log
from serverlessllm.telemetry.table import EVICTIONS

PAGE_BYTES = 4096
"""Direct I/O wants offsets, sizes and addresses in multiples of this, on every disk we know."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_log = log("loader")


def whole_pages(size_bytes: int) -> int:
    """`size_bytes` rounded up to pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


@contextlib.contextmanager
def full_is_out_of_space(level: CacheLevel) -> Iterator[None]:
    """The file system's own "full" (or a quota, or a limit of file sizes) as `OutOfSpace`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OutOfSpace(
            f"the file system of the {level.tier} tier is full ({os.strerror(error.errno)}): "
            f"free space, or set loader.{level.tier}_dir to a larger one"
        ) from error


class Partial:
    """A checkpoint being filled: `fd` is open for reading and writing, locked exclusively, and
    as long as the `.bin` in whole pages."""

    __slots__ = ("_tier", "checkpoint", "fd", "size_bytes")

    def __init__(
        self, tier: TierDirectory, checkpoint: CheckpointId, fd: int, size_bytes: int
    ) -> None:
        self._tier = tier
        self.checkpoint = checkpoint
        self.fd = fd
        self.size_bytes = size_bytes

    def commit(self, index: bytes) -> Held:
        """Make it a checkpoint of the tier: the `.idx` first, then the name. Every chunk in it
        has been verified. From here on it is a reference like any other.

        Raises:
            OutOfSpace: there is no room for the `.idx`.
        """
        tier = self._tier
        path = tier.bin_path(self.checkpoint)
        with full_is_out_of_space(tier.level), tier.lock():
            os.ftruncate(self.fd, self.size_bytes)
            # nvme stays writable for us: a chunk that rotted is written again in place.
            os.fchmod(self.fd, 0o600 if tier.level is CacheLevel.NVME else 0o400)
            tier.index_path(self.checkpoint).write_bytes(index)
            tier.partial_path(self.checkpoint).rename(path)
            lock_shared(self.fd)  # under the directory's lock nobody evicts in between
        fd, self.fd = self.fd, -1
        held = Held(self.checkpoint, path, fd, self.size_bytes)
        tier.touch(held)
        return held

    def abandon(self) -> None:
        """Leave nothing of it. Idempotent; after `commit` it does nothing."""
        if self.fd < 0:
            return
        with self._tier.lock():
            self._tier.partial_path(self.checkpoint).unlink(missing_ok=True)
            self._tier.index_path(self.checkpoint).unlink(missing_ok=True)
        os.close(self.fd)
        self.fd = -1


def reserve(
    tier: TierDirectory, checkpoint: CheckpointId, size_bytes: int, budget_bytes: int
) -> Partial | None:
    """Room for a checkpoint, evicting what is least recently used and not held.

    None when it needs no room: it is there by now, or another process is filling it.

    Raises:
        OutOfSpace: too much is held, or the file system is too full; nothing was evicted.
    """
    tier.prepare()  # who cleans /dev/shm on logout must not stop a daemon for good
    with tier.lock():
        tier.sweep()
        if tier.bin_path(checkpoint).exists() or tier.partial_path(checkpoint).exists():
            return None
        path = tier.partial_path(checkpoint)
        _make_room(tier, size_bytes, budget_bytes, heir=path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock_exclusive(fd)
            with full_is_out_of_space(tier.level):
                os.ftruncate(fd, whole_pages(size_bytes))
                if tier.level is CacheLevel.NVME:  # a tmpfs would allocate its pages in here
                    os.posix_fallocate(fd, 0, whole_pages(size_bytes))
        except BaseException:
            path.unlink()
            os.close(fd)
            raise
    return Partial(tier, checkpoint, fd, size_bytes)


def evict(tier: TierDirectory, checkpoint: CheckpointId) -> int:
    """Drop one checkpoint if nobody holds it; the bytes freed."""
    with contextlib.ExitStack() as locked, tier.lock():
        for file in tier.scan():
            if file.checkpoint == checkpoint and file.whole and _take(file, locked) is not None:
                _drop(tier, checkpoint)
                return file.size_bytes
    return 0


def trim(tier: TierDirectory, budget_bytes: int) -> None:
    """Evict down to the budget, which may be less than it was; what is held stays."""
    with contextlib.suppress(OutOfSpace), tier.lock():
        _make_room(tier, 0, budget_bytes)


def _make_room(
    tier: TierDirectory, needed_bytes: int, budget_bytes: int, heir: Path | None = None
) -> None:
    """Decide on what is true while every lock is held, then drop. The memory of the first that is
    dropped may become the file `heir`: see `_bequeath`."""
    with contextlib.ExitStack() as locked:
        files = tier.scan()
        taken = {
            file.path: fd
            for file in files
            if file.whole and (fd := _take(file, locked)) is not None
        }
        state = TierState(
            level=tier.level,
            budget_bytes=budget_bytes,
            free_bytes=tier.free_bytes(),
            entries=tuple(
                Entry(
                    checkpoint=file.checkpoint,
                    size_bytes=file.size_bytes,
                    last_used=file.last_used,
                    held=file.path not in taken,
                )
                for file in files
            ),
        )
        for entry in evictions(state, needed_bytes):
            path = tier.bin_path(entry.checkpoint)
            if heir is not None and tier.level is CacheLevel.DRAM and not heir.exists():
                _bequeath(taken[path], path, heir)
            _drop(tier, entry.checkpoint)


def _bequeath(fd: int, path: Path, heir: Path) -> None:
    """Let an evicted file live on as `heir`, to be overwritten: to clear and allocate its pages
    anew costs more than to read them.

    Its lock says that no agent refers to it, but an engine whose agent was killed may map it
    still. A write lease is given only when no other open file, nor a mapping, exists of it; nobody
    opens it any more once its name is gone.
    """
    if os.fstat(fd).st_nlink > 1:
        return  # it has another name
    path.rename(heir)
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # not SIGIO, which would end us
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.fchmod(fd, 0o600)
    except OSError:  # somebody has it, or the file system has no leases
        heir.unlink()


def _drop(tier: TierDirectory, checkpoint: CheckpointId) -> None:
    tier.remove(checkpoint)
    EVICTIONS.inc(tier.level.tier)
    _log.info("evicted", checkpoint=checkpoint, tier=tier.level.tier)


def _take(file: File, locked: contextlib.ExitStack) -> int | None:
    """Lock a `.bin` that nobody holds; `locked` lets go of it, which frees it if it was dropped."""
    try:
        fd = os.open(file.path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    locked.callback(os.close, fd)
    return fd if try_exclusive(fd) else None

"""flock: the references and the mutual exclusion of all processes that share the tiers.

A lock ends with the last descriptor of its open file, so a killed process leaves none. Each
`os.open` is its own lock owner, within one process too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import LoadFailed


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


async def wait_unlocked(path: Path, clock: Clock, wait_s_max: float) -> None:
    """Return when whoever holds `path` exclusively has let go (finished, or died).

    The wait is a blocked system call in a thread of its own; a cancelled one leaves the thread
    (a daemon) blocked until the other process ends, holding one descriptor.

    Raises:
        LoadFailed: it still holds it after `wait_s_max`.
    """
    loop = asyncio.get_running_loop()
    unlocked = loop.create_future()

    def tell() -> None:
        if not unlocked.done():
            unlocked.set_result(None)

    def block() -> None:
        with contextlib.suppress(OSError):  # it is gone already
            fd = os.open(path, os.O_RDONLY)
            try:
                lock_shared(fd)
            finally:
                os.close(fd)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=block, name="loader-peer-wait", daemon=True).start()
    timer = asyncio.ensure_future(clock.sleep(wait_s_max))
    try:
        await asyncio.wait((unlocked, timer), return_when=asyncio.FIRST_COMPLETED)
        if not unlocked.done():
            raise LoadFailed(
                f"another process of this machine has been loading the checkpoint for over "
                f"{wait_s_max:.0f} s: see what it waits for, or raise loader.peer_wait_s_max",
                retry_after_s=5.0,
            )
    finally:
        timer.cancel()
        unlocked.cancel()

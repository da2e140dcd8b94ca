"""The embedded metadata store: a SQLite file that the processes of one machine share.

The database is blocking and lives in one thread that the adapter owns; calls queue for it, each
with a deadline. Watches sleep until a commit, by whichever process, touches a file beside the
database (`wakeup`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from serverlessllm.core.errors import MetadataUnavailable
from serverlessllm.metadata.base import Change, Entry, LeaseId, Listing, Revision
from serverlessllm.metadata.database import Batch, Database, NewerLayout
from serverlessllm.metadata.wakeup import Listener, touch
from serverlessllm.telemetry.guard import keep_running
from serverlessllm.telemetry.logs import log
from serverlessllm.telemetry.table import METADATA_FAILURES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serverlessllm.core.clock import Clock
    from serverlessllm.metadata.settings import MetadataSettings

_log = log("metadata")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BUSY_SHARE = 0.75
"""Of a call's time, for other processes' transactions: the rest is left to say what is wrong."""

T = TypeVar("T")

_CURES = {
    sqlite3.SQLITE_BUSY: "another process holds the database: see who with `fuser -v metadata.db`",
    sqlite3.SQLITE_LOCKED: "another process holds the database: see who with `fuser -v "
    "metadata.db`",
    sqlite3.SQLITE_READONLY: "it cannot be written: give this user the data directory",
    sqlite3.SQLITE_PERM: "it cannot be written: give this user the data directory",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: is the data directory there, and this user's?",
    sqlite3.SQLITE_FULL: "its disk is full: free some space",
    sqlite3.SQLITE_IOERR: "its disk fails or is full: see the kernel's log",
    sqlite3.SQLITE_CORRUPT: "it is damaged: stop all processes, move metadata.db* away, register "
    "the models again (their checkpoints stay in the store)",
    sqlite3.SQLITE_NOTADB: "metadata.db is not a database: stop all processes, move it away",
}


class SqliteMetadata:
    """The seam over one file. Opened by the first call, again by the next after a failure."""

    def __init__(
        self, path: Path, settings: MetadataSettings, clock: Clock, *, boot: str | None = None
    ) -> None:
        """`boot` names the machine's boot, where it is not to be read from the kernel."""
        self._path = path
        self._wake_path = path.with_name(f"{path.name}.wake")
        self._settings = settings
        self._clock = clock
        self._boot = boot
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metadata")
        self._database: Database | None = None
        self._waiting = 0
        self._closed = False
        self._listener: Listener | None = None
        self._wakes: set[asyncio.Event] = set()
        self._reaper: asyncio.Task[None] | None = None

    async def get(self, key: str) -> Entry | None:
        return await self._call("get", lambda db: db.get(key))

    async def list(self, prefix: str) -> Listing:
        return await self._call("list", lambda db: db.list(prefix))

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expect_revision: Revision | None = None,
        lease: LeaseId | None = None,
    ) -> Revision:
        return await self._call("put", lambda db: db.put(key, value, expect_revision, lease))

    async def delete(self, key: str, *, expect_revision: Revision | None = None) -> bool:
        return await self._call("delete", lambda db: db.delete(key, expect_revision))

    async def watch(self, prefix: str, from_revision: Revision) -> AsyncGenerator[Change, None]:
        with self._awake() as wake:
            revision = from_revision
            while True:
                wake.clear()
                batch = await self._changes(prefix, revision)
                for change in batch.changes:
                    yield change
                revision = batch.revision
                if not batch.more:
                    await wake.wait()

    async def _changes(self, prefix: str, after: Revision) -> Batch:
        count_max = self._settings.changes_batch_max
        return await self._call("watch", lambda db: db.changes(prefix, after, count_max))

    async def lease(self, ttl_s: float) -> LeaseId:
        self._listen()
        return await self._call("lease", lambda db: db.lease(ttl_s))

    async def keep_alive(self, lease: LeaseId) -> None:
        await self._call("keep_alive", lambda db: db.keep_alive(lease))

    async def revoke(self, lease: LeaseId) -> None:
        await self._call("revoke", lambda db: db.revoke(lease))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        self._wake()
        closing = self._thread.submit(self._drop)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.call_timeout_s):
                await asyncio.wrap_future(closing)
        self._thread.shutdown(wait=False)

    async def _call(self, verb: str, work: Callable[[Database], T]) -> T:
        """Run `work` on the database, in its thread, within the deadline.

        Who is cancelled while the work runs does not know whether it was done; work that had not
        begun is not done.
        """
        if self._closed:
            raise MetadataUnavailable("the metadata store is closed: this server shuts down")
        if self._waiting >= self._settings.calls_waiting_max:
            METADATA_FAILURES.inc(verb, "busy")
            raise MetadataUnavailable("too many calls wait for the metadata store")
        self._waiting += 1
        try:
            # The loop's own timer: what is waited for is a disk, in real time.
            async with asyncio.timeout(self._settings.call_timeout_s):
                return await asyncio.wrap_future(self._thread.submit(self._run, work))
        except TimeoutError:
            METADATA_FAILURES.inc(verb, "timeout")
            raise MetadataUnavailable(
                f"the metadata store did not answer in {self._settings.call_timeout_s:g} s: "
                "its disk is slow, or another process holds it"
            ) from None
        except (sqlite3.Error, OSError, NewerLayout) as error:
            METADATA_FAILURES.inc(verb, type(error).__name__)
            _log.warning("metadata store failed", path=str(self._path), reason=str(error))
            raise _unavailable(error) from error
        finally:
            self._waiting -= 1

    def _run(self, work: Callable[[Database], T]) -> T:
        """In the thread."""
        if self._database is None:
            self._database = Database(
                self._path,
                now_s=self._clock.now_s,
                boot=self._boot or _BOOT_ID.read_text().strip(),
                busy_timeout_s=self._settings.call_timeout_s * _BUSY_SHARE,
                changes_kept_max=self._settings.changes_kept_max,
            )
        try:
            return work(self._database)
        except sqlite3.Error as error:
            if _code(error) != sqlite3.SQLITE_BUSY:
                self._drop()  # what is wrong may be cured: the next call opens it again
            raise
        finally:
            self._tell()

    def _tell(self) -> None:
        """In the thread: wake whoever waits for what was just committed."""
        database = self._database
        if database is not None and database.take_news():
            with suppress(OSError):  # committed all the same; the next commit wakes them
                touch(self._wake_path)

    def _drop(self) -> None:
        """In the thread."""
        database, self._database = self._database, None
        if database is not None:
            with suppress(sqlite3.Error):
                database.close()

    @contextmanager
    def _awake(self) -> Iterator[asyncio.Event]:
        """An event that every commit sets."""
        self._listen()
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            yield wake
        finally:
            self._wakes.discard(wake)

    def _listen(self) -> None:
        """Hear of commits from now on, and delete what runs out: once there is who needs it."""
        if self._closed or self._listener is not None:
            return
        try:
            self._listener = Listener(self._wake_path, self._wake)
        except OSError as error:
            raise MetadataUnavailable(
                "changes of the metadata store cannot be watched (inotify): is the data directory "
                "there and writable, and fs.inotify.max_user_instances high enough?"
            ) from error
        kept = keep_running(
            "reaper",
            self._reap,
            out=_log,
            clock=self._clock,
            restart_s=self._settings.reap_retry_s,
        )
        self._reaper = asyncio.create_task(kept, name="metadata reaper")

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    async def _reap(self) -> None:
        """Delete the keys of each lease at its deadline, so that watchers hear of it."""
        with self._awake() as wake:
            while True:
                wake.clear()
                try:
                    deadline_s = await self._call("expire", Database.expire)
                except MetadataUnavailable:
                    await self._clock.sleep(self._settings.reap_retry_s)
                    continue
                await self._wait_until(deadline_s, wake)

    async def _wait_until(self, deadline_s: float | None, wake: asyncio.Event) -> None:
        """Until the deadline, or until a commit that may have brought a nearer one."""
        if deadline_s is None:
            await wake.wait()
            return
        async with asyncio.TaskGroup() as group:
            timer = group.create_task(self._set_at(deadline_s, wake), name="metadata deadline")
            await wake.wait()
            timer.cancel()

    async def _set_at(self, deadline_s: float, wake: asyncio.Event) -> None:
        left_s = deadline_s - self._clock.now_s()
        if left_s > 0:
            await self._clock.sleep(left_s)
        wake.set()


def _unavailable(error: sqlite3.Error | OSError | NewerLayout) -> MetadataUnavailable:
    if isinstance(error, NewerLayout):
        cure = "a newer version of this program made it: upgrade this one"
    elif isinstance(error, OSError):
        cure = f"it cannot be opened ({error.strerror}): is the data directory there, and writable?"
    else:
        cure = _CURES.get(_code(error), f"SQLite fails with {type(error).__name__}")
    return MetadataUnavailable(f"the metadata store cannot be used: {cure}", retry_after_s=5.0)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for an error of Python's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF

"""The SQLite file behind `SqliteMetadata`: blocking, used by one thread.

Several processes of one machine share the file (WAL). A change is one transaction: the revision
counter, the entry, the change log. Deadlines of leases are moments of the clock that all
processes of a boot share; after another boot every lease has run out. Whoever comes across a
lease that has run out deletes its keys, so nobody ever sees them.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import msgspec

from serverlessllm.metadata.base import (
    ABSENT,
    Change,
    Entry,
    LeaseId,
    LeaseLost,
    Listing,
    Revision,
    RevisionMismatch,
)

LAYOUT_VERSION = 1
_LAYOUT = """
CREATE TABLE IF NOT EXISTS state (
    only INTEGER PRIMARY KEY CHECK (only = 1), revision INTEGER NOT NULL, boot TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, lease TEXT
);
CREATE INDEX IF NOT EXISTS entries_by_lease ON entries (lease) WHERE lease IS NOT NULL;
CREATE TABLE IF NOT EXISTS leases (
    id TEXT PRIMARY KEY, ttl_s REAL NOT NULL, deadline_s REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leases_by_deadline ON leases (deadline_s);
CREATE TABLE IF NOT EXISTS changes (
    revision INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB
);
INSERT OR IGNORE INTO state VALUES (1, 0, '');
"""
_AFTER_EVERY_KEY = "\U0010ffff"


class NewerLayout(Exception):
    """A newer version of this program made the file."""


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Some changes after a revision, up to and including `revision`; `more` wait behind."""

    changes: tuple[Change, ...]
    revision: Revision
    more: bool


class Database:
    """One connection. Raises sqlite3.Error, OSError and NewerLayout beside what the seam names."""

    def __init__(
        self,
        path: Path,
        *,
        now_s: Callable[[], float],
        boot: str,
        busy_timeout_s: float,
        changes_kept_max: int,
    ) -> None:
        self._now_s = now_s
        self._boot = boot
        self._kept = changes_kept_max
        self._durable = False
        self._news = False
        # Made here so that nobody else may read it: SQLite gives its side files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(
            path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            self._open(busy_timeout_s)
        except BaseException:
            self._db.close()
            raise

    def _open(self, busy_timeout_s: float) -> None:
        self._enter_wal(busy_timeout_s)
        self._db.execute("PRAGMA synchronous=NORMAL")
        if not self._ready():  # opening what is in order waits for no writer
            with self._transaction():
                self._prepare()

    def _ready(self) -> bool:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > LAYOUT_VERSION:
            raise NewerLayout(f"layout {version}, this program knows {LAYOUT_VERSION}")
        if version < LAYOUT_VERSION:
            return False
        (boot,) = self._db.execute("SELECT boot FROM state").fetchone()
        return bool(boot == self._boot)

    def _prepare(self) -> None:
        for statement in _LAYOUT.split(";"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version={LAYOUT_VERSION}")
        (boot,) = self._db.execute("SELECT boot FROM state").fetchone()
        if boot != self._boot:
            self._end_leases("SELECT id FROM leases", ())
            self._db.execute("UPDATE state SET boot=?", (self._boot,))

    def _enter_wal(self, busy_timeout_s: float) -> None:
        # SQLite does not wait when two processes change the mode of a new file at once.
        give_up_s = time.monotonic() + busy_timeout_s
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_s:
                    raise
                time.sleep(0.005)  # this thread's only work; nothing announces the mode's change
            else:
                return

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        """Write. `durable` survives a power cut; what hangs on a lease need not: no lease does."""
        if durable != self._durable:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One moment of the database for several reads."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def get(self, key: str) -> Entry | None:
        self.expire()
        row = self._db.execute(
            "SELECT key, value, revision FROM entries WHERE key=?", (key,)
        ).fetchone()
        return None if row is None else _entry(row)

    def list(self, prefix: str) -> Listing:
        self.expire()
        with self._reading():
            rows = self._db.execute(
                "SELECT key, value, revision FROM entries WHERE key>=? AND key<? ORDER BY key",
                (prefix, prefix + _AFTER_EVERY_KEY),
            ).fetchall()
            return Listing(entries=tuple(map(_entry, rows)), revision=self._revision())

    def put(
        self, key: str, value: bytes, expect_revision: Revision | None, lease: LeaseId | None
    ) -> Revision:
        self.expire()
        with self._transaction(durable=lease is None):
            if lease is not None and not self._alive(lease):
                raise LeaseLost(lease)
            self._expect(key, expect_revision)
            revision = self._record(key, value)
            self._db.execute(
                "INSERT INTO entries (key, value, revision, lease) VALUES (?,?,?,?) "
                "ON CONFLICT (key) DO UPDATE SET "
                "value=excluded.value, revision=excluded.revision, lease=excluded.lease",
                (key, value, revision, lease),
            )
        return revision

    def delete(self, key: str, expect_revision: Revision | None) -> bool:
        self.expire()
        with self._transaction(durable=True):
            if self._revision_of(key) == ABSENT:
                return False
            self._expect(key, expect_revision)
            self._remove(key)
        return True

    def lease(self, ttl_s: float) -> LeaseId:
        lease = LeaseId(uuid4().hex)
        with self._transaction():
            self._db.execute(
                "INSERT INTO leases VALUES (?,?,?)", (lease, ttl_s, self._now_s() + ttl_s)
            )
            self._news = True  # its deadline may be the next
        return lease

    def keep_alive(self, lease: LeaseId) -> None:
        self.expire()
        with self._transaction():
            now_s = self._now_s()
            kept = self._db.execute(
                "UPDATE leases SET deadline_s=?+ttl_s WHERE id=? AND deadline_s>?",
                (now_s, lease, now_s),
            )
        if kept.rowcount == 0:
            raise LeaseLost(lease)

    def revoke(self, lease: LeaseId) -> None:
        with self._transaction():
            self._end_leases("SELECT id FROM leases WHERE id=?", (lease,))

    def changes(self, prefix: str, after: Revision, count_max: int) -> Batch:
        """Changes under `prefix` after a revision; one with key "" when the log has lost some."""
        self.expire()
        with self._reading():
            newest = self._revision()
            (oldest,) = self._db.execute("SELECT min(revision) FROM changes").fetchone()
            if after > newest or (after < newest and after + 1 < (oldest or newest + 1)):
                missed = Change(key="", value=None, revision=newest)
                return Batch(changes=(missed,), revision=newest, more=False)
            rows = self._db.execute(
                "SELECT key, value, revision FROM changes "
                "WHERE revision>? AND key>=? AND key<? ORDER BY revision LIMIT ?",
                (after, prefix, prefix + _AFTER_EVERY_KEY, count_max),
            ).fetchall()
        more = len(rows) == count_max
        return Batch(
            changes=tuple(Change(key=k, value=v, revision=Revision(r)) for k, v, r in rows),
            revision=Revision(rows[-1][2]) if more else newest,
            more=more,
        )

    def expire(self) -> float | None:
        """Delete the keys of leases that ran out; the next deadline, None without leases."""
        now_s = self._now_s()
        (deadline_s,) = self._db.execute("SELECT min(deadline_s) FROM leases").fetchone()
        if deadline_s is None or deadline_s > now_s:
            return None if deadline_s is None else float(deadline_s)
        with self._transaction():
            self._end_leases("SELECT id FROM leases WHERE deadline_s<=?", (now_s,))
        (deadline_s,) = self._db.execute("SELECT min(deadline_s) FROM leases").fetchone()
        return None if deadline_s is None else float(deadline_s)

    def take_news(self) -> bool:
        """Whether something was committed since the last call that others wait for."""
        news, self._news = self._news, False
        return news

    def _end_leases(self, which: str, values: tuple[object, ...]) -> None:
        keys = self._db.execute(
            f"SELECT key FROM entries WHERE lease IN ({which}) ORDER BY key",  # noqa: S608 - ours
            values,
        ).fetchall()
        for (key,) in keys:
            self._remove(key)
        self._db.execute(f"DELETE FROM leases WHERE id IN ({which})", values)  # noqa: S608 - ours

    def _remove(self, key: str) -> None:
        self._record(key, None)
        self._db.execute("DELETE FROM entries WHERE key=?", (key,))

    def _record(self, key: str, value: bytes | None) -> Revision:
        """Take the next revision and log the change under it."""
        self._news = True
        revision = Revision(self._revision() + 1)
        self._db.execute("UPDATE state SET revision=?", (revision,))
        self._db.execute("INSERT INTO changes VALUES (?,?,?)", (revision, key, value))
        self._db.execute("DELETE FROM changes WHERE revision<=?", (revision - self._kept,))
        return revision

    def _revision(self) -> Revision:
        (revision,) = self._db.execute("SELECT revision FROM state").fetchone()
        return Revision(revision)

    def _revision_of(self, key: str) -> Revision:
        row = self._db.execute("SELECT revision FROM entries WHERE key=?", (key,)).fetchone()
        return ABSENT if row is None else Revision(row[0])

    def _expect(self, key: str, expect_revision: Revision | None) -> None:
        if expect_revision is not None and self._revision_of(key) != expect_revision:
            raise RevisionMismatch(key)

    def _alive(self, lease: LeaseId) -> bool:
        row = self._db.execute("SELECT deadline_s FROM leases WHERE id=?", (lease,)).fetchone()
        return row is not None and row[0] > self._now_s()


def _entry(row: tuple[str, bytes, int]) -> Entry:
    return Entry(key=row[0], value=row[1], revision=Revision(row[2]))

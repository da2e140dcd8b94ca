"""A database that is broken, held, read-only, full, or from another time: what the caller hears."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import MetadataUnavailable
from serverlessllm.metadata.base import ABSENT, LeaseLost
from serverlessllm.metadata.database import Database
from serverlessllm.metadata.open import open_metadata
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.descriptors import open_descriptors

Open = Callable[..., SqliteMetadata]
QUICK = MetadataSettings(call_timeout_s=0.4)
PATIENT = MetadataSettings(call_timeout_s=20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metadata.db"


@pytest.fixture
async def open_store(path: Path) -> AsyncIterator[Open]:
    stores: list[SqliteMetadata] = []

    def make(
        settings: MetadataSettings = PATIENT, clock: VirtualClock | None = None, boot: str = "b"
    ) -> SqliteMetadata:
        stores.append(SqliteMetadata(path, settings, clock or SystemClock(), boot=boot))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


async def test_a_file_that_is_no_database(path: Path, open_store: Open) -> None:
    path.write_bytes(b"this is a text, not a database. " * 200)
    store = open_store()
    with pytest.raises(MetadataUnavailable, match="not a database") as failed:
        await store.get("k")
    assert str(path) not in failed.value.message
    # Moved away, as it said: the next call opens a new one.
    path.unlink()
    assert await store.put("k", b"1", expect_revision=ABSENT)


async def test_leases_run_out_after_a_bug_of_who_ends_them(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    expire = Database.expire
    bugs = [ValueError("a bug")]

    def once_wrong(database: Database) -> float | None:
        if bugs:
            raise bugs.pop()
        return expire(database)

    monkeypatch.setattr(Database, "expire", once_wrong)
    store = open_store(MetadataSettings(reap_retry_s=0.01))
    written = await store.put("k", b"1", lease=await store.lease(0.1))
    async with asyncio.timeout(60), aclosing(store.watch("k", written)) as changes:
        assert (await anext(changes)).key == "k"
    assert not bugs


async def test_a_damaged_database(path: Path, open_store: Open) -> None:
    store = open_store()
    for i in range(50):
        await store.put(f"key-{i}", bytes(3000))
    await store.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    store = open_store()
    with pytest.raises(MetadataUnavailable, match="damaged"):
        await store.list("")


async def test_another_process_holds_it_too_long(path: Path, open_store: Open) -> None:
    store = open_store(QUICK)
    await store.put("k", b"1")
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(MetadataUnavailable, match="another process holds"):
            await store.put("k", b"2")
        entry = await store.get("k")  # readers do not wait for writers
        assert entry is not None
        assert entry.value == b"1"
        holder.execute("ROLLBACK")
    holder.close()
    await store.put("k", b"3")


async def test_calls_that_wait_are_bounded_and_end_in_time(path: Path, open_store: Open) -> None:
    store = open_store(MetadataSettings(call_timeout_s=0.4, calls_waiting_max=3))
    await store.put("k", b"1")
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        results = await asyncio.gather(
            *(store.put("k", b"2") for _ in range(5)), return_exceptions=True
        )
        holder.execute("ROLLBACK")
    holder.close()
    assert all(isinstance(r, MetadataUnavailable) for r in results)
    assert sum("too many" in str(r) for r in results) == 2


async def test_it_cannot_be_opened(path: Path, open_store: Open) -> None:
    """A folder where the file should be: also root cannot open that."""
    path.mkdir()
    store = open_store()
    with pytest.raises(MetadataUnavailable, match="data directory"):
        await store.put("k", b"1")
    path.rmdir()
    await store.put("k", b"1")


async def test_the_data_directory_is_missing(tmp_path: Path) -> None:
    store = SqliteMetadata(tmp_path / "none" / "metadata.db", PATIENT, SystemClock())
    with pytest.raises(MetadataUnavailable, match="data directory"):
        await store.get("k")
    with pytest.raises(MetadataUnavailable, match="data directory"):
        await anext(store.watch("", ABSENT))
    (tmp_path / "none").mkdir()
    await store.put("k", b"1")
    await store.close()


async def test_a_full_disk_loses_nothing_that_was_there(path: Path, open_store: Open) -> None:
    store = open_store()
    await store.put("k", b"1")

    def shrink() -> None:
        database = store._database
        assert database is not None
        database._db.execute("PRAGMA max_page_count=20")

    await asyncio.wrap_future(store._thread.submit(shrink))
    with pytest.raises(MetadataUnavailable, match="full"):
        await store.put("large", bytes(1_000_000))
    entry = await store.get("k")
    assert entry is not None
    assert await store.get("large") is None
    await store.put("k", b"2", expect_revision=entry.revision)


async def test_a_newer_version_made_it(path: Path, open_store: Open) -> None:
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version=99")
    other.close()
    with pytest.raises(MetadataUnavailable, match="newer version"):
        await open_store().get("k")


async def test_another_boot_ends_every_lease(open_store: Open) -> None:
    """The monotonic clock starts anew at boot: old deadlines mean nothing."""
    clock = VirtualClock(now_s=1_000_000)
    before = open_store(clock=clock, boot="first")
    lease = await before.lease(1_000_000)
    await before.put("agents/a", b"1", lease=lease)
    await before.put("models/m", b"1")
    newest = (await before.list("")).revision
    await before.close()

    after = open_store(clock=VirtualClock(now_s=5), boot="second")
    listing = await after.list("")
    assert [e.key for e in listing.entries] == ["models/m"]
    assert listing.revision == newest + 1
    with pytest.raises(LeaseLost):
        await after.keep_alive(lease)


async def test_the_same_boot_keeps_leases_across_a_restart(open_store: Open) -> None:
    clock = VirtualClock()
    before = open_store(clock=clock)
    lease = await before.lease(10)
    await before.put("agents/a", b"1", lease=lease)
    await before.close()
    after = open_store(clock=clock)
    await after.keep_alive(lease)
    assert await after.get("agents/a") is not None


async def test_only_its_user_may_read_it(path: Path, open_store: Open) -> None:
    store = open_store()
    lease = await store.lease(100)
    await store.put("k", b"1", lease=lease)
    modes = {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()}
    assert modes == dict.fromkeys(modes, 0o600)
    assert {"metadata.db", "metadata.db-wal", "metadata.db.wake"} <= set(modes)


async def test_it_gives_back_what_it_took(path: Path) -> None:
    descriptors, tasks = open_descriptors(), asyncio.all_tasks()
    store = SqliteMetadata(path, PATIENT, SystemClock())
    await store.lease(100)
    assert any(str(path) in opened for opened in open_descriptors() - descriptors)
    await store.close()
    assert open_descriptors() <= descriptors
    assert asyncio.all_tasks() <= tasks
    assert {p.name for p in path.parent.iterdir()} == {"metadata.db", "metadata.db.wake"}


async def test_urls(tmp_path: Path) -> None:
    store = open_metadata(f"sqlite://{tmp_path}/a b%20.db", PATIENT, SystemClock())
    await store.put("k", b"1")
    await store.close()
    assert (tmp_path / "a b%20.db").exists()
    for url in ("sqlite://host/file", "sqlite:", "sqlite://", "", "/path/to/file"):
        with pytest.raises(ValueError, match="sqlite"):
            open_metadata(url, PATIENT, SystemClock())
    for url in ("redis://localhost", "etcd://localhost:2379"):
        with pytest.raises(ValueError, match="this build has only sqlite"):
            open_metadata(url, PATIENT, SystemClock())

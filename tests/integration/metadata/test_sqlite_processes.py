"""Several real processes on one database: racing, watching each other, dying in mid-write."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import JobRecord
from serverlessllm.core.ids import ModelId
from serverlessllm.metadata.base import ABSENT
from serverlessllm.metadata.registry import JobClaim, Registry
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata

SETTINGS = MetadataSettings(call_timeout_s=20)
PATIENCE_S = 30.0

PRELUDE = """
import asyncio, sys
from pathlib import Path
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import ModelId
from serverlessllm.metadata.base import ABSENT, RevisionMismatch
from serverlessllm.metadata.registry import JobClaim, Registry
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata

store = SqliteMetadata(Path(sys.argv[1]), MetadataSettings(call_timeout_s=20), SystemClock())

def say(word):
    print(word, flush=True)
"""

HOLD_A_LEASE = """
async def main():
    lease = await store.lease(float(sys.argv[2]))
    await store.put("agents/a", b"1", lease=lease)
    say("holding")
    await asyncio.Event().wait()
"""

WRITE_FOR_EVER = """
async def main():
    say("writing")
    n = 0
    while True:
        n += 1
        await store.put("a", b"%d" % n + bytes(20_000))
        await store.put("b", b"%d" % n + bytes(20_000))
        if n % 20 == 0:
            say(str(n))
"""

DIE_IN_A_TRANSACTION = """
async def main():
    await store.put("k", b"before")
    def half():
        db = store._database._db
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE state SET revision=revision+1000")
        db.execute("UPDATE entries SET value=?", (bytes(3_000_000),))
    await asyncio.wrap_future(store._thread.submit(half))
    say("halfway")
    await asyncio.Event().wait()
"""

CLAIM = """
async def main():
    say("ready")
    sys.stdin.readline()
    taken = await Registry(store).claim_job(ModelId("m"), sys.argv[2], 60)
    say("won" if isinstance(taken, JobClaim) else taken.owner)
    sys.stdin.readline()
    await store.close()
"""

COUNT = """
async def main():
    for _ in range(int(sys.argv[2])):
        while True:
            entry = await store.get("n")
            at, n = (entry.revision, int(entry.value)) if entry else (ABSENT, 0)
            try:
                await store.put("n", b"%d" % (n + 1), expect_revision=at)
                break
            except RevisionMismatch:
                pass
    say("done")
    await store.close()
"""


class Child:
    """One process, spoken to by lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await self.process.stdout.readline()).decode().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def child(code: str, path: Path, *arguments: str) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"{PRELUDE}{code}\nasyncio.run(main())",
        str(path),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metadata.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteMetadata]:
    store = SqliteMetadata(path, SETTINGS, SystemClock())
    yield store
    await store.close()


async def test_the_lease_of_a_killed_process_runs_out_and_watchers_hear(
    path: Path, store: SqliteMetadata
) -> None:
    async with (
        child(HOLD_A_LEASE, path, "3") as owner,
        aclosing(store.watch("", ABSENT)) as watch,
    ):
        assert await owner.line() == "holding"
        async with asyncio.timeout(PATIENCE_S):
            put = await anext(watch)
            assert (put.key, put.value) == ("agents/a", b"1")
            await owner.kill()
            gone = await anext(watch)
        assert (gone.key, gone.value) == ("agents/a", None)
        assert await store.get("agents/a") is None


@pytest.mark.parametrize("rounds", [2, 5])
async def test_killed_at_any_moment_nothing_is_half_written(
    path: Path, store: SqliteMetadata, rounds: int
) -> None:
    async with child(WRITE_FOR_EVER, path) as writer:
        for _ in range(rounds):
            await writer.line()
        await writer.kill()
    a, b = await store.get("a"), await store.get("b")
    assert a is not None
    assert b is not None
    n, m = int(a.value.rstrip(b"\0")), int(b.value.rstrip(b"\0"))
    assert m in (n, n - 1)
    listing = await store.list("")
    assert listing.revision == max(a.revision, b.revision) == n + m
    async with aclosing(store.watch("", ABSENT)) as watch:
        seen = [await anext(watch) for _ in range(n + m)]
    assert [c.revision for c in seen] == list(range(1, n + m + 1))
    await store.put("a", b"", expect_revision=a.revision)


async def test_killed_in_mid_transaction_it_never_was(path: Path, store: SqliteMetadata) -> None:
    async with child(DIE_IN_A_TRANSACTION, path) as writer:
        assert await writer.line() == "halfway"
        entry = await store.get("k")
        assert entry is not None
        assert (entry.value, entry.revision) == (b"before", 1)
        await writer.kill()
    assert await store.put("k", b"after", expect_revision=entry.revision) == 2


async def test_eight_processes_claim_and_one_wins(path: Path, store: SqliteMetadata) -> None:
    """The file is made by all of them at once, too."""
    names = [f"p{i}" for i in range(8)]
    children = [child(CLAIM, path, name) for name in names]
    opened = [await c.__aenter__() for c in children]
    try:
        for one in opened:
            assert await one.line() == "ready"
        for one in opened:
            one.tell()
        said = [await one.line() for one in opened]
        assert said.count("won") == 1
        winner = names[said.index("won")]
        assert set(said) == {"won", winner}
        job = await Registry(store).get_job(ModelId("m"))
        assert job is not None
        assert job.owner == winner
        for one in opened:
            one.tell()
    finally:
        for c in children:
            await c.__aexit__(None, None, None)


async def test_no_update_is_lost_between_processes(path: Path, store: SqliteMetadata) -> None:
    async with child(COUNT, path, "60") as one, child(COUNT, path, "60") as two:
        assert await one.line() == "done"
        assert await two.line() == "done"
    entry = await store.get("n")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"120", 120)


async def test_a_job_is_taken_over_from_a_killed_process(path: Path, store: SqliteMetadata) -> None:
    registry = Registry(store)
    claim_briefly = CLAIM.replace("60)", "3)")
    async with child(claim_briefly, path, "first") as owner:
        assert await owner.line() == "ready"
        owner.tell()
        assert await owner.line() == "won"
        held = await registry.claim_job(ModelId("m"), "second", 60)
        assert isinstance(held, JobRecord)
        assert held.owner == "first"
        async with aclosing(registry.watch((await registry.snapshot()).revision)) as watch:
            await owner.kill()
            async with asyncio.timeout(PATIENCE_S):
                await anext(watch)  # nobody polls: the end of its lease is an event
    taken = await registry.claim_job(ModelId("m"), "second", 60)
    assert isinstance(taken, JobClaim)
    assert taken.epoch > held.epoch


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_both_loops_hear_of_commits(path: Path, loop: str) -> None:
    import uvloop

    async def main() -> bytes | None:
        one = SqliteMetadata(path, SETTINGS, SystemClock())
        two = SqliteMetadata(path, SETTINGS, SystemClock())
        try:
            async with aclosing(two.watch("", ABSENT)) as watch:
                waiting = asyncio.ensure_future(anext(watch))
                await one.put("k", b"1")
                async with asyncio.timeout(PATIENCE_S):
                    return (await waiting).value
        finally:
            await one.close()
            await two.close()

    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(main()) == b"1"

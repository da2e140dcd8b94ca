"""What every metadata adapter must do, sentence by sentence of `metadata/base.py`.

An adapter's test file subclasses `MetadataContract` and gives the fixture `harness`; time passes
by `harness.pass_time`, which for a real server is real time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

import pytest

from serverlessllm.core.errors import MetadataUnavailable
from serverlessllm.metadata.base import (
    ABSENT,
    Change,
    LeaseId,
    LeaseLost,
    Metadata,
    Revision,
    RevisionMismatch,
)

PATIENCE_S = 20.0
"""Real time after which a watch that says nothing has failed the test."""


class MetadataHarness(Protocol):
    """One store, empty at first, and its time."""

    ttl_s: float
    """A lease short enough for a test and long enough for the adapter."""

    def open(self) -> Metadata:
        """One more client of the store; the harness closes it at the end."""
        ...

    async def pass_time(self, seconds: float) -> None: ...

    async def compact(self) -> None:
        """Make the store forget its oldest changes."""
        ...


async def take(watch: AsyncIterator[Change], count: int) -> list[Change]:
    """The next `count` changes of a watch."""
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(watch) for _ in range(count)]


async def listening(watch: AsyncGenerator[Change, None]) -> asyncio.Task[Change]:
    """A task that waits for the watch's next change, and has begun to."""
    task: asyncio.Task[Change] = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)  # its first step
    return task


class _Clients:
    @pytest.fixture
    def one(self, harness: MetadataHarness) -> Metadata:
        return harness.open()

    @pytest.fixture
    def two(self, harness: MetadataHarness) -> Metadata:
        return harness.open()


class _Entries(_Clients):
    async def test_a_key_is_what_was_put(self, one: Metadata, two: Metadata) -> None:
        assert await one.get("models/a") is None
        revision = await one.put("models/a", b"1")
        found = await two.get("models/a")
        assert found is not None
        assert (found.key, found.value, found.revision) == ("models/a", b"1", revision)

    @pytest.mark.parametrize("value", [b"", b"\x00\xff\n", bytes(range(256)) * 400])
    async def test_values_are_bytes(self, one: Metadata, value: bytes) -> None:
        await one.put("k", value)
        found = await one.get("k")
        assert found is not None
        assert found.value == value

    async def test_each_change_gets_a_higher_revision(self, one: Metadata, two: Metadata) -> None:
        first = await one.put("a", b"1")
        second = await two.put("b", b"1")
        third = await one.put("a", b"2")
        assert ABSENT < first < second < third
        assert (await two.list("")).revision == third
        await two.delete("a")
        assert (await one.list("")).revision > third

    async def test_put_at_the_expected_revision_only(self, one: Metadata) -> None:
        first = await one.put("k", b"1", expect_revision=ABSENT)
        with pytest.raises(RevisionMismatch):
            await one.put("k", b"2", expect_revision=ABSENT)
        second = await one.put("k", b"2", expect_revision=first)
        with pytest.raises(RevisionMismatch):
            await one.put("k", b"3", expect_revision=first)
        with pytest.raises(RevisionMismatch):
            await one.put("missing", b"3", expect_revision=first)
        found = await one.get("k")
        assert found is not None
        assert (found.value, found.revision) == (b"2", second)
        assert (await one.list("")).revision == second

    async def test_of_eight_creators_one_wins(self, harness: MetadataHarness) -> None:
        clients = [harness.open() for _ in range(8)]
        results = await asyncio.gather(
            *(c.put("k", b"%d" % i, expect_revision=ABSENT) for i, c in enumerate(clients)),
            return_exceptions=True,
        )
        winners = [i for i, r in enumerate(results) if isinstance(r, int)]
        assert len(winners) == 1
        assert sum(isinstance(r, RevisionMismatch) for r in results) == 7
        found = await clients[0].get("k")
        assert found is not None
        assert found.value == b"%d" % winners[0]

    async def test_compare_and_swap_loses_no_update(self, harness: MetadataHarness) -> None:
        async def count_up(client: Metadata) -> None:
            done = 0
            while done < 10:
                entry = await client.get("n")
                value, at = (entry.value, entry.revision) if entry else (b"0", ABSENT)
                try:
                    await client.put("n", b"%d" % (int(value) + 1), expect_revision=at)
                except RevisionMismatch:
                    continue
                done += 1

        clients = [harness.open() for _ in range(4)]
        await asyncio.gather(*map(count_up, clients))
        found = await clients[0].get("n")
        assert found is not None
        assert found.value == b"40"

    async def test_delete_says_whether_the_key_existed(self, one: Metadata) -> None:
        revision = await one.put("k", b"1")
        with pytest.raises(RevisionMismatch):
            await one.delete("k", expect_revision=Revision(revision + 1))
        assert await one.delete("k", expect_revision=revision)
        assert await one.get("k") is None
        assert not await one.delete("k")
        assert not await one.delete("k", expect_revision=revision)
        assert await one.put("k", b"2", expect_revision=ABSENT) > revision

    async def test_a_prefix_is_of_text_and_listings_are_sorted(self, one: Metadata) -> None:
        keys = ["models/b", "models/a/x", "models/ab", "models/a", "model", "models/é", "z"]
        for key in keys:
            await one.put(key, key.encode())
        listing = await one.list("models/a")
        assert [e.key for e in listing.entries] == ["models/a", "models/a/x", "models/ab"]
        assert [e.value for e in listing.entries] == [b"models/a", b"models/a/x", b"models/ab"]
        assert [e.key for e in (await one.list("")).entries] == sorted(keys)
        assert [e.key for e in (await one.list("models/é")).entries] == ["models/é"]
        assert (await one.list("nothing/")).entries == ()
        assert (await one.list("nothing/")).revision == listing.revision


class _Leases(_Clients):
    async def test_keys_live_as_long_as_their_lease(
        self, harness: MetadataHarness, one: Metadata, two: Metadata
    ) -> None:
        lease = await one.lease(harness.ttl_s)
        await one.put("agents/a", b"1", lease=lease)
        await one.put("models/a", b"1")
        await harness.pass_time(harness.ttl_s * 0.6)
        await one.keep_alive(lease)
        await harness.pass_time(harness.ttl_s * 0.6)
        assert await two.get("agents/a") is not None
        await harness.pass_time(harness.ttl_s * 2)
        assert await two.get("agents/a") is None
        assert await two.get("models/a") is not None
        with pytest.raises(LeaseLost):
            await one.keep_alive(lease)
        with pytest.raises(LeaseLost):
            await one.put("agents/a", b"2", lease=lease)
        assert await two.put("agents/a", b"3", expect_revision=ABSENT)

    async def test_a_dead_owner_is_noticed_by_others(
        self, harness: MetadataHarness, one: Metadata, two: Metadata
    ) -> None:
        await one.put("agents/a", b"1", lease=await one.lease(harness.ttl_s))
        await one.close()
        assert await two.get("agents/a") is not None
        await harness.pass_time(harness.ttl_s * 2)
        assert (await two.list("agents/")).entries == ()

    async def test_a_put_binds_the_key_anew(self, harness: MetadataHarness, one: Metadata) -> None:
        first, second = await one.lease(harness.ttl_s), await one.lease(harness.ttl_s)
        for key in ("kept", "moved", "gone"):
            await one.put(key, b"1", lease=first)
        await one.put("kept", b"2")
        await one.put("moved", b"2", lease=second)
        await one.revoke(first)
        assert [e.key for e in (await one.list("")).entries] == ["kept", "moved"]
        await one.revoke(second)
        assert [e.key for e in (await one.list("")).entries] == ["kept"]

    async def test_revoke_is_at_once_and_again_harmless(
        self, harness: MetadataHarness, one: Metadata, two: Metadata
    ) -> None:
        lease = await one.lease(harness.ttl_s)
        await one.put("k", b"1", lease=lease)
        await two.revoke(lease)
        assert await one.get("k") is None
        await one.revoke(lease)
        with pytest.raises(LeaseLost):
            await one.keep_alive(lease)

    async def test_a_failed_put_binds_nothing(
        self, harness: MetadataHarness, one: Metadata
    ) -> None:
        await one.put("k", b"1")
        lease = await one.lease(harness.ttl_s)
        with pytest.raises(RevisionMismatch):
            await one.put("k", b"2", expect_revision=ABSENT, lease=lease)
        await one.revoke(lease)
        found = await one.get("k")
        assert found is not None
        assert found.value == b"1"

    async def test_a_lease_that_never_was_is_lost(self, one: Metadata) -> None:
        with pytest.raises(LeaseLost):
            await one.keep_alive(LeaseId("12345"))
        with pytest.raises(LeaseLost):
            await one.put("k", b"1", lease=LeaseId("12345"))
        assert await one.get("k") is None


class _Watches(_Clients):
    async def test_changes_come_in_order_from_the_revision_on(
        self, one: Metadata, two: Metadata
    ) -> None:
        start = await one.put("models/a", b"0")
        expected = []
        for i in range(5):
            expected.append(("models/a", b"%d" % i, await one.put("models/a", b"%d" % i)))
            await one.put("other", b"x")
        await one.delete("models/a")
        async with aclosing(two.watch("models/", start)) as watch:
            seen = await take(watch, 6)
        assert [(c.key, c.value, c.revision) for c in seen[:5]] == expected
        assert (seen[5].key, seen[5].value) == ("models/a", None)
        assert seen[5].revision > seen[4].revision

    async def test_a_watch_goes_on_with_what_happens(self, one: Metadata, two: Metadata) -> None:
        start = (await one.list("")).revision
        async with aclosing(two.watch("", start)) as watch:
            for i in range(5):
                waiting = await listening(watch)
                await one.put("k", b"%d" % i)
                async with asyncio.timeout(PATIENCE_S):
                    assert (await waiting).value == b"%d" % i

    async def test_a_client_sees_its_own_changes(self, one: Metadata) -> None:
        async with aclosing(one.watch("", ABSENT)) as watch:
            waiting = await listening(watch)
            revision = await one.put("k", b"1")
            async with asyncio.timeout(PATIENCE_S):
                assert await waiting == Change(key="k", value=b"1", revision=revision)

    async def test_resuming_leaves_no_gap_and_repeats_nothing(
        self, one: Metadata, two: Metadata
    ) -> None:
        for i in range(6):
            await one.put("k", b"%d" % i)
        async with aclosing(two.watch("k", ABSENT)) as watch:
            before = await take(watch, 3)
        for i in range(6, 9):
            await one.put("k", b"%d" % i)
        async with aclosing(two.watch("k", before[-1].revision)) as watch:
            after = await take(watch, 6)
        assert [c.value for c in before + after] == [b"%d" % i for i in range(9)]

    async def test_many_changes_while_nobody_reads(self, one: Metadata, two: Metadata) -> None:
        async with aclosing(two.watch("k", ABSENT)) as watch:
            await one.put("k", b"0")
            first = await take(watch, 1)
            for i in range(1, 40):
                await one.put("k", b"%d" % i)
            rest = await take(watch, 39)
        assert [c.value for c in first + rest] == [b"%d" % i for i in range(40)]

    async def test_watchers_do_not_take_from_each_other(self, one: Metadata, two: Metadata) -> None:
        async with (
            aclosing(one.watch("a", ABSENT)) as a,
            aclosing(two.watch("b", ABSENT)) as b,
            aclosing(two.watch("", ABSENT)) as every,
        ):
            await one.put("a", b"1")
            await two.put("b", b"2")
            assert [c.value for c in await take(a, 1)] == [b"1"]
            assert [c.value for c in await take(b, 1)] == [b"2"]
            assert [c.value for c in await take(every, 2)] == [b"1", b"2"]

    async def test_the_end_of_a_lease_is_told(
        self, harness: MetadataHarness, one: Metadata, two: Metadata
    ) -> None:
        lease = await one.lease(harness.ttl_s)
        revoked = await one.lease(harness.ttl_s)
        await one.put("k", b"1", lease=lease)
        start = await one.put("r", b"1", lease=revoked)
        async with aclosing(two.watch("", start)) as watch:
            waiting = await listening(watch)
            await one.revoke(revoked)
            async with asyncio.timeout(PATIENCE_S):
                gone = await waiting
            assert (gone.key, gone.value) == ("r", None)
            waiting = await listening(watch)
            await harness.pass_time(harness.ttl_s * 2)
            async with asyncio.timeout(PATIENCE_S):
                gone = await waiting
        assert (gone.key, gone.value) == ("k", None)
        assert (await two.list("")).revision == gone.revision

    async def test_a_nearer_deadline_is_not_slept_past(
        self, harness: MetadataHarness, one: Metadata, two: Metadata
    ) -> None:
        await two.put("far", b"1", lease=await two.lease(harness.ttl_s * 100))
        start = (await two.list("")).revision
        async with aclosing(two.watch("", start)) as watch:
            waiting = await listening(watch)
            await one.put("near", b"1", lease=await one.lease(harness.ttl_s))
            await one.close()
            async with asyncio.timeout(PATIENCE_S):
                assert (await waiting).key == "near"
            waiting = await listening(watch)
            await harness.pass_time(harness.ttl_s * 2)
            async with asyncio.timeout(PATIENCE_S):
                assert (await waiting).value is None

    async def test_missed_changes_are_said_to_be_missed(
        self, harness: MetadataHarness, one: Metadata, two: Metadata
    ) -> None:
        await one.put("k", b"1")
        await harness.compact()
        newest = (await one.list("")).revision
        async with aclosing(two.watch("k", ABSENT)) as watch:
            (missed,) = await take(watch, 1)
            assert (missed.key, missed.value, missed.revision) == ("", None, newest)
            await one.put("k", b"2")
            assert [c.value for c in await take(watch, 1)] == [b"2"]
        async with aclosing(two.watch("k", newest)) as watch:
            assert [c.value for c in await take(watch, 1)] == [b"2"]

    async def test_a_store_whose_revision_went_back_says_so(self, one: Metadata) -> None:
        newest = await one.put("k", b"1")
        async with aclosing(one.watch("k", Revision(newest + 1000))) as watch:
            assert (await take(watch, 1))[0].key == ""

    async def test_a_watch_can_be_left_at_any_time(self, one: Metadata) -> None:
        watch = one.watch("k", ABSENT)
        waiting = await listening(watch)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await watch.aclose()
        await one.put("k", b"1")
        async with aclosing(one.watch("k", ABSENT)) as again:
            assert len(await take(again, 1)) == 1


class _Ends(_Clients):
    async def test_a_cancelled_call_leaves_the_store_usable(self, one: Metadata) -> None:
        for _ in range(10):
            call = asyncio.ensure_future(one.put("k", b"1"))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        revision = await one.put("k", b"2")
        found = await one.get("k")
        assert found is not None
        assert (found.value, found.revision) == (b"2", revision)

    async def test_a_closed_client_says_so_and_others_go_on(
        self, harness: MetadataHarness, one: Metadata, two: Metadata
    ) -> None:
        await one.put("k", b"1")
        lease = await one.lease(harness.ttl_s)
        await one.close()
        await one.close()
        for call in (
            one.get("k"),
            one.list(""),
            one.put("k", b"2"),
            one.delete("k"),
            one.lease(harness.ttl_s),
            one.keep_alive(lease),
            one.revoke(lease),
            anext(one.watch("", ABSENT)),
        ):
            with pytest.raises(MetadataUnavailable):
                await call
        assert await two.get("k") is not None

    async def test_closing_ends_the_watches(self, one: Metadata) -> None:
        start = await one.put("k", b"1")
        watch = one.watch("", start)
        waiting = await listening(watch)
        await one.close()
        with pytest.raises(MetadataUnavailable):
            async with asyncio.timeout(PATIENCE_S):
                await waiting
        await watch.aclose()


class MetadataContract(_Entries, _Leases, _Watches, _Ends):
    """Subclass it, and give the fixture `harness`."""

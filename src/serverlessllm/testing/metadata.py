"""`FakeMetadata`: the metadata seam in memory, on a given clock, with faults on demand.

It passes the same conformance suite as the real adapters. `another()` is a second client of the
same store, as another process would have.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import MetadataUnavailable
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


class _Store:
    """What all clients share."""

    def __init__(self, clock: Clock, changes_kept_max: int) -> None:
        self.clock = clock
        self.entries: dict[str, Entry] = {}
        self.bound: dict[str, LeaseId] = {}
        self.leases: dict[LeaseId, tuple[float, float]] = {}
        """TTL and deadline."""
        self.names = itertools.count(1)
        self.revision = ABSENT
        self.log: deque[Change] = deque(maxlen=changes_kept_max)
        self.wakes: set[asyncio.Event] = set()

    def expire(self) -> None:
        now_s = self.clock.now_s()
        for lease in [name for name, (_, until_s) in self.leases.items() if until_s <= now_s]:
            self.end(lease)

    def end(self, lease: LeaseId) -> None:
        self.leases.pop(lease, None)
        for key in sorted(k for k, bound in self.bound.items() if bound == lease):
            self.remove(key)

    def keep(self, lease: LeaseId, ttl_s: float) -> None:
        self.leases[lease] = (ttl_s, self.clock.now_s() + ttl_s)

    def expect(self, key: str, revision: Revision | None) -> None:
        found = self.entries.get(key)
        if revision is not None and (found.revision if found else ABSENT) != revision:
            raise RevisionMismatch(key)

    def put(self, key: str, value: bytes, lease: LeaseId | None) -> Revision:
        self.record(key, value)
        self.entries[key] = Entry(key=key, value=value, revision=self.revision)
        self.bound.pop(key, None)
        if lease is not None:
            self.bound[key] = lease
        return self.revision

    def remove(self, key: str) -> None:
        self.record(key, None)
        del self.entries[key]
        self.bound.pop(key, None)

    def record(self, key: str, value: bytes | None) -> None:
        self.revision = Revision(self.revision + 1)
        self.log.append(Change(key=key, value=value, revision=self.revision))
        self.wake()

    def after(self, revision: Revision) -> tuple[Change, ...]:
        oldest = self.log[0].revision if self.log else self.revision + 1
        if revision > self.revision or revision + 1 < oldest:
            return (Change(key="", value=None, revision=self.revision),)
        return tuple(c for c in self.log if c.revision > revision)

    def wake(self) -> None:
        for wake in self.wakes:
            wake.set()

    @contextmanager
    def awake(self) -> Iterator[asyncio.Event]:
        wake = asyncio.Event()
        self.wakes.add(wake)
        try:
            yield wake
        finally:
            self.wakes.discard(wake)


class FakeMetadata:
    """The seam. Set `failing = True` and every call raises `MetadataUnavailable`."""

    def __init__(self, clock: Clock, *, changes_kept_max: int = 4096) -> None:
        self._share(_Store(clock, changes_kept_max))

    def _share(self, store: _Store) -> None:
        self._store = store
        self._closed = False
        self.failing = False
        self.calls = 0
        """Calls so far: a test shows with it that a path reads nothing."""

    def another(self) -> FakeMetadata:
        """A second client of the same store."""
        client = FakeMetadata(self._store.clock)
        client._share(self._store)
        return client

    async def get(self, key: str) -> Entry | None:
        await self._enter()
        return self._store.entries.get(key)

    async def list(self, prefix: str) -> Listing:
        await self._enter()
        found = (e for k, e in sorted(self._store.entries.items()) if k.startswith(prefix))
        return Listing(entries=tuple(found), revision=self._store.revision)

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expect_revision: Revision | None = None,
        lease: LeaseId | None = None,
    ) -> Revision:
        await self._enter()
        if lease is not None and lease not in self._store.leases:
            raise LeaseLost(lease)
        self._store.expect(key, expect_revision)
        return self._store.put(key, value, lease)

    async def delete(self, key: str, *, expect_revision: Revision | None = None) -> bool:
        await self._enter()
        if key not in self._store.entries:
            return False
        self._store.expect(key, expect_revision)
        self._store.remove(key)
        return True

    async def watch(self, prefix: str, from_revision: Revision) -> AsyncGenerator[Change, None]:
        with self._store.awake() as wake:
            at = from_revision
            while True:
                await self._enter()
                wake.clear()
                changes, at = self._store.after(at), self._store.revision
                for change in changes:
                    if change.key == "" or change.key.startswith(prefix):
                        yield change
                if at == self._store.revision:
                    await self._wait(wake)

    async def lease(self, ttl_s: float) -> LeaseId:
        await self._enter()
        lease = LeaseId(f"lease-{next(self._store.names)}")
        self._store.keep(lease, ttl_s)
        self._store.wake()  # its deadline may be the next
        return lease

    async def keep_alive(self, lease: LeaseId) -> None:
        await self._enter()
        if lease not in self._store.leases:
            raise LeaseLost(lease)
        self._store.keep(lease, self._store.leases[lease][0])

    async def revoke(self, lease: LeaseId) -> None:
        await self._enter()
        self._store.end(lease)

    async def close(self) -> None:
        self._closed = True
        self._store.wake()

    async def _enter(self) -> None:
        await asyncio.sleep(0)  # a real store lets others run: so must this one
        self.calls += 1
        if self._closed or self.failing:
            raise MetadataUnavailable("the metadata store does not answer")
        self._store.expire()

    async def _wait(self, wake: asyncio.Event) -> None:
        """Until a change, or until the next lease runs out."""
        if self._closed:
            return
        deadlines = [until_s for _, until_s in self._store.leases.values()]
        if not deadlines:
            await wake.wait()
            return
        async with asyncio.TaskGroup() as group:
            timer = group.create_task(self._set_at(min(deadlines), wake))
            await wake.wait()
            timer.cancel()

    async def _set_at(self, deadline_s: float, wake: asyncio.Event) -> None:
        left_s = deadline_s - self._store.clock.now_s()
        if left_s > 0:
            await self._store.clock.sleep(left_s)
        wake.set()

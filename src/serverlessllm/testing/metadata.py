"""`FakeMetadata`: the metadata seam in memory, on a given clock, with faults on demand.

It passes the same conformance suite as the real adapters. Hand one object to all parts of a test:
it is the store, not a connection to it.
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


class FakeMetadata:
    """The seam. Set `failing = True` and every call raises `MetadataUnavailable`."""

    def __init__(self, clock: Clock, *, changes_kept_max: int = 4096) -> None:
        self.failing = False
        self.calls = 0
        """Calls so far: a test shows with it that a path reads nothing."""
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._bound: dict[str, LeaseId] = {}
        self._leases: dict[LeaseId, tuple[float, float]] = {}
        self._names = itertools.count(1)
        self._revision = ABSENT
        self._log: deque[Change] = deque(maxlen=changes_kept_max)
        self._wakes: set[asyncio.Event] = set()
        self._closed = False

    async def get(self, key: str) -> Entry | None:
        await self._enter()
        return self._entries.get(key)

    async def list(self, prefix: str) -> Listing:
        await self._enter()
        found = (e for k, e in sorted(self._entries.items()) if k.startswith(prefix))
        return Listing(entries=tuple(found), revision=self._revision)

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expect_revision: Revision | None = None,
        lease: LeaseId | None = None,
    ) -> Revision:
        await self._enter()
        if lease is not None and lease not in self._leases:
            raise LeaseLost(lease)
        self._expect(key, expect_revision)
        self._record(key, value)
        self._entries[key] = Entry(key=key, value=value, revision=self._revision)
        self._bound.pop(key, None)
        if lease is not None:
            self._bound[key] = lease
        return self._revision

    async def delete(self, key: str, *, expect_revision: Revision | None = None) -> bool:
        await self._enter()
        if key not in self._entries:
            return False
        self._expect(key, expect_revision)
        self._remove(key)
        return True

    async def watch(self, prefix: str, from_revision: Revision) -> AsyncGenerator[Change, None]:
        with self._awake() as wake:
            at = from_revision
            while True:
                await self._enter()
                wake.clear()
                changes, at = self._after(at)
                for change in changes:
                    if change.key == "" or change.key.startswith(prefix):
                        yield change
                if at == self._revision:
                    await self._wait(wake)

    async def lease(self, ttl_s: float) -> LeaseId:
        await self._enter()
        lease = LeaseId(f"lease-{next(self._names)}")
        self._leases[lease] = (ttl_s, self._clock.now_s() + ttl_s)
        self._wake()
        return lease

    async def keep_alive(self, lease: LeaseId) -> None:
        await self._enter()
        if lease not in self._leases:
            raise LeaseLost(lease)
        ttl_s, _ = self._leases[lease]
        self._leases[lease] = (ttl_s, self._clock.now_s() + ttl_s)

    async def revoke(self, lease: LeaseId) -> None:
        await self._enter()
        self._end(lease)

    async def close(self) -> None:
        self._closed = True
        self._wake()

    async def _enter(self) -> None:
        await asyncio.sleep(0)  # a real store lets others run: so must this one
        self.calls += 1
        if self._closed or self.failing:
            raise MetadataUnavailable("the metadata store does not answer")
        now_s = self._clock.now_s()
        for lease in [name for name, (_, until_s) in self._leases.items() if until_s <= now_s]:
            self._end(lease)

    def _end(self, lease: LeaseId) -> None:
        self._leases.pop(lease, None)
        for key in sorted(k for k, bound in self._bound.items() if bound == lease):
            self._remove(key)

    def _expect(self, key: str, revision: Revision | None) -> None:
        found = self._entries.get(key)
        if revision is not None and (found.revision if found else ABSENT) != revision:
            raise RevisionMismatch(key)

    def _remove(self, key: str) -> None:
        self._record(key, None)
        del self._entries[key]
        self._bound.pop(key, None)

    def _record(self, key: str, value: bytes | None) -> None:
        self._revision = Revision(self._revision + 1)
        self._log.append(Change(key=key, value=value, revision=self._revision))
        self._wake()

    def _after(self, revision: Revision) -> tuple[tuple[Change, ...], Revision]:
        oldest = self._log[0].revision if self._log else Revision(self._revision + 1)
        if revision > self._revision or revision + 1 < oldest:
            return (Change(key="", value=None, revision=self._revision),), self._revision
        return tuple(c for c in self._log if c.revision > revision), self._revision

    @contextmanager
    def _awake(self) -> Iterator[asyncio.Event]:
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            yield wake
        finally:
            self._wakes.discard(wake)

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    async def _wait(self, wake: asyncio.Event) -> None:
        """Until a change, or until the next lease runs out."""
        deadlines = [until_s for _, until_s in self._leases.values()]
        if not deadlines:
            await wake.wait()
            return
        async with asyncio.TaskGroup() as group:
            timer = group.create_task(self._set_at(min(deadlines), wake))
            await wake.wait()
            timer.cancel()

    async def _set_at(self, deadline_s: float, wake: asyncio.Event) -> None:
        await self._clock.sleep(max(0.0, deadline_s - self._clock.now_s()))
        wake.set()

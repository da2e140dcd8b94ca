"""The seam of the metadata store: eight verbs over bytes.

Keys are `/`-separated text. A store has one revision counter: each change gets the next number,
a key's revision is that of its last change. A `Lease` binds keys to a living owner: when it
expires or is revoked its keys are deleted (and watchers told). All calls may raise
`MetadataUnavailable`; none waits longer than the adapter's timeout (2 s by default).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NewType, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

LeaseId = NewType("LeaseId", str)
Revision = NewType("Revision", int)

ABSENT = Revision(0)
"""As `expect_revision`: the key must not exist."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A key, its value and the revision of its last change."""

    key: str
    value: bytes
    revision: Revision


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a watch yields: a put (`value` is bytes) or a delete (`value` is None).

    `key == ""` means: changes were missed (a compacted log, a reconnect); list again.
    """

    key: str
    value: bytes | None
    revision: Revision


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The entries under a prefix, sorted by key, and the store revision they are true at."""

    entries: tuple[Entry, ...]
    revision: Revision


class RevisionMismatch(Exception):
    """The key's revision is not the expected one: read again, decide again."""


class LeaseLost(Exception):
    """The lease expired or was revoked: its keys are gone, and its owner must stop."""


class Metadata(Protocol):
    """What every adapter offers; `serverlessllm.testing.contracts.metadata` proves it."""

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str) -> Listing: ...

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expect_revision: Revision | None = None,
        lease: LeaseId | None = None,
    ) -> Revision:
        """Write; with `expect_revision`, only if the key is at that revision (ABSENT: missing).

        The key is bound to `lease` from now on, and to no lease when none is given, whatever it
        was bound to before.

        Raises:
            RevisionMismatch: somebody else changed the key.
            LeaseLost: `lease` is no longer alive.
        """
        ...

    async def delete(self, key: str, *, expect_revision: Revision | None = None) -> bool:
        """Remove the key; whether it existed.

        Raises:
            RevisionMismatch: the key is not at `expect_revision` (nor is it missing: that is
                False).
        """
        ...

    def watch(self, prefix: str, from_revision: Revision) -> AsyncGenerator[Change, None]:
        """Every change under `prefix` after `from_revision`, in order, for as long as iterated.

        Close it (`contextlib.aclosing`) when done. It ends only by raising `MetadataUnavailable`.
        """
        ...

    async def lease(self, ttl_s: float) -> LeaseId:
        """A new lease, which runs out `ttl_s` seconds after its last `keep_alive`."""
        ...

    async def keep_alive(self, lease: LeaseId) -> None:
        """Start the lease's time again. Raises LeaseLost when it has run out."""
        ...

    async def revoke(self, lease: LeaseId) -> None:
        """End the lease and delete its keys, now; harmless when it is gone already."""
        ...

    async def close(self) -> None:
        """Give everything back; leases run out by themselves. Later calls, and watches that still
        run, raise `MetadataUnavailable`. Harmless when closed already."""
        ...

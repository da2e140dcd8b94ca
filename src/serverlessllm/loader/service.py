"""The loader: brings a checkpoint's bytes near, once, for everybody who wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel, TierUsage
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.progress import LoadProgress
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.store.checkpoints import CheckpointStore


class Resident:
    """A reference to a checkpoint in a tier: while it is held, nobody evicts the files.

    Use as `async with await loader.load(...) as resident:` or call `release()`.
    """

    checkpoint: CheckpointId
    level: CacheLevel
    """DRAM or NVME: the tier of `bin_path`."""
    bin_path: Path
    """Read-only; an engine maps it where it lies."""
    index_path: Path
    index: Index
    hops: tuple[HopTiming, ...]
    """What moved for this load, in order; empty when the bytes were already there."""

    def release(self) -> None:
        """Give the reference back. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Loader:
    """The tiers of one node. Several processes of a machine may share the same directories."""

    def __init__(
        self,
        settings: LoaderSettings,
        *,
        store: CheckpointStore,
        clock: Clock,
        data_dir: Path,
    ) -> None: ...

    async def start(self) -> None:
        """Make the directories, remove what killed processes left, check leftovers (which are
        announced one by one as they verify; `settled` waits for the last)."""

    async def close(self) -> None:
        """Cancel running loads and background copies; give back pins. Files stay for the next."""

    async def settled(self) -> None:
        """Return when nothing runs in the background: leftovers checked, copies written behind."""

    async def load(
        self,
        ref: CheckpointRef,
        level: CacheLevel,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> Resident:
        """Bring a checkpoint to `level` or nearer, and hold it there.

        Concurrent loads of one checkpoint share one copy. Cancelling a caller ends the copy only
        when no other waits for it. `level` STORE is a `ValueError`.

        Raises:
            OutOfSpace: the tier's budget is too small, or all of it is in use.
            StoreUnavailable, CheckpointError, CorruptChunk: from the store.
            LoadFailed: another process held the checkpoint's load for too long; a disk error.
        """
        ...

    def residency(self) -> Mapping[CheckpointId, CacheLevel]:
        """The nearest verified tier (DRAM or NVME) of each checkpoint on this node."""
        ...

    def usage(self) -> tuple[TierUsage, TierUsage]:
        """Of the DRAM tier and of the nvme tier."""
        ...

    def bandwidth(self) -> Mapping[str, float]:
        """Bytes/s by hop: what loads measured, or the machine's limit before the first."""
        ...

    async def evict(self, checkpoint: CheckpointId, keep: CacheLevel) -> int:
        """Drop the copies nearer than `keep` that are neither in use nor pinned; bytes freed."""
        ...

    async def pin(self, checkpoint: CheckpointId) -> None:
        """Keep whatever copies exist, and later ones, from eviction by any process."""

    async def unpin(self, checkpoint: CheckpointId) -> None:
        """Undo `pin`. Idempotent."""

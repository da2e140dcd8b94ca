"""What this process holds in the tiers: for callers of `load`, and for pinned checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.device_tier import OnDevice
from serverlessllm.loader.residency import Held, TierDirectory


class Brought(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a load that several callers share."""

    held: Held
    tier: TierDirectory
    index: Index
    hops: tuple[HopTiming, ...]

    def release(self) -> None:
        """Idempotent."""
        self.held.release()


class Resident:
    """A reference to a checkpoint in a tier: while it is held, nobody evicts the files.

    Use as `async with await loader.load(...) as resident:` or call `release()`.
    """

    __slots__ = (
        "_forget",
        "_held",
        "bin_path",
        "checkpoint",
        "device",
        "hops",
        "index",
        "index_path",
        "level",
    )

    checkpoint: CheckpointId
    level: CacheLevel
    """DRAM or NVME: the tier of `bin_path`."""
    bin_path: Path
    """Read-only; an engine maps it where it lies."""
    index_path: Path
    index: Index
    hops: tuple[HopTiming, ...]
    """What moved for this load, in order; nothing moved when the bytes were already there."""
    device: OnDevice | None
    """The weights on devices, when they were loaded there; None on a CPU."""

    def __init__(
        self, brought: Brought, hops: tuple[HopTiming, ...], forget: Callable[[Resident], None]
    ) -> None:
        self._held = brought.held.share()
        self._forget = forget
        self.checkpoint = brought.held.checkpoint
        self.level = brought.tier.level
        self.bin_path = brought.held.path
        self.index_path = brought.tier.index_path(self.checkpoint)
        self.index = brought.index
        self.hops = hops
        self.device = None

    def share(self) -> Held:
        """Another reference to the file alone."""
        return self._held.share()

    def put_on(self, device: OnDevice) -> None:
        """Its weights are on devices too: that reference is now ours."""
        self.device = device
        self.hops = (*self.hops, *device.hops)

    def release(self) -> None:
        """Give the reference back. Idempotent."""
        self._held.release()
        if self.device is not None:
            self.device.release()
        self._forget(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class References:
    """All residents and pins of this process."""

    def __init__(self) -> None:
        self._residents: set[Resident] = set()
        self._pins: dict[CheckpointId, dict[CacheLevel, Held]] = {}

    def take(self, brought: Brought, hops: tuple[HopTiming, ...]) -> Resident:
        """A reference of its own for one caller."""
        resident = Resident(brought, hops, self._residents.discard)
        self._residents.add(resident)
        return resident

    def held(self, level: CacheLevel) -> set[CheckpointId]:
        """What this process keeps in a tier."""
        used = {resident.checkpoint for resident in self._residents if resident.level is level}
        return used | {checkpoint for checkpoint, tiers in self._pins.items() if level in tiers}

    def pin(self, checkpoint: CheckpointId) -> None:
        """From now on `keep` keeps its copies."""
        self._pins.setdefault(checkpoint, {})

    def keep(self, level: CacheLevel, held: Held) -> None:
        """A copy exists: hold it too, if the checkpoint is pinned."""
        tiers = self._pins.get(held.checkpoint)
        if tiers is None:
            return
        old = tiers.get(level)
        if old is not None:  # it may be another file by now: a corrupt copy that was replaced
            old.release()
        tiers[level] = held.share()

    def unpin(self, checkpoint: CheckpointId) -> None:
        """Idempotent."""
        for held in self._pins.pop(checkpoint, {}).values():
            held.release()

    def unpin_all(self) -> None:
        for checkpoint in tuple(self._pins):
            self.unpin(checkpoint)

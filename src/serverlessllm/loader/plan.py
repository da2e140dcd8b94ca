"""What to copy and what to give up for it: functions of values, no I/O.

The tensors of a `.bin` lie in execution order, so chunks by number are execution order too; only
the side files behind them are wanted earlier: an engine reads its config before its first layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from serverlessllm.checkpoint.index import KIND_TENSORS, Index, layers
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import OutOfSpace
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.units import format_size


class ChunkRange(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk of a `.bin`."""

    number: int
    offset: int
    size_bytes: int


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """One hop of a load: these chunks, in this order, from one tier to the next."""

    source: CacheLevel
    target: CacheLevel
    chunks: tuple[ChunkRange, ...]
    behind: bool = False
    """Nobody waits for it: it runs after the load has been answered."""

    @property
    def hop(self) -> str:
        """`nvme→dram`, say."""
        return hop_name(self.source, self.target)

    @property
    def size_bytes(self) -> int:
        """All that moves."""
        return sum(chunk.size_bytes for chunk in self.chunks)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a tier."""

    checkpoint: CheckpointId
    size_bytes: int
    last_used: int
    """Orders the entries of a tier; a higher one was used later."""
    held: bool = False
    """In use, pinned or being filled: not to be evicted."""


class TierState(msgspec.Struct, frozen=True, kw_only=True):
    """One tier as its directory shows it."""

    level: CacheLevel
    budget_bytes: int
    free_bytes: int
    """What its file system could still take."""
    entries: tuple[Entry, ...]


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a `.bin`'s bytes, and the device that it belongs on."""

    device: int
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


def hop_name(source: CacheLevel, target: CacheLevel) -> str:
    """How progress, timings and bandwidths name a hop."""
    return f"{source.tier}→{target.tier}"


def plan(
    index: Index,
    nearest: CacheLevel,
    target: CacheLevel,
    budgets: Mapping[CacheLevel, int],
) -> tuple[Copy, ...]:
    """The copies that bring a checkpoint from its `nearest` tier to `target`, in order.

    `budgets`: bytes of the DRAM and the nvme tier. From the store to DRAM the bytes do not take
    the way over the disk: nobody waits for the nvme copy, which is written behind, from DRAM.

    Raises:
        OutOfSpace: the checkpoint is larger than the whole budget of the tier.
    """
    wanted = max(target, CacheLevel.DRAM)  # on a CPU the device reads DRAM where it lies
    if nearest <= wanted:
        return ()
    if index.size_bytes > budgets[wanted]:
        raise too_large(wanted, index.size_bytes, budgets[wanted])
    chunks = chunk_ranges(index)
    copies = [Copy(source=nearest, target=wanted, chunks=chunks)]
    if (
        nearest is CacheLevel.STORE
        and wanted is CacheLevel.DRAM
        and index.size_bytes <= budgets[CacheLevel.NVME]
    ):
        copies.append(
            Copy(source=CacheLevel.DRAM, target=CacheLevel.NVME, chunks=chunks, behind=True)
        )
    return tuple(copies)


def chunk_ranges(index: Index) -> tuple[ChunkRange, ...]:
    """All chunks of a `.bin` in the order in which an engine wants them: those with side files,
    then execution order."""
    chunks = tuple(
        ChunkRange(number=number, offset=offset, size_bytes=size)
        for number, (offset, size) in enumerate(map(index.chunk_range, range(len(index.chunks))))
    )
    early = {
        number
        for file in index.side_files
        for number in range(
            file.offset // index.chunk_bytes,
            -(-(file.offset + file.size_bytes) // index.chunk_bytes),
        )
    }
    return tuple(sorted(chunks, key=lambda chunk: chunk.number not in early))


def evictions(state: TierState, needed_bytes: int) -> tuple[Entry, ...]:
    """The entries to drop so that `needed_bytes` fit: the least recently used that nobody holds.

    Raises:
        OutOfSpace: they would not fit even then; nothing should be dropped for nothing.
    """
    used = sum(entry.size_bytes for entry in state.entries)
    over_budget = used + needed_bytes - state.budget_bytes
    short = max(over_budget, needed_bytes - state.free_bytes)
    dropped: list[Entry] = []
    for entry in sorted(state.entries, key=lambda entry: entry.last_used):
        if short <= 0:
            break
        if not entry.held:
            dropped.append(entry)
            short -= entry.size_bytes
    if short > 0:
        raise _no_room(state, needed_bytes)
    return tuple(dropped)


def spread(index: Index, room: Mapping[int, int]) -> tuple[Span, ...]:
    """Which bytes belong on which device, given each one's free bytes.

    All on the device with most room where one has enough; else whole layers in execution order,
    as many as fit, from the roomiest device to the next. A GGUF, whose layers may overlap, is
    never divided.

    Raises:
        OutOfSpace: the devices together have no room for it.
    """
    roomiest = sorted(room, key=lambda device: (-room[device], device))
    if roomiest and index.size_bytes <= room[roomiest[0]]:
        return (Span(device=roomiest[0], offset=0, size_bytes=index.size_bytes),)
    if index.kind == KIND_TENSORS:
        cuts = (*(layer.offset for layer in layers(index)), index.size_bytes)
        spans: list[Span] = []
        start = 0
        for device in roomiest:
            fits = [cut for cut in cuts if start < cut <= start + room[device]]
            if fits:
                spans.append(Span(device=device, offset=start, size_bytes=max(fits) - start))
                start = max(fits)
        if start == index.size_bytes:
            return tuple(spans)
    raise OutOfSpace(
        f"the checkpoint takes {format_size(index.size_bytes)}, but the devices have only "
        f"{', '.join(format_size(free) for free in room.values()) or 'nothing'} free of their "
        "budgets: unload a model or raise loader.device_budget_bytes"
    )


def too_large(level: CacheLevel, needed_bytes: int, budget_bytes: int) -> OutOfSpace:
    """A checkpoint that can never fit."""
    return OutOfSpace(
        f"the checkpoint takes {format_size(needed_bytes)}, but the whole budget of the "
        f"{level.tier} tier is {format_size(budget_bytes)}: raise "
        f"loader.{level.tier}_budget_bytes on the agent"
    )


def _no_room(state: TierState, needed_bytes: int) -> OutOfSpace:
    if needed_bytes > state.budget_bytes:
        return too_large(state.level, needed_bytes, state.budget_bytes)
    held = sum(entry.size_bytes for entry in state.entries if entry.held)
    loosely = (
        f"the {state.level.tier} tier has no room for {format_size(needed_bytes)}: of its budget "
        f"of {format_size(state.budget_bytes)}, {format_size(held)} are in use or pinned"
    )
    if held + needed_bytes > state.budget_bytes:
        return OutOfSpace(
            f"{loosely}; unload a model or raise loader.{state.level.tier}_budget_bytes"
        )
    return OutOfSpace(
        f"{loosely}, and its file system has only {format_size(state.free_bytes)} free; "
        "free some, or unload a model"
    )

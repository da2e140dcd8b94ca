"""The planner: every byte through every tier at most once, in order, within the budgets."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.checkpoint.index import Chunk, Index, SideFile, Tensor
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import OutOfSpace
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.plan import (
    Entry,
    TierState,
    chunk_ranges,
    evictions,
    plan,
    spread,
)

DEVICE, DRAM, NVME, STORE = CacheLevel
CHUNK_BYTES = 4096
LEVELS = st.sampled_from([DRAM, NVME, STORE])
TARGETS = st.sampled_from([DEVICE, DRAM, NVME])


def index_of(size_bytes: int) -> Index:
    count = -(-size_bytes // CHUNK_BYTES)
    return Index(
        model="m",
        source="file:///m",
        revision="r",
        kind="tensors",
        size_bytes=size_bytes,
        chunk_bytes=CHUNK_BYTES,
        chunks=(Chunk(blake3="0" * 64, crc32c=0),) * count,
        tensors=(),
    )


SIZES = st.integers(1, 40 * CHUNK_BYTES)


@given(SIZES)
def test_chunk_ranges_cover_the_file_once_in_order(size: int) -> None:
    end = 0
    for number, chunk in enumerate(chunk_ranges(index_of(size))):
        assert (chunk.number, chunk.offset) == (number, end)
        assert 0 < chunk.size_bytes <= CHUNK_BYTES
        end += chunk.size_bytes
    assert end == size


def test_chunks_with_side_files_come_first_the_others_in_execution_order() -> None:
    files = (("config.json", 5, 6), ("empty.json", 6, 0), ("tokenizer.json", 6, 2 * CHUNK_BYTES))
    index = msgspec.structs.replace(
        index_of(8 * CHUNK_BYTES),
        side_files=tuple(
            SideFile(name=name, offset=chunk * CHUNK_BYTES, size_bytes=size)
            for name, chunk, size in files
        ),
    )
    assert [chunk.number for chunk in chunk_ranges(index)] == [5, 6, 7, 0, 1, 2, 3, 4]


@given(SIZES, LEVELS, TARGETS, st.integers(0, 50 * CHUNK_BYTES), st.integers(0, 50 * CHUNK_BYTES))
def test_plans(size: int, nearest: CacheLevel, target: CacheLevel, dram: int, nvme: int) -> None:
    budgets = {DRAM: dram, NVME: nvme}
    wanted = max(target, DRAM)
    if nearest > wanted and size > budgets[wanted]:
        with pytest.raises(OutOfSpace, match=rf"loader\.{wanted.tier}_budget_bytes"):
            plan(index_of(size), nearest, target, budgets)
        return
    copies = plan(index_of(size), nearest, target, budgets)
    if nearest <= wanted:
        assert copies == ()
        return
    # The bytes arrive where they are wanted, from where they are, and the caller waits for that
    # alone.
    assert [(copy.source, copy.target) for copy in copies if not copy.behind] == [(nearest, wanted)]
    assert not copies[0].behind
    have = {nearest}
    for copy in copies:
        assert copy.source in have
        assert copy.target not in have
        have.add(copy.target)
        assert copy.size_bytes == size <= budgets[copy.target]
        offsets = [chunk.offset for chunk in copy.chunks]
        assert offsets == sorted(set(offsets))
    sources = [copy.source for copy in copies]
    assert len(set(sources)) == len(sources)
    # DRAM survives no reboot: what came from the store is kept on the disk whenever it fits.
    if nearest is STORE and size <= nvme:
        assert NVME in have


ENTRIES = st.lists(
    st.tuples(st.integers(0, 100), st.integers(0, 20), st.booleans()), max_size=12
).map(
    lambda rows: tuple(
        Entry(checkpoint=CheckpointId(str(i)), size_bytes=size, last_used=used, held=held)
        for i, (size, used, held) in enumerate(rows)
    )
)


@given(ENTRIES, st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_evictions(entries: tuple[Entry, ...], needed: int, budget: int, free: int) -> None:
    state = TierState(level=DRAM, budget_bytes=budget, free_bytes=free, entries=entries)
    used = sum(entry.size_bytes for entry in entries)
    loose = [entry for entry in entries if not entry.held]
    loose_bytes = sum(entry.size_bytes for entry in loose)
    try:
        dropped = evictions(state, needed)
    except OutOfSpace:
        assert used - loose_bytes + needed > budget or free + loose_bytes < needed
        return
    assert not any(entry.held for entry in dropped)
    freed = sum(entry.size_bytes for entry in dropped)
    assert used - freed + needed <= budget
    assert free + freed >= needed
    kept = [entry for entry in loose if entry not in dropped]
    assert max((e.last_used for e in dropped), default=0) <= min(
        (e.last_used for e in kept), default=20
    )
    if dropped:  # not one more than needed
        without_last = freed - dropped[-1].size_bytes
        assert used - without_last + needed > budget or free + without_last < needed


def state(held: int, loose: int, budget: int, free: int) -> TierState:
    return TierState(
        level=NVME,
        budget_bytes=budget,
        free_bytes=free,
        entries=(
            Entry(checkpoint=CheckpointId("a"), size_bytes=held, last_used=1, held=True),
            Entry(checkpoint=CheckpointId("b"), size_bytes=loose, last_used=2),
        ),
    )


@pytest.mark.parametrize(
    ("tier", "needed", "says"),
    [
        (state(10, 10, 2048, 9999), 4096, "whole budget of the nvme tier is 2.0 KiB: raise loader"),
        (state(1024, 10, 2048, 9999), 1500, "budget of 2.0 KiB, 1.0 KiB are in use or pinned; un"),
        (state(1024, 10, 8192, 100), 1500, "its file system has only 100 B free"),
    ],
)
def test_a_refusal_says_what_would_help(tier: TierState, needed: int, says: str) -> None:
    with pytest.raises(OutOfSpace) as refusal:
        evictions(tier, needed)
    assert says in refusal.value.message


def model_of(sizes: list[int]) -> Index:
    """A layer for each size, in 64ths of a KiB: a whole number of alignments."""
    tensors, at = [], 0
    for number, size in enumerate(sizes):
        tensors.append(
            Tensor(
                name=f"model.layers.{number}.weight",
                dtype="U8",
                shape=(size * 64,),
                offset=at,
                size_bytes=size * 64,
            )
        )
        at += size * 64
    return msgspec.structs.replace(index_of(at), tensors=tuple(tensors))


LAYERS = st.lists(st.integers(1, 20), min_size=1, max_size=12)
ROOMS = st.dictionaries(st.integers(0, 3), st.integers(0, 6000), max_size=4)


@given(LAYERS, ROOMS)
def test_weights_spread_over_devices(sizes: list[int], room: dict[int, int]) -> None:
    index = model_of(sizes)
    if sum(room.values()) < index.size_bytes:
        with pytest.raises(OutOfSpace, match="device_budget_bytes"):
            spread(index, room)
        return
    try:
        spans = spread(index, room)
    except OutOfSpace:  # layers are as long as they are
        return
    borders = {tensor.offset for tensor in index.tensors} | {index.size_bytes}
    at = 0
    for span in spans:
        assert span.offset == at
        assert 0 < span.size_bytes <= room[span.device]
        assert span.end in borders  # no layer is torn
        at = span.end
    assert at == index.size_bytes
    assert len({span.device for span in spans}) == len(spans)
    if max(room.values()) >= index.size_bytes:
        assert len(spans) == 1


def test_a_gguf_is_never_divided() -> None:
    index = msgspec.structs.replace(model_of([10, 10]), kind="gguf")
    with pytest.raises(OutOfSpace):
        spread(index, {0: 640, 1: 640})
    assert spread(msgspec.structs.replace(index, kind="tensors"), {0: 640, 1: 640})[1].device == 1

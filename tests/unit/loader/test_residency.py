"""A tier's directory and its locks, on a real file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

import pytest

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import OutOfSpace
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader import residency
from serverlessllm.loader.budget import evict, reserve
from serverlessllm.loader.locks import is_being_written, lock_shared
from serverlessllm.loader.residency import TierDirectory

A, B, C = (CheckpointId(letter * 64) for letter in "abc")


@pytest.fixture(params=[CacheLevel.DRAM, CacheLevel.NVME])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> TierDirectory:
    directory = TierDirectory(request.param, tmp_path / "tier")
    directory.prepare()
    return directory


def fill(tier: TierDirectory, checkpoint: CheckpointId, size: int = 10_000) -> None:
    partial = reserve(tier, checkpoint, size, 100_000)
    assert partial is not None
    partial.commit(b"index").release()


def test_a_reservation_is_seen_and_given_back(tier: TierDirectory) -> None:
    partial = reserve(tier, A, 10_000, 100_000)
    assert partial is not None
    (file,) = tier.scan()
    assert not file.whole
    assert file.size_bytes == 12_288  # in whole pages
    assert reserve(tier, A, 10_000, 100_000) is None  # it is being filled
    with pytest.raises(OutOfSpace):
        reserve(tier, B, 90_000, 100_000)
    assert evict(tier, A) == 0
    partial.abandon()
    partial.abandon()
    assert list(tier.path.iterdir()) == []


def test_commit_names_the_bytes_last_and_holds_them(tier: TierDirectory) -> None:
    partial = reserve(tier, A, 10_000, 100_000)
    assert partial is not None
    held = partial.commit(b"index")
    partial.abandon()  # does nothing now
    assert tier.read_index(A) == b"index"
    assert tier.bin_path(A).stat().st_size == 10_000
    assert evict(tier, A) == 0
    shared = held.share()
    held.release()
    held.release()
    assert evict(tier, A) == 0
    shared.release()
    assert evict(tier, A) == 10_000
    assert list(tier.path.iterdir()) == []
    assert tier.hold(A) is None


def test_use_orders_eviction_even_when_the_clock_stands_still(tier: TierDirectory) -> None:
    for checkpoint in (A, B, C):
        fill(tier, checkpoint)
    for checkpoint in (C, A, B):
        held = tier.hold(checkpoint)
        assert held is not None
        tier.touch(held)
        held.release()
    files = sorted(tier.scan(), key=lambda file: file.last_used)
    assert [file.checkpoint for file in files] == [C, A, B]
    assert len({file.last_used for file in files}) == 3


def test_a_clock_that_was_set_back_keeps_the_order(tier: TierDirectory) -> None:
    fill(tier, A)
    fill(tier, B)
    future = 4_000_000_000 * 10**9
    os.utime(tier.bin_path(A), ns=(future, future))
    held = tier.hold(B)
    assert held is not None
    tier.touch(held)
    held.release()
    assert max(tier.scan(), key=lambda file: file.last_used).checkpoint == B


def test_nothing_is_evicted_for_nothing(tier: TierDirectory) -> None:
    fill(tier, A)
    fill(tier, B)
    held = tier.hold(B)
    assert held is not None
    with pytest.raises(OutOfSpace):
        reserve(tier, C, 95_000, 100_000)
    assert {file.checkpoint for file in tier.scan()} == {A, B}
    held.release()
    partial = reserve(tier, C, 95_000, 100_000)
    assert partial is not None
    partial.abandon()


def test_discard_removes_even_what_is_held(tier: TierDirectory) -> None:
    fill(tier, A)
    held = tier.hold(A)
    assert held is not None
    tier.discard(A)
    assert tier.hold(A) is None
    assert os.fstat(held.fd).st_size == 10_000  # who has it mapped keeps it
    held.release()


def test_descriptors_do_not_leak(tier: TierDirectory) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - cheap and exact
    fill(tier, A)
    for _ in range(3):
        held = tier.hold(A)
        assert held is not None
        held.release()
        tier.hold(B)
        with pytest.raises(OutOfSpace):
            reserve(tier, B, 200_000, 100_000)
    evict(tier, A)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.fixture
def dram(tmp_path: Path) -> TierDirectory:
    directory = TierDirectory(CacheLevel.DRAM, tmp_path / "dram")
    directory.prepare()
    return directory


@pytest.mark.parametrize("size", [3_000, 50_000, 60_000])
def test_what_is_evicted_from_dram_lives_on_as_its_successor(
    dram: TierDirectory, size: int
) -> None:
    fill(dram, A, 50_000)
    inode = dram.bin_path(A).stat().st_ino
    partial = reserve(dram, B, size, max(size, 50_000))
    assert partial is not None
    assert os.fstat(partial.fd).st_ino == inode
    assert partial_mode(dram, B) == 0o600
    (file,) = dram.scan()
    assert (file.checkpoint, file.whole, file.size_bytes) == (B, False, -(-size // 4096) * 4096)
    assert not dram.index_path(A).exists()
    assert is_being_written(dram.partial_path(B))
    os.pwrite(partial.fd, b"b" * size, 0)
    partial.commit(b"index").release()
    assert dram.bin_path(B).read_bytes() == b"b" * size
    assert stat.S_IMODE(dram.bin_path(B).stat().st_mode) == 0o400
    partial = reserve(dram, C, 60_000, 60_000)
    assert partial is not None
    partial.abandon()
    assert list(dram.path.iterdir()) == []


def partial_mode(tier: TierDirectory, checkpoint: CheckpointId) -> int:
    return stat.S_IMODE(tier.partial_path(checkpoint).stat().st_mode)


@pytest.mark.parametrize("how", ["mapped", "open", "linked"])
def test_memory_that_somebody_may_still_read_is_not_overwritten(
    dram: TierDirectory, how: str
) -> None:
    """As of an engine whose agent was killed: it has no lock, but computes with the weights."""
    partial = reserve(dram, A, 50_000, 60_000)
    assert partial is not None
    os.pwrite(partial.fd, b"a" * 50_000, 0)
    partial.commit(b"index").release()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(dram.bin_path(A).open("rb"))
        if how == "mapped":
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            stack.callback(memory.close)
            file.close()
        elif how == "linked":
            (dram.path / "another name").hardlink_to(dram.bin_path(A))
            file.close()
        partial = reserve(dram, B, 50_000, 60_000)
        assert partial is not None
        os.pwrite(partial.fd, b"b" * 50_000, 0)
        partial.commit(b"index").release()
        if how == "mapped":
            assert memory[:] == b"a" * 50_000
        elif how == "open":
            assert file.read() == b"a" * 50_000
        else:
            assert (dram.path / "another name").read_bytes() == b"a" * 50_000
    assert dram.bin_path(B).read_bytes() == b"b" * 50_000


def test_who_opens_what_is_becoming_another_checkpoint_looks_again(
    dram: TierDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel had found the name before it was gone, and opens the file after the lease."""
    fill(dram, A)

    def recycled(fd: int) -> None:
        monkeypatch.undo()
        dram.bin_path(A).rename(dram.partial_path(B))
        lock_shared(fd)

    monkeypatch.setattr(residency, "lock_shared", recycled)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - cheap and exact
    assert dram.hold(A) is None
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_without_leases_memory_is_given_back_and_taken_anew(
    dram: TierDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, command: int, argument: int) -> int:
        raise OSError(errno.EINVAL, "no leases here")

    fill(dram, A, 50_000)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    partial = reserve(dram, B, 50_000, 60_000)
    assert partial is not None
    assert os.pread(partial.fd, 50_000, 0) == bytes(50_000)
    partial.abandon()
    assert list(dram.path.iterdir()) == []


def test_who_looks_for_it_meanwhile_does_not_find_it(dram: TierDirectory) -> None:
    """An open file from before keeps the memory from being overwritten: `hold` may be there."""
    fill(dram, A, 50_000)
    held = dram.hold(A)
    assert held is not None
    with pytest.raises(OutOfSpace):
        reserve(dram, B, 50_000, 60_000)
    held.release()
    partial = reserve(dram, B, 50_000, 60_000)
    assert partial is not None
    assert dram.hold(A) is None
    partial.abandon()

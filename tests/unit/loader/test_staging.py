"""The ring that bytes pass through: aligned, bounded, and never used again too early."""

from __future__ import annotations

import threading

from serverlessllm.loader.tiers.staging import BLOCK_BYTES, Staging


class Copying:
    """A copy that is over when told so."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.awaited = threading.Event()

    def wait(self) -> None:
        self.awaited.set()
        assert self.over.wait(60)


def test_blocks_are_aligned_and_the_first_given_back_is_taken_first() -> None:
    staging = Staging(3)
    assert staging.address % BLOCK_BYTES == 0
    assert len(staging.memory) == 3 * BLOCK_BYTES
    seen = []
    for _ in range(6):
        with staging.block() as block:
            seen.append(block)
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:]


def test_a_block_is_used_again_only_after_its_copy() -> None:
    staging = Staging(1)
    copying = Copying()
    with staging.block() as block:
        block.busy_until(copying)
    taken = threading.Event()

    def take() -> None:
        with staging.block():
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert copying.awaited.wait(60)
    assert not taken.is_set()
    copying.over.set()
    thread.join(60)
    assert taken.is_set()
    staging.settle()  # nothing left to wait for


def test_a_failure_gives_the_block_back() -> None:
    staging = Staging(1)

    class Failing:
        def wait(self) -> None:
            raise OSError("device lost")

    with staging.block() as block:
        block.busy_until(Failing())
    failures = 0
    for _ in range(2):
        try:
            with staging.block() as block:
                block.memory[0] = 1
        except OSError:
            failures += 1
    assert failures == 1  # the copy is over, if badly; the block is not lost with it


def test_settling_waits_for_every_copy() -> None:
    staging = Staging(2)
    copies = [Copying(), Copying()]
    for copying in copies:
        copying.over.set()
        with staging.block() as block:
            block.busy_until(copying)
    staging.settle()
    assert all(copying.awaited.is_set() for copying in copies)

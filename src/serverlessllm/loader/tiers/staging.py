"""Memory that bytes pass through on their way between tiers: few blocks, used again and again.

A block is two MiB on its boundary, so that the kernel can back it with one huge page: direct I/O
then pins one page instead of 512, and the bytes are checked while the processor's cache still
has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Protocol

from serverlessllm.core.units import MIB

BLOCK_BYTES = 2 * MIB


class Copy(Protocol):
    """A copy out of a block that somebody else (a device) carries out."""

    def wait(self) -> None:
        """Block until the block's bytes are not needed any more."""


class Block:
    """`BLOCK_BYTES` of page-aligned memory, used by one thread at a time."""

    __slots__ = ("_copy", "memory")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self._copy: Copy | None = None

    def busy_until(self, copy: Copy | None) -> None:
        """The block may be given back at once, but used again only after `copy`."""
        self._copy = copy

    def settle(self) -> None:
        """Wait for the copy that still reads the block."""
        copy, self._copy = self._copy, None
        if copy is not None:
            copy.wait()


class Staging:
    """A ring of blocks. The one that was given back first is taken first: its copy ends first.

    The memory is the kernel's until it is touched, and ours from then on.
    """

    def __init__(self, blocks: int) -> None:
        self.memory, self.address = _aligned(blocks * BLOCK_BYTES)
        self._blocks = tuple(
            Block(self.memory[at : at + BLOCK_BYTES])
            for at in range(0, len(self.memory), BLOCK_BYTES)
        )
        self._free: SimpleQueue[Block] = SimpleQueue()
        for block in self._blocks:
            self._free.put(block)

    @contextlib.contextmanager
    def block(self) -> Iterator[Block]:
        """A block that nobody uses; waits for one. Blocks."""
        block = self._free.get()
        try:
            block.settle()
            yield block
        finally:
            self._free.put(block)

    def settle(self) -> None:
        """Wait for every copy. No block may be taken."""
        for block in self._blocks:
            block.settle()


def _aligned(size: int) -> tuple[memoryview, int]:
    """Private memory on a huge page's boundary, and its address; in huge pages where possible."""
    mapping = mmap.mmap(-1, size + BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    skip = -address % BLOCK_BYTES
    return memoryview(mapping)[skip : skip + size], address + skip

"""What has arrived of a checkpoint on its way to DRAM: an engine may begin on its first layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.ids import CheckpointId


class Arriving:
    """A checkpoint whose file in DRAM is being filled. Use from one event loop only.

    The record of what has arrived is its own queue: it is as long as the index has chunks, it is
    shared, and each follower keeps its place in it. A late one finds all of it.
    """

    def __init__(
        self, checkpoint: CheckpointId, index: Index, index_bytes: bytes, *, bin_path: Path, fd: int
    ) -> None:
        self.checkpoint = checkpoint
        self.index = index
        self.index_bytes = index_bytes
        """The `.idx`, which lies beside the `.bin` only when that is whole."""
        self.bin_path = bin_path
        """Where the file will be once it is whole."""
        self.whole = False
        """Whether everything arrived; with `ended` and without this, the load failed."""
        self._fd = fd
        self._numbers: list[int] = []
        self._followers: list[Callable[[], None]] = []

    @property
    def numbers(self) -> Sequence[int]:
        """The chunks that are there and match their digests, by number, in order of arrival."""
        return self._numbers

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._fd < 0

    def open(self) -> int:
        """A descriptor of the file, read-only and the caller's own. The file has its full length
        from the beginning; what of it may be read, `numbers` tells. Not to be called when
        `ended`."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def follow(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have `listener` called after each arrival and at the end; what is returned undoes it."""
        self._followers.append(listener)
        return lambda: self._followers.remove(listener)

    def add(self, number: int) -> None:
        """A chunk is there. Only for who fills the file."""
        self._numbers.append(number)
        self._tell()

    def end(self, *, whole: bool) -> None:
        """Nothing more will come. Idempotent: the first one counts. Only for who fills the file."""
        if self.ended:
            return
        self.whole = whole
        self._fd = -1
        self._tell()

    def _tell(self) -> None:
        for listener in tuple(self._followers):
            listener()


OnArriving = Callable[[Arriving], None]
"""Told once a load at most, before its first byte arrives or as soon as one joins it."""

"""Which chunks of the checkpoint are here: told by the agent while they still move."""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from serverlessllm.backends.base import ALL_ARRIVED, ARRIVALS_FD
from serverlessllm.checkpoint.index import Index

_READ_BYTES = 4096
_NUMBER_BYTES = 4
LOAD_FAILED_STATUS = 3


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """One layer's start, for `GET /trace`; times of the machine's monotonic clock."""

    layer: str
    waited_s: float
    """For its bytes."""
    computed_at_s: float
    """When it began to compute, for the first time."""


class Arrivals:
    """What has come. One thread reads the pipe, any may wait."""

    def __init__(self, index: Index, pipe: int, on_failure: Callable[[], None]) -> None:
        """Owns `pipe`, the read end. `on_failure` is called, by the thread, when the rest will
        never come."""
        self._index = index
        self._pipe = pipe
        self._on_failure = on_failure
        self._arrived = threading.Condition()
        self._at_s: dict[int, float] = {}
        self._complete = False
        threading.Thread(target=self._read, name="arrivals", daemon=True).start()

    @staticmethod
    def of_environment(index: Index) -> Arrivals | None:
        """None: everything is here."""
        pipe = os.environ.pop(ARRIVALS_FD, None)
        return None if pipe is None else Arrivals(index, int(pipe), _end_process)

    @property
    def complete(self) -> bool:
        """Whether everything is here."""
        return self._complete

    @property
    def times_s(self) -> dict[int, float]:
        """When each chunk that has come was heard of, on the machine's monotonic clock."""
        with self._arrived:
            return dict(self._at_s)

    def chunks(self, offset: int, size_bytes: int) -> range:
        """Numbers of the chunks that these bytes lie in."""
        if not size_bytes:
            return range(0)
        grid = self._index.chunk_bytes
        return range(offset // grid, (offset + size_bytes - 1) // grid + 1)

    def wait(self, chunks: Iterable[int]) -> None:
        """Return when all of these are here."""
        wanted = set(chunks)
        with self._arrived:
            self._arrived.wait_for(lambda: self._complete or wanted <= self._at_s.keys())

    def wait_all(self) -> None:
        """Return when everything is here."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._complete)

    def _read(self) -> None:
        rest = b""
        while not self._complete and (data := os.read(self._pipe, _READ_BYTES)):
            rest += data
            whole = len(rest) // _NUMBER_BYTES * _NUMBER_BYTES
            self._take([number for (number,) in struct.iter_unpack("<I", rest[:whole])])
            rest = rest[whole:]
        os.close(self._pipe)
        if not self._complete:
            self._on_failure()

    def _take(self, numbers: list[int]) -> None:
        now_s = time.monotonic()
        with self._arrived:
            for number in numbers:
                if number == ALL_ARRIVED:
                    self._complete = True
                else:
                    self._at_s.setdefault(number, now_s)
            self._arrived.notify_all()


def _end_process() -> None:
    """A request that waits for what never comes must not wait for ever."""
    sys.stderr.write("the checkpoint's load failed: not all of it arrived\n")
    sys.stderr.flush()
    os._exit(LOAD_FAILED_STATUS)

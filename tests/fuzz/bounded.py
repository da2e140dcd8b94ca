"""One execution under the bounds that every parser keeps: 64 MiB of memory, a second of CPU."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

MEMORY_BYTES_MAX = 64 << 20
CPU_S_MAX = 1.0
_LOOK_EVERY = 256
"""Executions between two looks at what the process itself (the fuzzer's corpus) has grown to."""
_DATA_FIELD = 5


class TooSlow(Exception):
    """An execution took more CPU time than a parser may."""


class Bounded:
    """Runs a target; `MemoryError` and `TooSlow` leave it like any other finding."""

    def __init__(self, target: Callable[[bytes], None]) -> None:
        self._target = target
        self._runs = 0
        signal.signal(signal.SIGVTALRM, _too_slow)

    def __call__(self, data: bytes) -> None:
        if self._runs % _LOOK_EVERY == 0:
            limit_memory(MEMORY_BYTES_MAX)
        self._runs += 1
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S_MAX)
        try:
            self._target(data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def limit_memory(more_bytes: int) -> None:
    """Let this process's data grow by so much from where it is."""
    pages = int(Path("/proc/self/statm").read_text().split()[_DATA_FIELD])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlow(f"over {CPU_S_MAX:g} s of CPU")

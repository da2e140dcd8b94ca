"""What this machine can do: the limits that loads are compared with. Blocking; under 0.3 s."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import msgspec

from serverlessllm.core.units import MIB
from serverlessllm.loader.speeds import Limits
from serverlessllm.loader.tiers.nvme import DirectFile

_CACHE_NAME = ".limits.json"
_BLOCK_BYTES = 8 * MIB
_BLOCKS = 8
_THREADS = 4
_MEMCPY_BYTES = 32 * MIB
_BUDGET_S = 0.1
"""For the repetitions of one measurement."""


class _Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The cached limits, and the device they were measured on."""

    device: int
    limits: Limits


def measured_limits(directory: Path) -> Limits:
    """The limits of this machine, from a file in `directory` when it was measured before.

    Raises:
        OSError: the directory cannot be written.
    """
    cache = directory / _CACHE_NAME
    device = directory.stat().st_dev
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(cache.read_bytes(), type=_Measured)
        if known.device == device:
            return known.limits
    limits = Limits(disk_bytes_s=measure_disk(directory), memcpy_bytes_s=measure_memcpy())
    cache.write_bytes(msgspec.json.encode(_Measured(device=device, limits=limits)))
    return limits


def measure_disk(directory: Path) -> float:
    """Bytes/s of sequential direct reads in `directory`, several at once: its best round.

    Raises:
        OSError: the directory cannot be written, or is full.
    """
    size = _BLOCK_BYTES * _BLOCKS
    offsets = range(0, size, _BLOCK_BYTES)
    with contextlib.ExitStack() as stack:
        memory = mmap.mmap(-1, size)
        memory.write(os.urandom(_BLOCK_BYTES) * _BLOCKS)  # some disks are quick with zeros only
        view = memoryview(memory)
        nameless = stack.enter_context(tempfile.TemporaryFile(dir=directory))
        file = DirectFile(Path(f"/proc/self/fd/{nameless.fileno()}"), os.O_RDWR)
        stack.callback(file.close)
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))

        def read(offset: int) -> None:
            file.read_into(view[offset : offset + _BLOCK_BYTES], offset, _BLOCK_BYTES)

        os.posix_fallocate(nameless.fileno(), 0, size)
        file.write(view, 0)
        return size / _best_s(lambda: list(pool.map(read, offsets)))


def measure_memcpy() -> float:
    """Bytes/s that one thread copies from memory to memory: its best round."""
    source = memoryview(bytearray(_MEMCPY_BYTES))
    target = memoryview(bytearray(_MEMCPY_BYTES))

    def copy() -> None:
        target[:] = source

    return _MEMCPY_BYTES / _best_s(copy)


def _best_s(work: Callable[[], object]) -> float:
    """The quickest of the rounds that fit the budget, at least two."""
    best = float("inf")
    begun = perf_counter()
    rounds = 0
    while rounds < 2 or perf_counter() - begun < _BUDGET_S:
        start = perf_counter()
        work()
        best = min(best, perf_counter() - start)
        rounds += 1
    return best

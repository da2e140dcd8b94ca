"""What this machine can do: the limits that loads are compared with. Blocking; under 0.3 s."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import msgspec

from serverlessllm.core.units import MIB
from serverlessllm.loader.accelerator import Accelerator
from serverlessllm.loader.speeds import Limits
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.loader.tiers.staging import BLOCK_BYTES, Staging

_CACHE_NAME = ".limits.json"
_DISK_BYTES = 64 * MIB
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
    offsets = range(0, _DISK_BYTES, BLOCK_BYTES)
    staging = Staging(_THREADS)
    with contextlib.ExitStack() as stack:
        nameless = stack.enter_context(tempfile.TemporaryFile(dir=directory))
        file = DirectFile(Path(f"/proc/self/fd/{nameless.fileno()}"), os.O_RDWR)
        stack.callback(file.close)
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))

        def read(offset: int) -> None:
            with staging.block() as block:
                file.read_into(block.memory, offset, BLOCK_BYTES)

        os.posix_fallocate(nameless.fileno(), 0, _DISK_BYTES)
        with staging.block() as block:
            block.memory[:] = os.urandom(BLOCK_BYTES)  # some disks are quick with zeros only
            for offset in offsets:
                file.write(block.memory, offset)
        return _DISK_BYTES / _best_s(lambda: list(pool.map(read, offsets)))


def measure_memcpy() -> float:
    """Bytes/s that one thread copies from memory to memory: its best round."""
    source = memoryview(bytearray(_MEMCPY_BYTES))
    target = memoryview(bytearray(_MEMCPY_BYTES))

    def copy() -> None:
        target[:] = source

    return _MEMCPY_BYTES / _best_s(copy)


def measure_device(accelerator: Accelerator, ring: Staging) -> float:
    """Bytes/s of copies from the locked `ring` to the first device: the best round.

    Raises:
        OutOfSpace: the device has no room for one block.
    """
    allocation = accelerator.allocate(min(accelerator.total_bytes()), BLOCK_BYTES)

    def copy() -> None:
        for offset in range(0, len(ring.memory), BLOCK_BYTES):
            allocation.copy(ring.memory[offset : offset + BLOCK_BYTES], 0)
        allocation.mark().wait()

    try:
        return len(ring.memory) / _best_s(copy)
    finally:
        allocation.free()


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

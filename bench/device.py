"""Ways from DRAM to a GPU, beside the machine's own copies from locked memory.

    python -m bench.device [SIZE] [--rounds N] [--gpu N]

Prints, as medians of N rounds (5 by default), the rate of each and its share of the limit: the
loader's ring with 1 to 16 threads; and the alternative, to lock the file's own mapping first, with
and without the time that locking takes. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import mmap
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import addressof, c_char
from time import perf_counter

import torch

from serverlessllm.core.units import MIB, format_size, parse_size_bytes
from serverlessllm.loader.accelerator import Event
from serverlessllm.loader.device import Cuda
from serverlessllm.loader.plan import ChunkRange
from serverlessllm.loader.pour import Unchecked, pour
from serverlessllm.loader.tiers.dram import DramFile
from serverlessllm.loader.tiers.staging import Staging

CHUNK_BYTES = 16 * MIB
THREADS = (1, 2, 4, 8, 16)
LIMIT = "torch's locked memory"


def timed(work: Callable[[], object]) -> float:
    """Seconds until the GPU has done all of it."""
    torch.cuda.synchronize()
    begun = perf_counter()
    work()
    torch.cuda.synchronize()
    return perf_counter() - begun


class Ring:
    """The loader's way: blocks that were locked once, filled by threads."""

    def __init__(self, gpu: int, size: int, threads: int) -> None:
        self._cuda = Cuda((gpu,))
        self._staging = Staging(2 * threads)
        self._cuda.start(self._staging)
        self._memory = self._cuda.allocate(gpu, size)
        self._pool = ThreadPoolExecutor(threads)

    def write(self, view: memoryview, offset: int) -> Event:
        return self._memory.copy(view, offset)

    def fill(self, file: DramFile, size: int) -> None:
        def move(offset: int) -> None:
            chunk = ChunkRange(number=0, offset=offset, size_bytes=min(CHUNK_BYTES, size - offset))
            assert pour(file, self, chunk, Unchecked(), self._staging)

        list(self._pool.map(move, range(0, size, CHUNK_BYTES)))

    def close(self) -> None:
        self._staging.settle()
        self._pool.shutdown()
        self._memory.free()
        self._cuda.close()


def locked(fd: int, target: torch.Tensor) -> tuple[float, float]:
    """The file's mapping, locked for one copy: seconds of the copy, and of all of it."""
    begun = perf_counter()
    with mmap.mmap(fd, len(target)) as mapping:
        head = c_char.from_buffer(mapping)
        source = torch.frombuffer(mapping, dtype=torch.uint8)
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch's own
        assert int(cudart.cudaHostRegister(addressof(head), len(target), 0)) == 0
        copied_s = timed(functools.partial(target.copy_, source, non_blocking=True))
        assert int(cudart.cudaHostUnregister(addressof(head))) == 0
        del head, source
    return copied_s, perf_counter() - begun


def run(size: int, rounds: int, gpu: int) -> None:
    torch.cuda.set_device(gpu)
    target = torch.empty(size, dtype=torch.uint8, device=f"cuda:{gpu}")
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryFile(dir="/dev/shm") as disk, contextlib.ExitStack() as stack:
        for _ in range(0, size, CHUNK_BYTES):
            disk.write(os.urandom(CHUNK_BYTES))
        disk.truncate(size)
        file = DramFile(disk.fileno(), size)
        stack.callback(file.close)
        rings = {threads: Ring(gpu, size, threads) for threads in THREADS}
        for way in rings.values():
            stack.callback(way.close)
        for _ in range(rounds + 1):  # the first one warms up
            note = samples.setdefault
            note(LIMIT, []).append(timed(lambda: target.copy_(source, non_blocking=True)))
            for threads, way in rings.items():
                seconds = timed(functools.partial(way.fill, file, size))
                note(f"ring, {threads} threads", []).append(seconds)
            copied_s, all_s = locked(disk.fileno(), target)
            note("mapping, already locked", []).append(copied_s)
            note("mapping, locked for it", []).append(all_s)
    medians = {way: statistics.median(seconds[1:]) for way, seconds in samples.items()}
    print(f"{format_size(size)} to {torch.cuda.get_device_name(gpu)}, median of {rounds}")
    for name, seconds in medians.items():
        share = medians[LIMIT] / seconds
        print(f"{name:24} {size / seconds / 1e9:7.2f} GB/s   {share:5.2f} of the limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("size", nargs="?", default="2GiB", type=parse_size_bytes)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs hardware: an NVIDIA GPU")
    run(options.size, options.rounds, options.gpu)


if __name__ == "__main__":
    main()

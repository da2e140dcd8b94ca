"""Bandwidth of each hop of the loader, as a share of what this machine can do.

    python -m bench.load_tiers [SIZE] [--rounds N] [--dir DIR]

Prints medians of N rounds (5 by default) beside the limit of the hop: direct reads of the disk
that DIR is on, or memcpy. Ratios travel between machines; the absolute numbers do not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from time import perf_counter

from blake3 import blake3
from crc32c import crc32c

from serverlessllm.checkpoint.index import (
    CHUNK_BYTES,
    Chunk,
    Index,
    Tensor,
    encode_index,
)
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.core.units import format_size, parse_size_bytes
from serverlessllm.loader.measure import measure_disk, measure_memcpy
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings


async def publish(store: CheckpointStore, work: Path, size_bytes: int) -> CheckpointRef:
    """A checkpoint of random bytes."""
    path = work / "model.bin"
    chunks = []
    with path.open("wb") as file:
        for offset in range(0, size_bytes, CHUNK_BYTES):
            data = os.urandom(min(CHUNK_BYTES, size_bytes - offset))
            chunks.append(Chunk(blake3=blake3(data).hexdigest(), crc32c=crc32c(data)))
            file.write(data)
    tensor = Tensor(name="w", dtype="U8", shape=(size_bytes,), offset=0, size_bytes=size_bytes)
    index = Index(
        model="bench",
        source="file:///bench",
        revision="r1",
        kind="tensors",
        size_bytes=size_bytes,
        chunks=tuple(chunks),
        tensors=(tensor,),
    )
    ref = await store.publish("bench/r1", path, encode_index(index))
    path.unlink()
    return ref


async def measure(
    loader: Loader, ref: CheckpointRef, rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Bytes/s by hop of each round, and the seconds of a load that finds the bytes in DRAM."""
    rates: dict[str, list[float]] = defaultdict(list)
    warm: list[float] = []
    for _ in range(rounds):
        for level in (CacheLevel.STORE, CacheLevel.NVME):
            await loader.evict(ref.id, level)
            async with await loader.load(ref, CacheLevel.DRAM) as resident:
                for hop in resident.hops:
                    rates[hop.hop].append(hop.bytes_moved / hop.seconds)
            await loader.settled()
        started = perf_counter()
        (await loader.load(ref, CacheLevel.DRAM)).release()
        warm.append(perf_counter() - started)
    return rates, warm


async def run(size_bytes: int, rounds: int, work: Path) -> None:
    """Everything under `work` and one directory of /dev/shm, both removed at the end."""
    shm = Path(tempfile.mkdtemp(prefix="sllm-bench-", dir="/dev/shm"))
    settings = LoaderSettings(
        dram_dir=str(shm), dram_budget_bytes=size_bytes, nvme_budget_bytes=size_bytes
    )
    clock = SystemClock()
    store = open_store((work / "store").as_uri(), StoreSettings(), clock)
    loader = Loader(settings, store=store, clock=clock, data_dir=work)
    try:
        ref = await publish(store, work, size_bytes)
        await loader.start()
        await loader.settled()
        disk, memcpy = measure_disk(work), measure_memcpy()
        rates, warm = await measure(loader, ref, rounds)
        print(f"{format_size(size_bytes)}, median of {rounds}")
        print(f"disk, direct reads {disk / 1e9:6.2f} GB/s    memcpy {memcpy / 1e9:6.2f} GB/s")
        for hop, samples in rates.items():
            rate = statistics.median(samples)
            print(
                f"{hop:12} {rate / 1e9:6.2f} GB/s   {rate / disk:5.2f} of the disk   "
                f"{rate / memcpy:5.2f} of memcpy"
            )
        print(f"already in dram: {statistics.median(warm) * 1000:.2f} ms")
    finally:
        await loader.close()
        shutil.rmtree(shm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("size", nargs="?", default="256MiB", type=parse_size_bytes)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sllm-bench-", dir=options.dir) as work:
        asyncio.run(run(options.size, options.rounds, Path(work)))


if __name__ == "__main__":
    main()

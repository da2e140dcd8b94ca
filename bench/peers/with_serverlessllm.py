"""Our loader, to tensors that are views of what lies in DRAM.

`store` and `nvme` begin there; `recycled` begins in nvme while the DRAM tier is full of another
model; `dram` finds the bytes where a process before it left them. `fill` only brings everything
to nvme, `leave` one checkpoint to DRAM.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
from collections.abc import Mapping

import torch
import uvloop
from bench.peers.timed import timed
from bench.place import Place

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.references import Resident
from serverlessllm.loader.service import Loader
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings


def views(resident: Resident) -> Mapping[str, torch.Tensor]:
    """The checkpoint's tensors where they lie; all of them are BF16."""
    with resident.bin_path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    data = torch.frombuffer(mapping, dtype=torch.uint8)
    return {
        tensor.name: data[tensor.offset : tensor.offset + tensor.size_bytes]
        .view(torch.bfloat16)
        .reshape(tensor.shape)
        for tensor in resident.index.tensors
    }


async def bring(loader: Loader, ref: CheckpointRef, level: CacheLevel) -> None:
    """To a tier, and no further."""
    (await loader.load(ref, level)).release()
    await loader.settled()


async def prepare(mode: str, loader: Loader, place: Place) -> None:
    """Have the checkpoints where the mode begins."""
    wanted, other = place.checkpoints
    await loader.start()
    await loader.settled()
    match mode:
        case "fill":
            await bring(loader, wanted, CacheLevel.NVME)
            await bring(loader, other, CacheLevel.NVME)
        case "leave":
            await bring(loader, wanted, CacheLevel.DRAM)
        case "recycled":
            await bring(loader, other, CacheLevel.DRAM)
        case "store" | "nvme":
            await loader.evict(wanted.id, CacheLevel[mode.upper()])


async def clear(loader: Loader, place: Place) -> None:
    """Leave nothing in DRAM."""
    await loader.settled()
    for ref in place.checkpoints:
        await loader.evict(ref.id, CacheLevel.NVME)


def main(mode: str, place: Place) -> None:
    clock = SystemClock()
    store = open_store(place.store_dir.as_uri(), StoreSettings(), clock)
    settings = place.settings(nvme=mode != "store")
    loader = Loader(settings, store=store, clock=clock, data_dir=place.data_dir)
    held: list[Resident] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        def load() -> Mapping[str, torch.Tensor]:
            held.append(runner.run(loader.load(place.checkpoints[0], CacheLevel.DRAM)))
            return views(held[0])

        try:
            runner.run(prepare(mode, loader, place))
            if mode not in {"fill", "leave"}:
                timed(load)
                for resident in held:
                    resident.release()
                runner.run(clear(loader, place))
        finally:
            runner.run(loader.close())


if __name__ == "__main__":
    main(sys.argv[1], Place.decode(sys.argv[2]))

"""The door of a trial: private tiers, a loader of its own on them, and the tier's trial."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME, Index, checkpoint_id, decode_index
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.accelerator import Accelerator
from serverlessllm.loader.budget import whole_pages
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.trial.device import try_device
from serverlessllm.loader.trial.disk import try_disk
from serverlessllm.loader.trial.dram import try_dram
from serverlessllm.loader.trial.place import check_memory, check_room, private_directory
from serverlessllm.loader.trial.report import Report, Tell
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings

_PREFIX = "trial/r1"
_SHM = Path("/dev/shm")  # noqa: S108 - the tier is a tmpfs


class Stand(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, and a loader that has tiers of its own for it."""

    ref: CheckpointRef
    index: Index
    bin_path: Path
    """In the store."""
    loader: Loader
    settings: LoaderSettings
    """With the private directories in them."""


async def measure(
    index_path: Path,
    source: CacheLevel,
    *,
    disk: Path,
    settings: LoaderSettings,
    rounds: int,
    tell: Tell,
    open_accelerator: Callable[[], Accelerator | None] = lambda: None,
) -> Report:
    """Loads of the checkpoint whose `.idx` is at `index_path` from a tier on: medians of `rounds`.

    `source` STORE or NVME: to DRAM. DRAM: to another process. DEVICE: from DRAM to what
    `open_accelerator` opens. Takes room for a copy in /dev/shm, and for one in `disk`, a
    directory, where `source` is NVME. Of `settings` the directories and budgets are not used.

    Raises:
        CheckpointError: the checkpoint is not valid.
        OutOfSpace: there is no room for the copies.
        LoadFailed: a load, the second process or the device failed.
        OSError: a file of the checkpoint cannot be read, `disk` not written.
    """
    accelerator = open_accelerator() if source is CacheLevel.DEVICE else None
    async with stand(
        index_path, source, disk=disk, settings=settings, accelerator=accelerator
    ) as at:
        if source is CacheLevel.DEVICE:
            beside = open_accelerator()
            assert beside is not None
            return await try_device(at.loader, at.ref, beside, rounds=rounds, tell=tell)
        if source is CacheLevel.DRAM:
            return await try_dram(at.loader, at.ref, rounds=rounds, tell=tell)
        path = at.bin_path
        if source is CacheLevel.NVME:
            async with await at.loader.load(at.ref, CacheLevel.NVME) as resident:
                path = resident.bin_path
        return await try_disk(
            *(at.loader, at.ref, source, path, at.index, at.settings), rounds=rounds, tell=tell
        )


@contextlib.asynccontextmanager
async def stand(
    index_path: Path,
    source: CacheLevel,
    *,
    disk: Path,
    settings: LoaderSettings,
    accelerator: Accelerator | None = None,
) -> AsyncIterator[Stand]:
    """A loader with tiers of its own for one checkpoint; raises as `measure`."""
    data = await asyncio.to_thread(index_path.read_bytes)
    index = decode_index(data)
    size = index.size_bytes
    nvme_bytes = whole_pages(size) if source is CacheLevel.NVME else 0
    check_room(_SHM, size, "the copy in DRAM")
    check_memory(size)
    check_room(disk, nvme_bytes, "the copy on the disk")
    with private_directory(_SHM) as shm, private_directory(disk) as work:
        own = msgspec.structs.replace(
            settings,
            dram_dir=str(shm / "dram"),
            dram_budget_bytes=whole_pages(size),
            nvme_dir=str(work / "nvme"),
            nvme_budget_bytes=nvme_bytes,
        )
        clock = SystemClock()
        store = open_store(_linked(index_path, work).as_uri(), StoreSettings(), clock)
        loader = Loader(own, store=store, clock=clock, data_dir=work, accelerator=accelerator)
        try:
            await loader.start()
            await loader.settled()
            yield Stand(
                ref=CheckpointRef(id=checkpoint_id(data), prefix=_PREFIX, size_bytes=size),
                index=index,
                bin_path=index_path.with_suffix(".bin").resolve(),
                loader=loader,
                settings=own,
            )
        finally:
            await loader.close()


def _linked(index_path: Path, work: Path) -> Path:
    """A store in which the checkpoint is: links to its two files where they lie."""
    root = work / "store"
    inside = root / _PREFIX
    inside.mkdir(parents=True)
    (inside / IDX_NAME).symlink_to(index_path.resolve())
    (inside / BIN_NAME).symlink_to(index_path.with_suffix(".bin").resolve())
    return root

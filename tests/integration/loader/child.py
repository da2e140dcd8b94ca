"""Another process of the machine: loads one checkpoint, held back until told to go on.

    python child.py '{"root": …, "shm": …, "store": …, "ref": …, "level": 1}'

Prints `reading` when it has asked the store for bytes (or `copying`: when bytes have arrived),
waits for a line on stdin, finishes, prints `loaded`, and holds the checkpoint until stdin ends.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_objects
from serverlessllm.store.settings import StoreSettings


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    root: str
    store: str
    settings: LoaderSettings
    ref: CheckpointRef
    level: CacheLevel
    ranges_before_wait: int = 0


def say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


class HeldBack(CheckpointStore):
    """Serves some ranges, then waits for a line on stdin."""

    def __init__(self, folder: str, ranges: int) -> None:
        objects = open_objects(Path(folder).as_uri(), StoreSettings(), SystemClock())
        super().__init__(objects)
        self._free = ranges
        self._told: asyncio.Task[str] | None = None

    def local_bin(self, prefix: str) -> Path | None:
        return None

    async def read_range(self, prefix: str, offset: int, size: int) -> memoryview:
        if self._free > 0:
            self._free -= 1
            return await super().read_range(prefix, offset, size)
        if self._told is None:
            say("reading")
            self._told = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
        await asyncio.shield(self._told)
        return await super().read_range(prefix, offset, size)


async def main(orders: Orders) -> None:
    store = HeldBack(orders.store, orders.ranges_before_wait)
    clock = SystemClock()
    loader = Loader(orders.settings, store=store, clock=clock, data_dir=Path(orders.root))
    await loader.start()
    async with await loader.load(orders.ref, orders.level):
        say("loaded")
        await asyncio.to_thread(sys.stdin.read)
    await loader.close()


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Orders)))

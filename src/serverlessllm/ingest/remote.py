"""Remote files as the converter reads them: ranges ahead of it, in bounded memory."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import msgspec

from serverlessllm.core.errors import CheckpointError, SLLMError, SourceUnavailable
from serverlessllm.ingest.errors import SourceChanged, SourceDenied
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.store.errors import AccessDenied, ObjectChanged, ObjectMissing
from serverlessllm.store.objects import ObjectInfo, Objects


class Fetcher:
    """Ranged reads for blocking callers: an event loop in a thread, and the blocks it read.

    Memory: `cached_blocks` x `block_bytes`, over all files together.
    """

    def __init__(self, settings: IngestSettings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetcher")
        self._blocks: OrderedDict[tuple[RemoteFile, int], Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        async def finish() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def list(self, objects: Objects, folder: str = "") -> list[ObjectInfo]:
        """The objects of a folder."""

        async def gather() -> list[ObjectInfo]:
            return [info async for info in objects.list(folder)]

        return asyncio.run_coroutine_threadsafe(gather(), self._loop).result()

    def head(self, objects: Objects, path: str) -> ObjectInfo:
        """One object. Raises ObjectMissing."""
        return asyncio.run_coroutine_threadsafe(objects.head(path), self._loop).result()

    def read_into(self, file: RemoteFile, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; what most likely follows is asked for at once."""
        size = self._settings.block_bytes
        end = offset + len(buffer)
        first, last = offset // size, (end - 1) // size
        for number in range(first, last + 1):
            block = self._block(file, number).result()
            start = max(offset, number * size)
            stop = min(end, number * size + len(block))
            buffer[start - offset : stop - offset] = block[
                start - number * size : stop - number * size
            ]

    def _block(self, file: RemoteFile, number: int) -> Future[memoryview]:
        """The block, under way or here; the next ones of the file are under way afterwards."""
        settings = self._settings
        count = -(-file.size_bytes // settings.block_bytes)
        with self._lock:
            is_sequel = (file, number) in self._blocks or (file, number - 1) in self._blocks
            ahead = settings.read_ahead_blocks if is_sequel or number == 0 else 1
            for wanted in reversed(range(number, min(number + ahead, count))):
                if _is_failed(self._blocks.get((file, wanted))):
                    self._blocks[file, wanted] = asyncio.run_coroutine_threadsafe(
                        self._read(file, wanted), self._loop
                    )
                self._blocks.move_to_end((file, wanted))
            block = self._blocks[file, number]
            while len(self._blocks) > max(settings.cached_blocks, ahead):
                self._blocks.popitem(last=False)  # not cancelled: another reader may wait for it
            return block

    async def _read(self, file: RemoteFile, number: int) -> memoryview:
        start = number * self._settings.block_bytes
        size = min(self._settings.block_bytes, file.size_bytes - start)
        return memoryview(await file.objects.read(file.path, start, size, etag=file.etag))


def _is_failed(block: Future[memoryview] | None) -> bool:
    """Whether a block is not here and not under way."""
    return block is None or (block.done() and (block.cancelled() or block.exception() is not None))


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A `RawFile` of an object store or of the hub."""

    name: str
    path: str
    size_bytes: int
    etag: str | None
    """Pinned: every range comes from one version."""
    version: str
    objects: Objects
    fetcher: Fetcher

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `RawFile.read_into`."""
        if offset < 0 or offset + len(buffer) > self.size_bytes:
            raise CheckpointError(f"{self.name}: ends at byte {self.size_bytes}")
        try:
            if buffer:
                self.fetcher.read_into(self, offset, buffer)
        except (SLLMError, ObjectMissing) as error:
            raise as_source_error(error, self.name, self.objects.where) from None


def as_source_error(error: Exception, name: str, where: str) -> SLLMError:
    """What went wrong with `name` of the source `where`, said of a source, not of our store."""
    match error:
        case ObjectMissing() | ObjectChanged():
            return SourceChanged(f"{name}: changed in {where} while it was read; try again")
        case AccessDenied():
            return SourceDenied(
                f"{where} refuses to give {name}: its owner must grant access, and the token or "
                "keys of that account must be set (HF_TOKEN for the hub)"
            )
        case CheckpointError() | SourceUnavailable():
            return error
        case SLLMError():
            return SourceUnavailable(
                error.message.replace("the store", "the source"), retry_after_s=5.0
            )
        case _:
            return SourceUnavailable(f"{where} does not give {name}")

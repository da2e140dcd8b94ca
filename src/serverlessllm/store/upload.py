"""Publishing one checkpoint behind the converter that still writes it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import obstore
from obstore.exceptions import BaseError

from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME, checkpoint_id, decode_index
from serverlessllm.core.errors import CheckpointError, Conflict
from serverlessllm.core.models import CheckpointRef
from serverlessllm.store.errors import ObjectExists, ObjectMissing, translate
from serverlessllm.store.layout import check_prefix
from serverlessllm.store.local import HeldFolder
from serverlessllm.store.objects import Objects

T = TypeVar("T")

PARTS_MAX = 9_000
"""S3 allows 10,000 parts an upload: a larger file gets larger parts."""


async def uninterrupted(work: Awaitable[T]) -> T:
    """Await `work` to its end even when we are cancelled, and only then be cancelled.

    What would otherwise stay behind: a multipart upload nobody can abort, a thread that still
    writes.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()
        raise


class Upload:
    """`async with store.upload(prefix) as upload:` then `advance`, many times, and `publish`.

    Left without `publish`, by an error or a cancellation, it aborts: nothing stays in the store.
    """

    def __init__(self, objects: Objects, prefix: str, size_bytes: int | None = None) -> None:
        self._objects = objects
        self._prefix = check_prefix(prefix)
        settings = objects.settings
        self._part_bytes = max(settings.part_bytes, -(-(size_bytes or 0) // PARTS_MAX))
        self._sent_bytes = 0
        self._folder: HeldFolder | None = None
        self._writer: obstore.AsyncWritableFile | None = None
        self._file: int | None = None

    async def __aenter__(self) -> Self:
        if (root := self._objects.root) is not None:
            try:
                self._folder = await uninterrupted(
                    asyncio.to_thread(HeldFolder, root, self._prefix)
                )
            except OSError as error:
                raise translate(error, self._objects.where) from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._abort()
        finally:
            if self._file is not None:
                os.close(self._file)
            if self._folder is not None:
                await uninterrupted(asyncio.to_thread(self._folder.release))

    async def advance(self, path: Path, ready_bytes: int) -> None:
        """Send what is final: the first `ready_bytes` bytes of `path`, as far as whole parts go.

        The file may be renamed afterwards, not replaced.
        """
        if self._links(path):
            return
        if self._file is None:
            try:
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return  # renamed already: `publish` sends all of it
        await self._send(path, ready_bytes - ready_bytes % self._part_bytes)

    async def publish(self, bin_path: Path, index: bytes) -> CheckpointRef:
        """Send the rest of the `.bin`, then create the `.idx`.

        Another publisher of the very same checkpoint is no error: its `.idx` is ours.

        Raises:
            Conflict: the prefix holds another checkpoint.
            CheckpointError: `index` is not valid, or is not of this `.bin`.
            OutOfSpace, StoreUnavailable: nothing was published.
        """
        decoded = await asyncio.to_thread(decode_index, index)
        found_bytes = (await asyncio.to_thread(bin_path.stat)).st_size
        if decoded.size_bytes != found_bytes:
            raise CheckpointError(
                f"the index of {self._prefix} says {decoded.size_bytes} bytes, the .bin has "
                f"{found_bytes}: convert it again"
            )
        ref = CheckpointRef(
            id=checkpoint_id(index),
            prefix=self._prefix,
            size_bytes=decoded.size_bytes,
            base=decoded.base,
        )
        if await self._is_published(index):
            return ref
        try:
            await self._finish_bin(bin_path, decoded.size_bytes)
            if await self._is_published(index):
                return ref
            try:
                await self._objects.put_new(f"{self._prefix}/{IDX_NAME}", index)
            except ObjectExists:
                await self._is_published(index)
                return ref
            if self._folder is not None:
                await uninterrupted(asyncio.to_thread(self._folder.sync, IDX_NAME))
        except (BaseError, OSError) as error:
            raise translate(error, self._objects.where) from None
        return ref

    async def _is_published(self, index: bytes) -> bool:
        """Whether the prefix already holds `index`. Raises Conflict when it holds another."""
        path = f"{self._prefix}/{IDX_NAME}"
        try:
            info = await self._objects.head(path)
            if info.size_bytes == len(index) and index == await self._objects.read(
                path, 0, info.size_bytes, etag=info.etag
            ):
                return True
        except ObjectMissing:
            return False
        raise Conflict(
            f"the store already holds another checkpoint at {self._prefix}: delete it first "
            "(`sllm rm`), or name another revision"
        )

    def _links(self, path: Path) -> bool:
        return self._folder is not None and self._folder.can_link(path)

    async def _finish_bin(self, path: Path, size_bytes: int) -> None:
        if self._folder is not None and self._links(path):
            await uninterrupted(asyncio.to_thread(self._folder.link, path, BIN_NAME))
            return
        await self._send(path, size_bytes)
        if self._writer is not None:
            writer, self._writer = self._writer, None
            await uninterrupted(writer.close())
        if self._folder is not None:
            await uninterrupted(asyncio.to_thread(self._folder.sync, BIN_NAME))

    async def _send(self, path: Path, end: int) -> None:
        """Stream the file from where we are up to `end`; memory: the parts in flight."""
        try:
            while self._sent_bytes < end:
                file, writer = self._opened(path)
                size = min(self._part_bytes, end - self._sent_bytes)
                part = await asyncio.to_thread(os.pread, file, size, self._sent_bytes)
                if not part:
                    raise CheckpointError(f"the .bin of {self._prefix} is shorter than it was")
                self._sent_bytes += len(part)  # first: a cancelled write is carried out too
                await uninterrupted(writer.write(part))
        except (BaseError, OSError) as error:
            raise translate(error, self._objects.where) from None

    def _opened(self, path: Path) -> tuple[int, obstore.AsyncWritableFile]:
        if self._file is None:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if self._writer is None:
            self._writer = obstore.open_writer_async(
                self._objects.uploads,
                f"{self._prefix}/{BIN_NAME}",
                buffer_size=self._part_bytes,
                max_concurrency=self._objects.settings.upload_concurrency,
            )
        return self._file, self._writer

    async def _abort(self) -> None:
        """Abort the unfinished upload; that the store cannot be told now is no new error."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            await uninterrupted(writer.__aexit__(CheckpointError, None, None))
        except (BaseError, OSError):
            return

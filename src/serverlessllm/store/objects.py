"""One object store behind bounds: typed errors, retries with jitter, pinned and checked ranges."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import obstore
from obstore import Bytes
from obstore.exceptions import BaseError
from obstore.store import ObjectStore

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import CheckpointError, SLLMError, StoreUnavailable
from serverlessllm.store.errors import ObjectChanged, ObjectMissing, is_retryable, translate
from serverlessllm.store.settings import StoreSettings
from serverlessllm.telemetry.table import STORE_RETRIES

T = TypeVar("T")


class ObjectInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An object as its head describes it."""

    path: str
    size_bytes: int
    etag: str | None


class Objects:
    """The verbs we use of an object store, each bounded in time, tries and size.

    `client` makes one attempt a call (the retries are ours: they are counted and jittered on
    our clock); `uploads` is the same store for uploads, which retry part by part inside.
    `root` is its directory when the store is a folder of this machine. `where` names it in
    messages: scheme and host, never a secret.
    """

    def __init__(
        self,
        client: ObjectStore,
        uploads: ObjectStore,
        *,
        where: str,
        settings: StoreSettings,
        clock: Clock,
        root: Path | None = None,
    ) -> None:
        self.uploads = uploads
        self.where = where
        self.settings = settings
        self.root = root
        self._client = client
        self._clock = clock

    async def head(self, path: str) -> ObjectInfo:
        """Raises ObjectMissing."""
        meta = await self._retry(lambda: obstore.head_async(self._client, path))
        return ObjectInfo(path=path, size_bytes=meta["size"], etag=meta["e_tag"])

    async def read(self, path: str, offset: int, size: int, *, etag: str | None) -> Bytes:
        """Exactly `size` bytes at `offset` of the object that still has `etag`.

        Raises:
            ObjectMissing: it is gone.
            ObjectChanged: it is another one now.
            CheckpointError: it ends before `offset + size`.
            StoreUnavailable: every try failed, came short, or was too slow.
        """
        if size == 0:
            return Bytes(b"")
        bounds = self.settings
        deadline_s = max(bounds.slow_window_s, size / bounds.slow_bytes_s)
        return await self._retry(
            lambda: self._within(deadline_s, self._read_once(path, offset, size, etag))
        )

    async def put_new(self, path: str, data: bytes) -> None:
        """Create the object. Raises ObjectExists when somebody else did."""
        await self._retry(lambda: obstore.put_async(self.uploads, path, data, mode="create"))

    async def delete(self, path: str) -> None:
        """Remove the object; a missing one is fine."""
        with contextlib.suppress(ObjectMissing):
            await self._retry(lambda: obstore.delete_async(self._client, path))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object under the folder `prefix` (`""`: all)."""
        try:
            async for page in obstore.list(self._client, prefix or None):
                for meta in page:
                    yield ObjectInfo(path=meta["path"], size_bytes=meta["size"], etag=meta["e_tag"])
        except (BaseError, OSError) as error:
            raise translate(error, self.where) from None

    async def _read_once(self, path: str, offset: int, size: int, etag: str | None) -> Bytes:
        options: obstore.GetOptions = {"range": (offset, offset + size)}
        if etag is not None:
            options["if_match"] = etag
        answer = await obstore.get_async(self._client, path, options=options)
        if etag is not None and answer.meta["e_tag"] != etag:  # a server that ignores If-Match
            raise ObjectChanged(f"an object of the store {self.where} changed while it was read")
        if offset + size > answer.meta["size"]:
            raise CheckpointError(
                f"an object of the store {self.where} has {answer.meta['size']} bytes, but "
                f"{offset + size} are needed: it is truncated"
            )
        data = await answer.buffer_async()
        if len(data) != size:
            raise StoreUnavailable(
                f"the store {self.where} sent {len(data)} bytes instead of {size}: check for a "
                "proxy that cuts bodies"
            )
        return data

    async def _within(self, deadline_s: float, work: Awaitable[T]) -> T:
        """The result of `work`, given up after `deadline_s`."""
        task = asyncio.ensure_future(work)
        timer = asyncio.ensure_future(self._clock.sleep(deadline_s))
        try:
            await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise StoreUnavailable(
                f"the store {self.where} is too slow (under "
                f"{self.settings.slow_bytes_s / 1e6:.1f} MB/s): check the network to it",
                retry_after_s=5.0,
            )
        finally:
            timer.cancel()
            task.cancel()
            await asyncio.gather(task, timer, return_exceptions=True)

    async def _retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try until it works, fails for good, or the tries are used up."""
        bound_s = self.settings.retry_min_s
        for left in range(self.settings.tries - 1, -1, -1):
            try:
                return await attempt()
            except StoreUnavailable as error:
                failure: Exception = error
            except (BaseError, OSError) as error:
                failure = translate(error, self.where)
            if left == 0 or not is_retryable(failure):
                raise failure from None
            STORE_RETRIES.inc(failure.code if isinstance(failure, SLLMError) else "other")
            await self._clock.sleep(random.uniform(0, bound_s))  # noqa: S311 - jitter
            bound_s = min(bound_s * 2, self.settings.retry_max_s)
        raise AssertionError("settings.tries must be 1 or more")

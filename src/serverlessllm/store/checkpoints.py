"""Checkpoints in a store: `<model>/<revision>/model.bin`, then `model.idx`, create-only.

Who sees an `.idx` has a whole checkpoint. Whatever a crash leaves has no `.idx`: it is invisible,
and the next publisher of that prefix replaces it. On S3 and the like a killed publisher also leaves
an unfinished multipart upload, which only a lifecycle rule of the bucket can find and remove.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME, checkpoint_id, decode_index
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.models import CheckpointRef
from serverlessllm.store.errors import ObjectChanged, ObjectMissing
from serverlessllm.store.layout import check_prefix
from serverlessllm.store.objects import Objects
from serverlessllm.store.upload import Upload

_AGAIN = "ingest the model again (`sllm pull`)"


class CheckpointMissing(CheckpointError):
    """The store has no (whole) checkpoint there."""

    code = "checkpoint_missing"


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that a store holds, as the head of its `.idx` shows it."""

    prefix: str
    index_size_bytes: int
    index_etag: str | None


class CheckpointStore:
    """What every other part asks of the store. One per process; safe for concurrent use.

    `objects` is the store below, for who must see more than checkpoints.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._etags: dict[str, str | None] = {}

    @property
    def where(self) -> str:
        """The store's name for people: scheme and host; no secret, and no path of this machine."""
        return self.objects.where

    @property
    def root(self) -> Path | None:
        """The store's directory when it is a folder of this machine."""
        return self.objects.root

    def local_bin(self, prefix: str) -> Path | None:
        """Where the `.bin` of `prefix` lies, or would, when the store is a folder of this machine:
        for readers that check every byte of it, since it may be replaced at any time."""
        root = self.root
        return None if root is None else root / check_prefix(prefix) / BIN_NAME

    async def head(self, prefix: str) -> Published | None:
        """Whether the checkpoint is there: one request."""
        try:
            info = await self.objects.head(f"{check_prefix(prefix)}/{IDX_NAME}")
        except ObjectMissing:
            return None
        return Published(prefix=prefix, index_size_bytes=info.size_bytes, index_etag=info.etag)

    async def read_index(self, prefix: str) -> bytes:
        """The `.idx` of `prefix`, not yet decoded.

        Raises:
            CheckpointMissing: there is none.
            CheckpointError: it is larger than `index_bytes_max`.
        """
        path = f"{check_prefix(prefix)}/{IDX_NAME}"
        try:
            info = await self.objects.head(path)
            limit = self.objects.settings.index_bytes_max
            if info.size_bytes > limit:
                raise CheckpointError(
                    f"the index of {prefix} is {info.size_bytes} bytes, over the limit of {limit}"
                )
            return bytes(await self.objects.read(path, 0, info.size_bytes, etag=info.etag))
        except ObjectMissing:
            raise _missing(prefix) from None

    async def find(self, prefix: str) -> CheckpointRef | None:
        """The checkpoint of `prefix` as others refer to it.

        None when it is not whole at first sight: its index is missing or not valid, its `.bin` is
        missing or of another size.
        """
        try:
            data = await self.read_index(prefix)
            index = await asyncio.to_thread(decode_index, data)
            found = await self.objects.head(f"{prefix}/{BIN_NAME}")
        except (CheckpointError, ObjectMissing):
            return None
        if found.size_bytes != index.size_bytes:
            return None
        return CheckpointRef(
            id=checkpoint_id(data), prefix=prefix, size_bytes=index.size_bytes, base=index.base
        )

    async def read_range(self, prefix: str, offset: int, size: int) -> memoryview:
        """Exactly `size` bytes at `offset` of the `.bin`.

        The ETag is pinned at the first range: all ranges come from one object.

        Raises:
            CheckpointMissing: there is no such `.bin`.
            CheckpointError: the `.bin` ends before that.
            ObjectChanged: the `.bin` was replaced; start again (it is pinned anew).
            StoreUnavailable: every try failed.
        """
        path = f"{check_prefix(prefix)}/{BIN_NAME}"
        try:
            if prefix not in self._etags:
                self._pin(prefix, (await self.objects.head(path)).etag)
            data = await self.objects.read(path, offset, size, etag=self._etags.get(prefix))
            return memoryview(data)
        except ObjectMissing:
            raise _missing(prefix) from None
        except ObjectChanged:
            self._etags.pop(prefix, None)
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{error.message}: {_AGAIN}") from None

    def upload(self, prefix: str, size_bytes: int | None = None) -> Upload:
        """Publish a `.bin` under `prefix` while it still grows; see `Upload`.

        `size_bytes`, when known, is what it will grow to.
        """
        return Upload(self.objects, prefix, size_bytes)

    async def publish(self, prefix: str, bin_path: Path, index: bytes) -> CheckpointRef:
        """Publish a finished `.bin` and its `.idx`; as `Upload.publish`."""
        status = await asyncio.to_thread(bin_path.stat)
        async with self.upload(prefix, status.st_size) as upload:
            return await upload.publish(bin_path, index)

    async def check(self) -> None:
        """Return if the store answers us. Raises StoreUnavailable, with the cure."""
        async for _ in self.objects.list(""):
            return

    async def delete(self, prefix: str) -> bool:
        """Remove the checkpoint, `.idx` first; whether there was one."""
        existed = await self.head(prefix) is not None
        await self.objects.delete(f"{prefix}/{IDX_NAME}")
        await self.objects.delete(f"{prefix}/{BIN_NAME}")
        self._etags.pop(prefix, None)
        return existed

    async def list(self) -> tuple[Published, ...]:
        """Every published checkpoint, by prefix; at most `list_max`."""
        found: list[Published] = []
        async for info in self.objects.list(""):
            prefix, _, name = info.path.rpartition("/")
            if name == IDX_NAME and prefix:
                found.append(
                    Published(prefix=prefix, index_size_bytes=info.size_bytes, index_etag=info.etag)
                )
                if len(found) >= self.objects.settings.list_max:
                    break
        return tuple(sorted(found, key=lambda published: published.prefix))

    def _pin(self, prefix: str, etag: str | None) -> None:
        while len(self._etags) >= self.objects.settings.pinned_etags_max:
            del self._etags[next(iter(self._etags))]
        self._etags[prefix] = etag


def _missing(prefix: str) -> CheckpointMissing:
    return CheckpointMissing(f"the store has no checkpoint {prefix}: {_AGAIN}")

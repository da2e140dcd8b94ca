"""`GET /chunks/{digest}`: what this node has, for other agents to fetch instead of the store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Container

import msgspec

from serverlessllm.agent.catalog import Catalog
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import RouteNotFound
from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.service import Loader


class _Place(msgspec.Struct, frozen=True):
    checkpoint: CheckpointRef
    offset: int
    size_bytes: int


class Chunks:
    """Finds chunks by their BLAKE3 in the checkpoints that lie here."""

    def __init__(self, catalog: Catalog, loader: Loader) -> None:
        self._catalog = catalog
        self._loader = loader
        self._places: dict[str, _Place] = {}
        self._read: set[CheckpointId] = set()

    async def get(self, digest: str) -> bytes:
        """The bytes of the chunk. Whoever gets them checks the digest: so does every peer.

        Raises:
            RouteNotFound: no checkpoint on this node has it.
        """
        here = {ref.id: ref for ref in self._catalog.residents()}
        self._forget(here)
        for ref in here.values():
            if digest not in self._places and ref.id not in self._read:
                await self._read_index(ref)
        place = self._places.get(digest)
        if place is None:
            raise RouteNotFound(f"no chunk {digest[:64]} on this node")
        async with await self._loader.load(place.checkpoint, CacheLevel.NVME) as resident:
            return await asyncio.to_thread(
                _read_at, str(resident.bin_path), place.offset, place.size_bytes
            )

    async def _read_index(self, ref: CheckpointRef) -> None:
        async with await self._loader.load(ref, CacheLevel.NVME) as resident:
            index = resident.index
        for number, chunk in enumerate(index.chunks):
            offset = number * index.chunk_bytes
            size_bytes = min(index.chunk_bytes, index.size_bytes - offset)
            self._places[chunk.blake3] = _Place(ref, offset, size_bytes)
        self._read.add(ref.id)

    def _forget(self, here: Container[CheckpointId]) -> None:
        """What was evicted is not found any more."""
        gone = {checkpoint for checkpoint in self._read if checkpoint not in here}
        if gone:
            self._read -= gone
            self._places = {
                digest: place
                for digest, place in self._places.items()
                if place.checkpoint.id not in gone
            }


def _read_at(path: str, offset: int, size_bytes: int) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered
        data = os.pread(file.fileno(), size_bytes, offset)
    if len(data) != size_bytes:
        raise RouteNotFound("the chunk has just been evicted")
    return data

"""A real store whose reads wait, or fail, when they are told to: for tests of what takes time."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from blake3 import blake3
from crc32c import crc32c

from serverlessllm.checkpoint.index import KIND_TENSORS, Chunk, Index, Tensor, encode_index
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.models import CheckpointRef
from serverlessllm.core.units import KIB
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_objects
from serverlessllm.store.settings import StoreSettings


class GatedStore(CheckpointStore):
    """A folder store that gives the first bytes of each `.bin` and holds the rest back. It is read
    by ranges, as one behind a network."""

    def __init__(self, folder: Path) -> None:
        super().__init__(open_objects(folder.as_uri(), StoreSettings(), SystemClock(), create=True))
        self._limit_bytes: float = float("inf")
        self._error: SLLMError | None = None
        self._turn = asyncio.Event()
        self.held = 0
        """Reads that wait now."""

    def let(self, limit_bytes: float = float("inf")) -> None:
        """From now on, give what ends before that."""
        self._limit_bytes, self._error = limit_bytes, None
        self._take_turns()

    def fail(self, error: SLLMError) -> None:
        """Raise that instead of holding back."""
        self._error = error
        self._take_turns()

    def local_bin(self, prefix: str) -> Path | None:
        del prefix
        return None

    async def read_range(self, prefix: str, offset: int, size: int) -> memoryview:
        self.held += 1
        try:
            while offset + size > self._limit_bytes:
                if self._error is not None:
                    raise self._error
                await self._turn.wait()
        finally:
            self.held -= 1
        return await super().read_range(prefix, offset, size)

    def _take_turns(self) -> None:
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()


CHUNK_BYTES = 64 * KIB


async def publish_random(
    store: CheckpointStore, folder: Path, name: str, *, chunks: int
) -> tuple[CheckpointRef, list[bytes]]:
    """Put a checkpoint of random bytes into the store: a tensor, a layer and a chunk of
    `CHUNK_BYTES` each, the last one shorter. What each chunk has."""
    size = chunks * CHUNK_BYTES - 20 * KIB
    data = random.Random(name).randbytes(size)  # noqa: S311 - a test's bytes
    parts = [data[at : at + CHUNK_BYTES] for at in range(0, size, CHUNK_BYTES)]
    index = Index(
        model=name,
        source=f"file:///{name}",
        revision="r1",
        kind=KIND_TENSORS,
        size_bytes=size,
        chunk_bytes=CHUNK_BYTES,
        chunks=tuple(Chunk(blake3=blake3(part).hexdigest(), crc32c=crc32c(part)) for part in parts),
        tensors=tuple(
            Tensor(
                name=f"model.layers.{number}.w",
                dtype="U8",
                shape=(len(part),),
                offset=number * CHUNK_BYTES,
                size_bytes=len(part),
            )
            for number, part in enumerate(parts)
        ),
    )
    path = folder / f"{name}.publish"
    path.write_bytes(data)
    return await store.publish(f"{name}/r1", path, encode_index(index)), parts

"""What a checkpoint store does, whatever its URL: subclass and give a `store` fixture.

The store must be empty, with parts of 64 KiB on a folder or in memory (S3 wants 5 MiB).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3
from crc32c import crc32c

from serverlessllm.checkpoint.index import Chunk, Index, checkpoint_id, encode_index
from serverlessllm.core.errors import CheckpointError, Conflict, InvalidRequest
from serverlessllm.store.checkpoints import CheckpointMissing, CheckpointStore

_CHUNK_BYTES = 64 * 1024
PREFIX = "org/name/r1"


def write_checkpoint(
    folder: Path, size_bytes: int = 300_000, name: str = "a"
) -> tuple[Path, bytes]:
    """A `.bin` of random bytes, and its `.idx`."""
    data = os.urandom(size_bytes)
    path = folder / f"{name}.bin"
    path.write_bytes(data)
    chunks = [data[at : at + _CHUNK_BYTES] for at in range(0, size_bytes, _CHUNK_BYTES)]
    index = Index(
        model="org/name",
        source="file:name",
        revision="r1",
        kind="tensors",
        size_bytes=size_bytes,
        chunk_bytes=_CHUNK_BYTES,
        chunks=tuple(
            Chunk(blake3=blake3(chunk).hexdigest(), crc32c=crc32c(chunk)) for chunk in chunks
        ),
        tensors=(),
    )
    return path, encode_index(index)


async def objects_of(store: CheckpointStore) -> list[str]:
    """Every object of the store, also those that no checkpoint owns."""
    return sorted([info.path async for info in store.objects.list("")])


class CheckpointStoreContract:
    """The suite."""

    size_bytes = 300_000
    """Of the `.bin`: several parts."""

    async def test_publishes_what_others_then_see(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        assert await store.head(PREFIX) is None
        assert await store.find(PREFIX) is None
        assert await store.list() == ()

        ref = await store.publish(PREFIX, path, idx)

        assert (ref.id, ref.prefix, ref.size_bytes) == (checkpoint_id(idx), PREFIX, self.size_bytes)
        head = await store.head(PREFIX)
        assert head is not None
        assert head.index_size_bytes == len(idx)
        assert await store.read_index(PREFIX) == idx
        assert await store.find(PREFIX) == ref
        assert [published.prefix for published in await store.list()] == [PREFIX]
        assert await objects_of(store) == [f"{PREFIX}/model.bin", f"{PREFIX}/model.idx"]

    async def test_ranges_are_exact(self, store: CheckpointStore, tmp_path: Path) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        data = path.read_bytes()
        await store.publish(PREFIX, path, idx)
        end = self.size_bytes
        spans = [(0, 1), (0, end), (70_000, 100_000), (end - 5, 5), (7, 0)]
        found = await asyncio.gather(*(store.read_range(PREFIX, *span) for span in spans))
        assert [bytes(part) for part in found] == [data[at : at + size] for at, size in spans]

    async def test_a_range_past_the_end_is_an_error(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        await store.publish(PREFIX, path, idx)
        with pytest.raises(CheckpointError, match="truncated"):
            await store.read_range(PREFIX, self.size_bytes - 10, 20)

    async def test_what_is_missing_is_said_to_be(self, store: CheckpointStore) -> None:
        with pytest.raises(CheckpointMissing, match=PREFIX):
            await store.read_index(PREFIX)
        with pytest.raises(CheckpointMissing, match=PREFIX):
            await store.read_range(PREFIX, 0, 1)
        assert await store.delete(PREFIX) is False
        with pytest.raises(InvalidRequest):
            await store.head("../outside/x")

    async def test_the_upload_follows_a_growing_file(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        source, idx = write_checkpoint(tmp_path, self.size_bytes)
        data = source.read_bytes()
        partial, final = tmp_path / "model.bin.partial", tmp_path / "model.bin"
        async with store.upload(PREFIX, self.size_bytes) as upload:
            with partial.open("wb") as file:
                for at in range(0, self.size_bytes, 50_000):
                    file.write(data[at : at + 50_000])
                    file.flush()
                    await upload.advance(partial, min(at + 50_000, self.size_bytes))
                    assert await store.head(PREFIX) is None
            partial.rename(final)
            await upload.publish(final, idx)
        assert bytes(await store.read_range(PREFIX, 0, self.size_bytes)) == data

    async def test_the_same_checkpoint_again_is_no_error(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        assert await store.publish(PREFIX, path, idx) == await store.publish(PREFIX, path, idx)

    async def test_another_checkpoint_there_is_a_conflict(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        other_path, other_idx = write_checkpoint(tmp_path, self.size_bytes, "b")
        await store.publish(PREFIX, path, idx)
        with pytest.raises(Conflict, match=PREFIX):
            await store.publish(PREFIX, other_path, other_idx)
        assert await store.read_index(PREFIX) == idx
        whole = await store.read_range(PREFIX, 0, self.size_bytes)
        assert bytes(whole) == path.read_bytes()

    async def test_racing_publishers_all_win_with_equal_bytes(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        refs = await asyncio.gather(*(store.publish(PREFIX, path, idx) for _ in range(4)))
        assert len(set(refs)) == 1
        assert await objects_of(store) == [f"{PREFIX}/model.bin", f"{PREFIX}/model.idx"]
        whole = await store.read_range(PREFIX, 0, self.size_bytes)
        assert bytes(whole) == path.read_bytes()

    async def test_an_index_of_another_file_is_refused(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="convert it again"):
            await store.publish(PREFIX, path, idx)
        with pytest.raises(CheckpointError):
            await store.publish(PREFIX, path, b"not an index")
        assert await objects_of(store) == []

    async def test_an_upload_that_fails_leaves_nothing(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, _ = write_checkpoint(tmp_path, self.size_bytes)

        async def fail() -> None:
            async with store.upload(PREFIX, self.size_bytes) as upload:
                await upload.advance(path, self.size_bytes)
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            await fail()
        assert await objects_of(store) == []
        assert store.root is None or list(store.root.iterdir()) == []

    async def test_a_cancelled_upload_leaves_nothing(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, _ = write_checkpoint(tmp_path, self.size_bytes)
        started = asyncio.Event()

        async def publish_for_ever() -> None:
            async with store.upload(PREFIX, self.size_bytes) as upload:
                async for ready in _growing(self.size_bytes):
                    await upload.advance(path, ready)
                    started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(publish_for_ever())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await objects_of(store) == []
        assert store.root is None or list(store.root.iterdir()) == []

    async def test_deleting_makes_room_for_another(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        await store.publish(PREFIX, path, idx)
        await store.read_range(PREFIX, 0, 1)
        assert await store.delete(PREFIX) is True
        assert await objects_of(store) == []
        other_path, other_idx = write_checkpoint(tmp_path, self.size_bytes, "b")
        await store.publish(PREFIX, other_path, other_idx)
        whole = await store.read_range(PREFIX, 0, self.size_bytes)
        assert bytes(whole) == other_path.read_bytes()

    async def test_a_leftover_bin_is_invisible_and_replaced(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        """A publisher that was killed between `.bin` and `.idx`."""
        path, idx = write_checkpoint(tmp_path, self.size_bytes)
        await store.objects.put_new(f"{PREFIX}/model.bin", b"half of another")
        assert await store.head(PREFIX) is None
        assert await store.list() == ()
        await store.publish(PREFIX, path, idx)
        whole = await store.read_range(PREFIX, 0, self.size_bytes)
        assert bytes(whole) == path.read_bytes()

    async def test_the_store_says_that_it_is_there(self, store: CheckpointStore) -> None:
        await store.check()


async def _growing(size_bytes: int) -> AsyncIterator[int]:
    for ready in range(size_bytes // 3, size_bytes + 1, size_bytes // 3):
        await asyncio.sleep(0)
        yield ready

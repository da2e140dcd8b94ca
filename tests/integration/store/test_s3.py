"""The suite of stores on a real S3, and what only S3 has: multipart uploads that must not stay."""

import asyncio
import uuid
from pathlib import Path

import msgspec
import pytest

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.units import MIB
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.errors import AccessDenied, StoreMisconfigured
from serverlessllm.store.open import open_store
from serverlessllm.testing.contracts.store import (
    PREFIX,
    CheckpointStoreContract,
    write_checkpoint,
)
from serverlessllm.testing.s3 import S3Server
from serverlessllm.testing.waiting import eventually


def open_empty(s3: S3Server) -> CheckpointStore:
    settings = msgspec.structs.replace(s3.settings, part_bytes=5 * MIB, upload_concurrency=2)
    return open_store(f"{s3.url}/{uuid.uuid4().hex}", settings, SystemClock())


class TestS3(CheckpointStoreContract):
    size_bytes = 11 * MIB

    @pytest.fixture
    def store(self, s3: S3Server) -> CheckpointStore:
        return open_empty(s3)


async def test_an_abandoned_multipart_upload_is_aborted(s3: S3Server, tmp_path: Path) -> None:
    """SeaweedFS keeps the parts of open uploads below `.uploads` in the bucket."""
    store = open_empty(s3)
    path, _ = write_checkpoint(tmp_path, 11 * MIB)
    uploaded = asyncio.Event()

    async def publish() -> None:
        async with store.upload(PREFIX) as upload:
            await upload.advance(path, 11 * MIB)
            assert len(s3.open_uploads()) == 1
            uploaded.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(publish())
    await uploaded.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: s3.open_uploads() == [])  # it deletes in its own time


async def test_wrong_keys_are_said_to_be_wrong(s3: S3Server) -> None:
    settings = msgspec.structs.replace(
        s3.settings,
        options={"access_key_id": s3.access_key, "secret_access_key": "n0t-this-one"},
    )
    store = open_store(s3.url, settings, SystemClock())
    with pytest.raises(AccessDenied, match="keys") as raised:
        await store.head(PREFIX)
    assert "n0t-this-one" not in str(raised.value)


async def test_a_missing_bucket_is_said_to_be_missing(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket", s3.settings, SystemClock())
    with pytest.raises(StoreMisconfigured, match="bucket"):
        await store.check()
